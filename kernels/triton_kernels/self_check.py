"""Does a kernel variant compute attention on this GPU?  Asked once per process, before the variant is first used.

A kernel that compiles may still be wrong on a GPU, driver or Triton that nobody has tried.  So each variant first
attends a small random case, with a short tail, a row without keys and strides of a transposed view, and is held
against torch's dense attention.  One that is wrong or fails is refused for the rest of the process, with one warning.
"""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..sparse_plan import SparsePlan

# A sound kernel takes microseconds.
PATIENCE_SECONDS = 60.0
_LSE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """What a self-check found.

    Attributes:
        ok: True if the variant may be used.
        error: Largest difference from dense attention; None if there was no result.
        reason: The finding in words.
    """

    ok: bool
    error: float | None
    reason: str


@dataclass(frozen=True)
class Case:
    """One small problem: dtype, head dim, blocks and lengths, and the difference that is accepted."""

    dtype: torch.dtype
    head_dim: int
    block_kv: int
    q_len: int
    kv_len: int
    tolerance: float


# Both tile widths with both head dims for which kernels are tuned; a short tail on both sides, and none; rows long
# enough that what loads ahead comes round several times.
CASES = (
    Case(torch.bfloat16, 128, 128, 300, 1165, 2e-2),
    Case(torch.bfloat16, 128, 64, 384, 1216, 2e-2),
    Case(torch.float16, 64, 64, 384, 1216, 4e-3),
    Case(torch.float16, 64, 128, 300, 1165, 4e-3),
)


class KernelHangError(RuntimeError):
    """A kernel does not finish, and nothing more can be done on its GPU in this process."""


_outcomes: dict[tuple[str, torch.device], Outcome] = {}
_lock = threading.Lock()


def self_check(variant: str, device: torch.device) -> Outcome:
    """Checks a variant on a GPU, or says what the check found before.

    Args:
        variant: One of `variants.VARIANTS`.
        device: A CUDA device with its index.

    Returns:
        The outcome, the same for the rest of the process.

    Raises:
        KernelHangError: The kernel does not finish.
    """
    key = (variant, device)
    if (known := _outcomes.get(key)) is not None:
        return known
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return _during_capture(variant)
    with _lock:
        if key not in _outcomes:
            _outcomes[key] = _checked(variant, device)
        return _outcomes[key]


def refuse(variant: str, device: torch.device, reason: str) -> None:
    """Keeps a variant from being used on a GPU for the rest of the process, whatever its self-check says.

    Args:
        variant: One of `variants.VARIANTS`.
        device: A CUDA device with its index.
        reason: For reports.
    """
    with _lock:
        _outcomes[variant, device] = Outcome(False, None, reason)


def known_outcomes(device_type: str) -> dict[str, Outcome]:
    """What has been checked so far on devices of a type, by variant; for reports."""
    return {variant: outcome for (variant, device), outcome in _outcomes.items() if device.type == device_type}


def _during_capture(variant: str) -> Outcome:
    """A check waits for the GPU, which a capture forbids: it is put off, and only the plain variant runs without."""
    if variant == "pointer":
        return Outcome(True, None, "not checked, since a CUDA graph is being captured")
    return Outcome(False, None, "it has not been checked yet; run attention once before capturing a CUDA graph")


def _checked(variant: str, device: torch.device) -> Outcome:
    try:
        outcome = examine(variant, device)
    except KernelHangError:
        raise
    except Exception as failure:  # compilers and drivers fail in many ways, and none of them may stop the caller
        first_line = (str(failure).strip().splitlines() or [""])[0]
        what = f"{type(failure).__name__}: {first_line}"
        outcome = Outcome(False, None, f"its self-check on {device} failed with {what}")
    if not outcome.ok:
        warnings.warn(
            f"The {variant!r} variant of the Triton attention kernel will not be used in this process: "
            f"{outcome.reason}. `dit-accel doctor --kernels` shows what is used instead.",
            RuntimeWarning,
            stacklevel=2,
        )
    return outcome


