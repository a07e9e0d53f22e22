"""What all sections share: the device, the clock, the budget, and how a call is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Row = dict[str, Any]

# Written before every timed call; larger than the L2 cache of any GPU so far.
_FLUSH_BYTES = 256 << 20
# Of the fastest GPUs; a slower one waits longer than asked for, which does no harm.
_CLOCK_HZ = 2e9
# Seconds that Python may need to queue a call; one that waits for the GPU itself needs more, and gains nothing by it.
_LONGEST_WAIT = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: 20th, 50th and 80th percentile of its repeats."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Interpolates linearly between the sorted times."""
        ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(ranks)
        return cls(*quantiles.tolist(), len(seconds))

    def row(self) -> Row:
        """The percentiles in milliseconds."""
        times = {f"{name}_ms": round(1e3 * getattr(self, name), 4) for name in ("p20", "p50", "p80")}
        return times | {"repeats": self.repeats}


@dataclass
class Session:
    """One run of the benchmark.

    Attributes:
        device: Where everything runs.
        smoke: Toy sizes, one repeat, no rates: only to see that the script works.
        deadline: `time.monotonic()` at which the current section has to end.
        refused: Backends that are not to be run in this process, and why; filled in by the checks.
    """

    device: torch.device
    smoke: bool
    deadline: float
    refused: dict[str, str] = field(default_factory=dict)
    _dense: dict[tuple[Any, ...], Timing | str] = field(default_factory=dict)
    _flush: Tensor | None = None

    def left(self) -> float:
        """Seconds that the current section may still take."""
        return self.deadline - time.monotonic()

    def time(
        self, call: Callable[[], Any], *, seconds: float = 0.4, least: int = 5, most: int = 50, warmup: int = 2
    ) -> Timing:
        """Times `call` for about `seconds`, at least `least` and at most `most` repeats, after warming up.

        On a GPU by CUDA events around each repeat, with the L2 cache overwritten before it, and the GPU kept waiting
        until Python has queued the call: in a model it is ahead, too.
        """
        if self.smoke:
            seconds, least, most, warmup = 0.0, 1, 1, 0
        host = 0.0
        for _ in range(warmup):
            self.wait()
            host = _wall_seconds(call)
        first = self._repeat(call, 1, host)
        repeats = min(most, max(least, int(seconds / first[0])))
        return Timing.of(first + self._repeat(call, repeats - 1, host))

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _repeat(self, call: Callable[[], Any], repeats: int, host: float) -> list[float]:
        if self.device.type != "cuda":
            return [_wall_seconds(call) for _ in range(repeats)]
        if self._flush is None:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        cycles = int(1.5 * min(host, _LONGEST_WAIT) * _CLOCK_HZ)
        for first, last in events:
            self._flush.zero_()
            torch.cuda._sleep(cycles)
            first.record()
            call()
            last.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(last) / 1e3 for first, last in events]

    def attempt(self, case: Row, measured: Callable[[], Row]) -> Row:
        """A row of results, or of the reason why there are none; one case out of memory does not end the others."""
        try:
            return case | measured()
        except Exception as error:  # those of Triton's compiler have no base class of their own in all versions
            message = f"{type(error).__name__}: {error}".splitlines()[0]
        # Outside of the handler, whose traceback keeps the tensors of the failed case alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return case | {"failed": message}

    def randn(self, shape: tuple[int, int, int, int], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
        """`count` random `[B, H, S, D]` tensors, views of `[B, S, H, D]` storage as diffusers has them."""
        batch, heads, tokens, dim = shape
        made = (torch.randn(batch, tokens, heads, dim, dtype=dtype, device=self.device) for _ in range(count))
        return [tensor.transpose(1, 2) for tensor in made]

    def dense(self, shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str = "cudnn") -> Timing:
        """Dense attention of a shape, measured once per run.

        Args:
            shape: `[B, H, S, D]`.
            dtype: Of q, k and v.
            kind: "cudnn", "default" (what `scaled_dot_product_attention` picks by itself), or "cudnn backward".

        Raises:
            RuntimeError: There is no such kernel here.
        """
        key = (*shape, dtype, kind)
        if key not in self._dense:
            try:
                self._dense[key] = self._time_dense(shape, dtype, kind)
            except RuntimeError as error:
                self._dense[key] = f"dense attention, {kind}: {error}".splitlines()[0]
        found = self._dense[key]
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def _time_dense(self, shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str) -> Timing:
        q, k, v = self.randn(shape, dtype)
        with dense_kernel(self.device, kind != "default"):
            if kind != "cudnn backward":
                return self.time(lambda: F.scaled_dot_product_attention(q, k, v))
            inputs = [t.requires_grad_() for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*inputs)
            grad = torch.randn_like(out)
            return self.time(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))

    def rates(self, timing: Timing, dense: Timing | None, flops: float, density: float) -> Row:
        """TFLOP/s on kept pairs, and how much of the possible speed-up over `dense` is reached; none in smoke runs."""
        if self.smoke:
            return {}
        row: Row = {"tflops": round(flops * density / timing.p50 / 1e12, 1)}
        if dense is not None:
            speedup = dense.p50 / timing.p50
            row |= {"speedup": round(speedup, 3), "efficiency": round(speedup * density, 3)}
        return row


def _wall_seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def dense_kernel(device: torch.device, cudnn: bool) -> Any:
    """Makes torch take cuDNN's attention on a GPU, which it does not by itself; a CPU has only one kernel."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn and device.type == "cuda" else nullcontext()


def attention_flops(shape: tuple[int, int, int, int]) -> float:
    """Of the dense forward pass: two products of 2 * S * S * D for each head."""
    batch, heads, tokens, dim = shape
    return 4.0 * batch * heads * tokens * tokens * dim
