"""The plan run by torch's FlexAttention (arXiv 2412.05496), to compare with and to fall back on.

On a GPU it is compiled by torch.compile, once for each shape.  On the CPU it is not: compiled FlexAttention returns no
log-sum-exp there, so torch's dense stand-in runs, which holds every score in memory.  Forward only; "auto" never
chooses this backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..sparse_plan import SparsePlan
from .mask import plan_to_flex

# Where torch.compile is used.
_COMPILED = ("cuda",)
# Compilations kept in this process.  Behind torch's own limit of 8, calls would silently run the dense stand-in.
_COMPILATIONS = 64
# Tiles of FlexAttention must divide the blocks of the plan; its own tiles are no larger than this.
_LARGEST_TILE = 128


def flex_plan_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attends under `plan` through FlexAttention.

    Args:
        q: `[B, H, q_len, D]`, any strides.
        k: `[B, H, kv_len, D]`.
        v: `[B, H, kv_len, D]`.
        plan: Who attends to whom, in plan positions, without `order`.
        scale: Factor on the scores.

    Returns:
        `(out, lse)`: out contiguous in the dtype and shape of q; lse float32 `[B, H, q_len]`, natural log.  A query
        without any key gets out 0 and lse -inf.

    Raises:
        RuntimeError: More shapes were compiled in this process than are kept.
    """
    block_mask = plan_to_flex(plan, backward=False)
    # The operator refuses gradients after this, and says what to do; FlexAttention's own refusal does not.
    q, k, v = q.detach(), k.detach(), v.detach()
    with _mapping_allowed():
        if q.device.type in _COMPILED:
            out, lse = _call_compiled(q, k, v, block_mask, scale, _kernel_options(plan))
        else:
            out, lse = _call_flex(q, k, v, block_mask, scale, {})
    return out.contiguous(), lse.contiguous()


@contextmanager
def _mapping_allowed() -> Iterator[None]:
    """Lets torch.vmap work, on which FlexAttention's mask functions depend.

    When a compiled model runs for the first time, torch watches custom operators from a dispatch mode, and everything
    above such a mode is switched off inside the operator, vmap included.
    """
    keys, include = torch._C.DispatchKey, torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        keys.FuncTorchBatched,
        keys.FuncTorchVmapMode,
        keys.FuncTorchDynamicLayerFrontMode,
        keys.FuncTorchDynamicLayerBackMode,
    ):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


def _call_compiled(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, options: Any
) -> tuple[Tensor, Tensor]:
    config, exceptions = torch._dynamo.config, torch._dynamo.exc
    with config.patch(recompile_limit=_COMPILATIONS, fail_on_recompile_limit_hit=True):
        try:
            return _compiled_flex()(q, k, v, block_mask, scale, options)
        except exceptions.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"FlexAttention was compiled for {_COMPILATIONS} different shapes already. Call "
                "torch.compiler.reset(), or use backend='triton', which needs no compilation per shape."
            ) from error


def _call_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, options: Any) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    result: Any = flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, kernel_options=options, return_aux=AuxRequest(lse=True)
    )
    out, aux = result
    return out, aux.lse


@cache
def _compiled_flex() -> Callable[..., tuple[Tensor, Tensor]]:
    # Symbolic shapes would spare compilations, but cost speed in every call.
    return torch.compile(_call_flex, fullgraph=True, dynamic=False)


def _kernel_options(plan: SparsePlan) -> dict[str, Any]:
    """Tiles that fit the plan's blocks, and always the kernel that reads block lists of any shape."""
    from torch.nn.attention import flex_attention

    # torch 2.9 knows the older switch only; without either, short queries go to a decoding kernel.
    newer = hasattr(flex_attention, "_Backend")
    options: dict[str, Any] = {"BACKEND": "TRITON"} if newer else {"FORCE_USE_FLEX_ATTENTION": True}
    for name, block in (("BLOCK_M", plan.block_q), ("BLOCK_N", plan.block_kv)):
        if block % _LARGEST_TILE:
            options[name] = min(block & -block, _LARGEST_TILE // 2)
    return options
