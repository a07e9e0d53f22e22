"""Correctness before speed: every backend that takes the call, against float32 and float64 attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.residual import block_residual
from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.kernels.support import NAMES, Call, check

from .plans import banded_plan, random_plan, tested_plan
from .session import Row, Session

# Inputs are standard normal, so outputs are below 1 in size; the errors are roundings of inputs, weights and outputs.
_TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_LSE_TOLERANCE = 1e-3
_GRADIENT_TOLERANCE = 3e-2
_SAMPLED_ROWS = 64
_RESIDUAL = "random, residual"
_RARER = ("neighborhood", "bitmap", _RESIDUAL)
# The reference is what all are held against; FlexAttention compiles for every case and is not ours to vouch for; what
# "triton" chooses is checked under its own name.
_UNCHECKED = ("reference", "flex", "triton")


def run(session: Session) -> Iterator[Row]:
    """Rows with `ok`; the caller ends the run at the first that is not."""
    tokens = 200 if session.smoke else 1000
    blocks, dims = ((32, 64), (32,)) if session.smoke else ((64, 128), (64, 128))
    small = [(torch.bfloat16, dim, block, kind) for dim in dims for block in blocks for kind in ("random", "banded")]
    small += [(torch.bfloat16, dims[-1], blocks[-1], kind) for kind in _RARER]
    small += [(torch.float16, dims[-1], blocks[-1], "random"), (torch.float32, dims[0], blocks[0], "banded")]
    for dtype, dim, block, kind in small:
        shape = (2, 3, tokens, dim)
        plan = _plan(kind, tokens, block, session.device)
        for backend in _backends(session, shape, dtype, plan, kind):
            case = {"shape": list(shape), "dtype": _name(dtype), "block": block, "plan": kind, "backend": backend}
            yield _judged(case, partial(_whole_error, session, shape, dtype, plan, backend, kind == _RESIDUAL))
    shape = (1, 2, 1000, 32) if session.smoke else (1, 24, 119056, 128)
    case = {"shape": list(shape), "dtype": "bfloat16", "block": 128, "plan": "random, rows sampled", "backend": "auto"}
    yield _judged(case, partial(_sampled_error, session, shape))
    for dim in dims:
        shape = (1, 2, tokens, dim)
        case = {"shape": list(shape), "dtype": "bfloat16", "block": blocks[-1], "plan": "random"}
        case |= {"backend": "auto", "what": "gradients"}
        yield _judged(case, partial(_gradient_error, session, shape, blocks[-1]))


def _plan(kind: str, tokens: int, block: int, device: torch.device) -> SparsePlan:
    torch.manual_seed(1)
    if kind in ("random", _RESIDUAL):
        return random_plan(tokens, 3, 0.4, block, block, device, empty_row=1)
    if kind == "banded":
        return banded_plan(tokens, 90, block, device)
    return tested_plan(kind, tokens, block, device)


def _backends(
    session: Session, shape: tuple[int, int, int, int], dtype: torch.dtype, plan: SparsePlan, kind: str
) -> list[str]:
    all_full = plan.pair_test is None and kind != _RESIDUAL
    call = Call.of(*session.randn(shape, dtype), plan.block_q, plan.block_kv, all_full=all_full)
    return [name for name in NAMES if name not in _UNCHECKED and check(name, call).ok]


def _judged(case: Row, measured: Callable[[], Row]) -> Row:
    """A kernel that raises is as wrong as one that miscounts."""
    try:
        return case | measured()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return case | {"ok": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def _whole_error(
    session: Session,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    plan: SparsePlan,
    backend: str,
    with_residual: bool,
) -> Row:
    torch.manual_seed(2)
    q, k, v = session.randn(shape, dtype)
    residual = block_residual(k, v, plan.block_kv) if with_residual else None
    with poisoned_memory():
        out, lse = attend(q, k, v, plan, residual=residual, return_lse=True, backend=backend)
    wide = (t.float() for t in (q, k, v))
    expected, expected_lse = attend(*wide, plan, residual=residual, return_lse=True, backend="reference")
    empty = expected_lse.isneginf()
    lse_error = (lse - expected_lse).masked_fill(empty, 0.0).abs().max().item()
    error = (out.float() - expected).abs().max().item()
    ok = error <= _TOLERANCE[dtype] and lse_error <= _LSE_TOLERANCE and bool((lse.isneginf() == empty).all())
    return {"error": error, "lse_error": lse_error, "ok": ok}


def _sampled_error(session: Session, shape: tuple[int, int, int, int]) -> Row:
    """A long sequence, whose offsets exceed 31 bits in bytes; some rows of every head in float64."""
    torch.manual_seed(3)
    q, k, v = session.randn(shape, torch.bfloat16)
    plan = random_plan(shape[2], shape[1], 0.1, 128, 128, session.device)
    with poisoned_memory():
        out = attend(q, k, v, plan)
    rows = torch.cat([torch.randperm(plan.q_len)[: _SAMPLED_ROWS - 1], torch.tensor([plan.q_len - 1])]).to(q.device)
    error = 0.0
    for head in range(shape[1]):
        keep = plan.to_bool()[0, head, rows // plan.block_q].repeat_interleave(plan.block_kv, -1)[:, : plan.kv_len]
        scores = q[0, head, rows].double() @ k[0, head].double().T * shape[3] ** -0.5
        expected = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v[0, head].double()
        error = max(error, (out[0, head, rows].double() - expected).abs().max().item())
    finite = bool(out.isfinite().all())
    return {"error": error, "ok": error <= _TOLERANCE[torch.bfloat16] and finite}


def _gradient_error(session: Session, shape: tuple[int, int, int, int], block: int) -> Row:
    torch.manual_seed(4)
    plan = random_plan(shape[2], shape[1], 0.4, block, block, session.device)
    inputs, grad = session.randn(shape, torch.bfloat16), session.randn(shape, torch.bfloat16, 1)[0]
    found, expected = (
        torch.autograd.grad(attend(*leaves, plan, backend=backend), leaves, grad.to(leaves[0].dtype))
        for backend, leaves in (("auto", _leaves(inputs)), ("reference", _leaves([t.float() for t in inputs])))
    )
    pairs = zip(found, expected, strict=True)
    error = max(((got.float() - true).abs().max() / true.abs().max()).item() for got, true in pairs)
    return {"error": error, "ok": error <= _GRADIENT_TOLERANCE}


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills fresh float memory with NaN, so that an element nobody wrote shows up in the result."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    places = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    before = [getattr(place, name) for place, name in places]
    for (place, name), make in zip(places, before, strict=True):
        setattr(place, name, poison(make))
    try:
        yield
    finally:
        for (place, name), make in zip(places, before, strict=True):
            setattr(place, name, make)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
