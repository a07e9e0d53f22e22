"""``dit-accel doctor --kernels``: every attention backend on every device, checked against torch's own attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import with_type

if TYPE_CHECKING:
    import torch

    from dit_accel.kernels.sparse_plan import SparsePlan
    from dit_accel.kernels.triton_kernels.forward_config import LaunchConfig

# Names of dtypes (torch is not imported here), head dims and the difference from float32 attention that is accepted.
CASES = (("float32", 64, 1e-4), ("float16", 128, 5e-3), ("bfloat16", 64, 4e-2), ("bfloat16", 128, 4e-2))
# Head dims whose launch configuration is shown; others are padded to the next of them.
HEAD_DIMS = (32, 64, 128, 256)
HEADS, TOKENS, BLOCK = 2, 300, 64


def examine_kernels(kinds: list[str]) -> dict[str, Any]:
    """Checks all backends on devices of these kinds ("cpu", "cuda").

    Returns:
        Plain data: ``auto`` (what is chosen per device, and why), ``kernels`` (one row per device and backend),
        ``variants`` (one row per device and variant of the Triton kernel) and ``healthy`` (what auto chooses gives
        right results everywhere).
    """
    from dit_accel.kernels.attend import BACKENDS
    from dit_accel.kernels.triton_kernels.variants import VARIANTS

    rows = [_examine(backend, kind) for kind in kinds for backend in BACKENDS]
    auto = {kind: _automatic(kind) for kind in kinds}
    works = {(row["device"], row["backend"]): row["ok"] for row in rows}
    healthy = all(works.get((kind, choice["backend"]), False) for kind, choice in auto.items())
    variants = [_variant(variant, kind) for kind in kinds for variant in VARIANTS]
    return {"auto": auto, "kernels": rows, "variants": variants, "healthy": healthy}


def print_kernels(findings: dict[str, Any]) -> None:
    """Prints what `examine_kernels` found."""
    for kind, choice in findings["auto"].items():
        print(f"{'auto on ' + kind:<14} {choice['backend']}: {choice['reason']}")
    for row in findings["kernels"]:
        state = "works" if row["ok"] else "wrong" if row["accepted"] else "refused"
        print(f"{row['device'] + ' ' + row['backend']:<14} {state}: {row['reason']}")
        for check in row["checks"] if row["accepted"] else ():
            print(f"{'':<14} {check['dtype']}, head dim {check['head_dim']}: {check['detail']}")
        for name, value in row["configuration"].items():
            print(f"{'':<14} {name}: {value}")
    for row in findings["variants"]:
        print(f"{row['device'] + ' ' + row['variant']:<21} {'runs' if row['ok'] else 'refused'}: {row['reason']}")
        for name, value in row["configuration"].items():
            print(f"{'':<21} {name}: {value}")


@contextmanager
def known_warnings_hidden() -> Iterator[None]:
    """Hides what FlexAttention says where it is not compiled; its row says so already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def _plan(device: str) -> SparsePlan:
    """Odd length, full and partial blocks, lists per head; every query sees a key, since torch gives NaN otherwise."""
    import torch

    from dit_accel.kernels.pair_tests import Band
    from dit_accel.kernels.sparse_plan import plan_from_blocks

    blocks = -(-TOKENS // BLOCK)
    keep = torch.rand(1, HEADS, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    keep |= torch.eye(blocks, dtype=torch.bool)
    widths = torch.tensor([40, 20, 5, -1], dtype=torch.int32)
    sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": BLOCK, "block_kv": BLOCK}
    return plan_from_blocks(keep, pair_test=Band(72, widths, 288, 10), **sizes).to(device)


def _examine(backend: str, kind: str) -> dict[str, Any]:
    checks = [_check(backend, kind, *case) for case in CASES]
    ran = [check for check in checks if check["accepted"]]
    return {
        "device": kind,
        "backend": backend,
        "accepted": bool(ran),
        "ok": bool(ran) and all(check["ok"] for check in ran),
        "reason": (ran or checks)[0]["reason"],
        "checks": checks,
        "configuration": _configuration(backend, kind) if ran else {},
    }


def _variant(variant: str, kind: str) -> dict[str, Any]:
    """Whether a variant takes plain calls in 16 bits with blocks of 128, and what its self-check found."""
    import torch

    from dit_accel.kernels.support import Call, check
    from dit_accel.kernels.triton_kernels.self_check import known_outcomes
    from dit_accel.kernels.triton_kernels.variants import backend_name

    row: dict[str, Any] = {"device": kind, "variant": backend_name(variant)}
    try:
        answer = check(backend_name(variant), Call(kind, torch.float16, 128, 128, 128))
        outcome = known_outcomes(kind).get(variant)
        configuration = _variant_configuration(variant, kind) if answer.ok else {}
    except Exception as failure:  # a device may be there that runs nothing
        return row | {"ok": False, "reason": with_type(failure), "max_abs_error": None, "configuration": {}}
    error = None if outcome is None else outcome.error
    return row | {
        "ok": answer.ok,
        "reason": answer.reason,
        "max_abs_error": error,
        "configuration": configuration,
    }


def _case(kind: str, dtype: str, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SparsePlan]:
    """Queries, keys and values on a device, and the plan."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (1, HEADS, TOKENS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(kind, getattr(torch, dtype)) for _ in range(3))
    return q, k, v, _plan(kind)


def _check(backend: str, kind: str, dtype: str, head_dim: int, tolerance: float) -> dict[str, Any]:
    from dit_accel.kernels import attend as kernels

    row: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim}
    try:
        q, k, v, plan = _case(kind, dtype, head_dim)
        support = {answer.backend: answer for answer in kernels.explain(q, k, v, plan)}[backend]
    except Exception as failure:  # a device may be there that runs nothing
        reason = with_type(failure)
        return row | {"accepted": False, "reason": reason, "ok": False, "max_abs_error": None, "detail": reason}
    row |= {"accepted": support.ok, "reason": support.reason}
    if not support.ok:
        return row | {"ok": False, "max_abs_error": None, "detail": f"refused: {support.reason}"}
    try:
        with known_warnings_hidden():
            error = _error(kernels.attend(q, k, v, plan, backend=backend), q, k, v, plan)
    except Exception as failure:  # a diagnosis must survive whatever a backend does
        return row | {"ok": False, "max_abs_error": None, "detail": with_type(failure)}
    if not math.isfinite(error):
        return row | {"ok": False, "max_abs_error": None, "detail": "the output holds NaN or infinity"}
    detail = f"largest difference from dense attention {error:.1e} (up to {tolerance:.0e} is accepted)"
    return row | {"ok": error <= tolerance, "max_abs_error": error, "detail": detail}


def _error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SparsePlan) -> float:
    """Largest absolute difference from torch's attention in float32 under the expanded mask."""
    from torch.nn.functional import scaled_dot_product_attention

    expected = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=plan.element_mask())
    return float((out.float() - expected).abs().max())


def _automatic(kind: str) -> dict[str, str]:
    import torch

    from dit_accel.kernels.attend import choose_backend

    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    try:
        choice = choose_backend(kind, dtype, 128, _plan(kind))
    except Exception as failure:  # a device may be there that runs nothing
        return {"backend": "none", "reason": with_type(failure)}
    return {"backend": choice.backend, "reason": choice.reason}


def _configuration(backend: str, kind: str) -> dict[str, str]:
    """What the backend was set to, in words; empty where there is nothing to choose."""
    import torch

    if backend == "gather" and kind == "cpu":
        return {"threads": str(torch.get_num_threads())}
    if backend != "triton":
        return {}
    sizes = (("16 bit", 2), ("32 bit", 4))
    try:
        return {f"{name}, head dim {dim}": _pointer_tile(kind, size, dim) for name, size in sizes for dim in HEAD_DIMS}
    except Exception as failure:  # the checks may have left the device unusable
        return {"unknown": with_type(failure)}


def _variant_configuration(variant: str, kind: str) -> dict[str, str]:
    from dit_accel.kernels.triton_kernels.hopper import hopper_config

    found = {}
    for dim in (64, 128):
        hopper = variant != "pointer"
        found[f"16 bit, head dim {dim}"] = _tile(hopper_config(dim, 128)) if hopper else _pointer_tile(kind, 2, dim)
    return found


def _pointer_tile(kind: str, itemsize: int, head_dim: int) -> str:
    import torch

    from dit_accel.kernels.triton_kernels.forward_config import launch_config

    known = kind == "cuda" and not torch.version.hip
    capability = torch.cuda.get_device_capability() if known else None
    return _tile(launch_config(capability, itemsize, head_dim, 128, 128))


def _tile(config: LaunchConfig) -> str:
    tile = f"{config.tile_m} queries x {config.tile_n} keys"
    return f"{tile}, {config.warps} warps, {config.stages} stages"