def examine(variant: str, device: torch.device, cases: tuple[Case, ...] = CASES) -> Outcome:
    """Runs the cases, whatever was found before.

    Args:
        variant: One of `variants.VARIANTS`.
        device: Where to run it; a CPU in Triton's interpreter.
        cases: What to run; in float16 where there is no bfloat16.

    Returns:
        The outcome.

    Raises:
        KernelHangError: The kernel does not finish.
    """
    if not _has_bfloat16(device):
        cases = tuple(replace(case, dtype=torch.float16) for case in cases)
    if device.type != "cuda":
        return _compare(variant, device, cases)
    # A stream of its own: what the caller has queued is not waited for.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        return _compare(variant, device, cases)


def _has_bfloat16(device: torch.device) -> bool:
    # Triton compiles it from Ampere on, and its interpreter multiplies it wrongly.
    if device.type != "cuda":
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.no_grad()
def _compare(variant: str, device: torch.device, cases: tuple[Case, ...]) -> Outcome:
    worst = 0.0
    with torch.autocast(device.type, enabled=False):
        for case in cases:
            out_error, lse_error = _errors(variant, device, case)
            # Written so that NaN does not pass.
            if not (out_error <= case.tolerance and lse_error <= _LSE_TOLERANCE):
                where = f"{str(case.dtype).removeprefix('torch.')}, head dim {case.head_dim}, {case.block_kv} keys"
                found = f"its results on {device} are wrong: for {where} the output is off by {out_error:.1e}"
                return Outcome(False, out_error, f"{found} and the log-sum-exp by {lse_error:.1e}")
            worst = max(worst, out_error)
    return Outcome(True, worst, f"self-check on {device} passed, largest error {worst:.1e}")


def _errors(variant: str, device: torch.device, case: Case) -> tuple[float, float]:
    """Largest errors of the output and of its log-sum-exp against dense attention in float64."""
    from .variants import attend_with

    plan, (q, k, v) = _problem(case, device)
    scale = case.head_dim**-0.5
    # Freed at once: the allocator hands this memory to the outputs, and whatever the kernel leaves out stays NaN.
    torch.full(q.shape, float("nan"), dtype=q.dtype, device=device)
    out, lse = attend_with(variant, q, k, v, plan, scale)
    if device.type == "cuda":
        _wait(variant, device)
    expected, expected_lse = _dense(q.double(), k.double(), v.double(), plan.element_mask(), scale)
    empty = expected_lse.isinf()
    # Where there are no keys the log-sum-exp has to be -inf, and a difference of infinities would be NaN.
    lse_error = torch.where(empty & (lse == expected_lse), 0.0, (lse.double() - expected_lse).abs())
    return float((out.double() - expected).abs().max()), float(lse_error.max())


def _problem(case: Case, device: torch.device) -> tuple[SparsePlan, list[Tensor]]:
    from ..sparse_plan import plan_from_blocks

    generator = torch.Generator("cpu").manual_seed(0)
    batch, heads = 2, 3
    rows, columns = -(-case.q_len // 128), -(-case.kv_len // case.block_kv)
    # Made on the CPU in float32, whatever defaults the caller has set.
    on_cpu: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    keep = torch.rand(1, heads, rows, columns, **on_cpu) < 0.6
    keep[..., 0, -1] = True
    keep[..., 1, :] = False
    keep[..., 2, :] = True
    tensors = [
        torch.randn(batch, n, heads, case.head_dim, **on_cpu).to(device, case.dtype).transpose(1, 2)
        for n in (case.q_len, case.kv_len, case.kv_len)
    ]
    plan = plan_from_blocks(keep, q_len=case.q_len, kv_len=case.kv_len, block_q=128, block_kv=case.block_kv)
    return plan.to(device), tensors


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    some = mask.any(-1, keepdim=True)
    # torch leaves open what a query without keys gets, so it sees all of them first and is overwritten then.
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=scale)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return torch.where(some, out, 0.0), scores.logsumexp(-1)


def _wait(variant: str, device: torch.device) -> None:
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not event.query():
        if time.monotonic() > deadline:
            raise KernelHangError(
                f"The {variant!r} variant of the Triton attention kernel does not finish on {device}, and the GPU is "
                "stuck in this process. Start it anew with backend='triton:pointer', and please report this."
            )
        time.sleep(1e-3)
