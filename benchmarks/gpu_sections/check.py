"""Correctness before speed: every backend that takes the call, against float32 and float64 attention.

Then the search kernels and the gradients.  Rows have `ok`; those with `gate` false are of backends that run only if
named, and are reported without holding up the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.attend import attend
from dit_accel.kernels.residual import block_residual
from dit_accel.kernels.search.mass import block_mass
from dit_accel.kernels.search.pooled import block_means
from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.kernels.support import NAMES, Call, check
from dit_accel.kernels.triton_kernels.self_check import known_outcomes
from dit_accel.kernels.triton_kernels.variants import backend_name

from . import isolated
from .plans import banded_plan, random_plan, tested_plan
from .session import Row, Session

# Inputs are standard normal, so outputs are below 1 in size; the errors are roundings of inputs, weights and outputs.
_TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_LSE_TOLERANCE = 1e-3
_GRADIENT_TOLERANCE = 3e-2
# Sums of products of the same numbers, in another order.
_MASS_TOLERANCE = 1e-3
_MEANS_TOLERANCE = 1e-4
_SAMPLED_ROWS = 64
_RESIDUAL = "random, residual"
_NARROW = "random, blocks of half as many keys"
_RARER = ("neighborhood", "bitmap", _RESIDUAL)
# Outputs over some 10,000 keys are small; a block too many or too few changes them by more than this.
_SAMPLED_TOLERANCE = 1e-3
# The reference is what all are held against; FlexAttention compiles for every case and is not ours to vouch for; what
# "triton" chooses is checked under its own name, and what needs one kind of GPU in a process of its own.
_UNCHECKED = ("reference", "flex", "triton", *map(backend_name, isolated.VARIANTS))
_CHECKED = tuple(name for name in NAMES if name not in _UNCHECKED)
_ONLY_IF_NAMED = ("xformers",)


def run(session: Session) -> Iterator[Row]:
    """Rows with `ok`; the caller measures nothing unless all are that gate."""
    for variant in isolated.VARIANTS:  # first, so that nothing below runs one that is wrong
        yield from isolated.rows(session, variant)
    yield from _self_checks(session.device)
    yield from attention_rows(session, _CHECKED)
    shape = (1, 2, 1000, 32) if session.smoke else (1, 24, 119056, 128)
    case = {"shape": list(shape), "dtype": "bfloat16", "block": 128, "plan": "random, rows sampled", "backend": "auto"}
    yield _judged(case, partial(_sampled_error, session, shape))
    yield from _search_rows(session)
    yield from _gradient_rows(session)


def _sizes(session: Session) -> tuple[int, tuple[int, int], tuple[int, ...]]:
    """Tokens, blocks and head dims of the small cases."""
    return (200, (32, 64), (32,)) if session.smoke else (1000, (64, 128), (64, 128))


def _self_checks(device: torch.device) -> Iterator[Row]:
    """What the pointer kernel's own check found: if it failed, the kernel takes no call, and no other row tells of it.

    That one runs on any GPU, so sparse attention would be that of another backend.
    """
    name = backend_name("pointer")
    support = check(name, Call(device.type, torch.bfloat16, 128, 128, 128, device_index=device.index))
    case: Row = {"plan": "self-check", "backend": name, "what": "self-check"}
    if (outcome := known_outcomes(device.type).get("pointer")) is not None:
        yield case | {"ok": outcome.ok, "error": outcome.error, "reason": outcome.reason}
    elif device.type == "cuda" and not support.ok:
        yield case | {"ok": False, "failed": support.reason}


def attention_rows(session: Session, names: Collection[str]) -> Iterator[Row]:
    """Whole outputs of the named backends that take a call, over kinds of plans, dtypes, blocks and head dims."""
    tokens, blocks, dims = _sizes(session)
    small = [(torch.bfloat16, dim, block, kind) for dim in dims for block in blocks for kind in ("random", "banded")]
    small += [(torch.bfloat16, dim, blocks[-1], _NARROW) for dim in dims]
    small += [(torch.bfloat16, dim, blocks[-1], "random") for dim in (40, 96)]  # which kernels pad
    small += [(torch.bfloat16, dims[-1], blocks[-1], kind) for kind in _RARER]
    small += [(torch.float16, dims[-1], blocks[-1], "random"), (torch.float32, dims[0], blocks[0], "banded")]
    for dtype, dim, block, kind in small:
        shape = (2, 3, tokens, dim)
        plan = _plan(kind, tokens, block, session.device)
        for backend in _backends(session, shape, dtype, plan, kind, names):
            case: Row = {"shape": list(shape), "dtype": _name(dtype), "block": block, "plan": kind}
            case |= {"backend": backend, "gate": backend not in _ONLY_IF_NAMED}
            yield _judged(case, partial(_whole_error, session, shape, dtype, plan, backend, kind == _RESIDUAL))


def _search_rows(session: Session) -> Iterator[Row]:
    """The search kernels against the same searches by torch; only where Triton runs."""
    tokens, blocks, dims = _sizes(session)
    cases = [(torch.bfloat16, dim, block) for dim in dims for block in blocks]
    for dtype, dim, block in [*cases, (torch.float32, dims[0], blocks[-1])]:
        shape = (2, 3, tokens, dim)
        call = Call.of(*session.randn(shape, dtype), block, block)
        if session.device.type != "cuda" and not check("triton:pointer", call).ok:
            continue
        for what, error in (("block mass", _mass_error), ("block means", _means_error)):
            case = {"shape": list(shape), "dtype": _name(dtype), "block": block, "plan": "none", "backend": "triton"}
            yield _judged(case | {"what": what}, partial(error, session, shape, dtype, block))


def _gradient_rows(session: Session) -> Iterator[Row]:
    tokens, blocks, dims = _sizes(session)
    cases = [(dim, block, "random") for dim in dims for block in blocks]
    cases += [(dims[-1], blocks[-1], kind) for kind in ("banded", *_RARER)]
    for dim, block, kind in cases:
        shape = (1, 3, tokens, dim)
        case = {"shape": list(shape), "dtype": "bfloat16", "block": block, "plan": kind}
        case |= {"backend": "auto", "what": "gradients"}
        yield _judged(case, partial(_gradient_error, session, shape, block, kind))


def _plan(kind: str, tokens: int, block: int, device: torch.device) -> SparsePlan:
    torch.manual_seed(1)
    if kind in ("random", _RESIDUAL):
        return random_plan(tokens, 3, 0.4, block, block, device, empty_row=1)
    if kind == _NARROW:
        return random_plan(tokens, 3, 0.4, block, block // 2, device, empty_row=1)
    if kind == "banded":
        return banded_plan(tokens, 90, block, device)
    return tested_plan(kind, tokens, block, device)


def _backends(
    session: Session,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    plan: SparsePlan,
    kind: str,
    names: Collection[str],
) -> list[str]:
    all_full = plan.pair_test is None and kind != _RESIDUAL
    call = Call.of(*session.randn(shape, dtype), plan.block_q, plan.block_kv, all_full=all_full)
    return [name for name in names if check(name, call).ok]


def _judged(case: Row, measured: Callable[[], Row]) -> Row:
    """A kernel that raises is as wrong as one that miscounts."""
    try:
        return case | measured()
    except Exception as error:
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
    """A long sequence, and offsets of elements beyond 31 bits; some rows of every head in float64.

    Queries, keys and values are parts of one tensor of six times as many heads, as a fused projection makes them.
    """
    torch.manual_seed(3)
    heads = shape[1]
    (wide,) = session.randn((shape[0], 6 * heads, *shape[2:]), torch.bfloat16, 1)
    q, k, v = (wide[:, start * heads : (start + 1) * heads] for start in (0, 2, 4))
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
    tolerance = _TOLERANCE[torch.bfloat16] if session.smoke else _SAMPLED_TOLERANCE
    return {"error": error, "ok": error <= tolerance and finite}


def _mass_error(session: Session, shape: tuple[int, int, int, int], dtype: torch.dtype, block: int) -> Row:
    torch.manual_seed(5)
    # The search takes [batch, tokens, heads, dim].
    q, k = (t.transpose(1, 2) for t in session.randn(shape, dtype, 2))
    sizes: dict[str, Any] = {"block_q": block, "block_kv": block}
    with poisoned_memory():
        mass, lse = block_mass(q, k, return_lse=True, backend="triton", **sizes)
    expected, expected_lse = block_mass(q, k, return_lse=True, backend="torch", **sizes)
    error = ((mass - expected).abs().max() / expected.max()).item()
    lse_error = (lse - expected_lse).abs().max().item()
    return {"error": error, "lse_error": lse_error, "ok": error <= _MASS_TOLERANCE and lse_error <= _LSE_TOLERANCE}


def _means_error(session: Session, shape: tuple[int, int, int, int], dtype: torch.dtype, block: int) -> Row:
    torch.manual_seed(6)
    x = session.randn(shape, dtype, 1)[0].transpose(1, 2)
    with poisoned_memory():
        means = block_means(x, block, backend="triton")
    error = (means - block_means(x, block, backend="torch")).abs().max().item()
    return {"error": error, "ok": error <= _MEANS_TOLERANCE}


def _gradient_error(session: Session, shape: tuple[int, int, int, int], block: int, kind: str) -> Row:
    plan = _plan(kind, shape[2], block, session.device)
    torch.manual_seed(4)
    inputs, grad = session.randn(shape, torch.bfloat16), session.randn(shape, torch.bfloat16, 1)[0]
    found, expected = (
        _gradients(leaves, grad, plan, backend, kind == _RESIDUAL)
        for backend, leaves in (("auto", _leaves(inputs)), ("reference", _leaves([t.float() for t in inputs])))
    )
    pairs = zip(found, expected, strict=True)
    # Written so that NaN does not pass.
    errors = [((got.float() - true).abs().max() / true.abs().max()).item() for got, true in pairs]
    return {"error": max(errors), "ok": all(error <= _GRADIENT_TOLERANCE for error in errors)}


def _gradients(
    leaves: list[Tensor], grad: Tensor, plan: SparsePlan, backend: str, with_residual: bool
) -> tuple[Tensor, ...]:
    q, k, v = leaves
    residual = block_residual(k, v, plan.block_kv) if with_residual else None
    out = attend(q, k, v, plan, residual=residual, backend=backend)
    return torch.autograd.grad(out, leaves, grad.to(q.dtype))


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
