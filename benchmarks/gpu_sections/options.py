"""Options of the pointer kernel that change how it computes, but not what: longest rows first, and its softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.kernels.support import Call, check

from .forward import SHAPES, Shape, dense_or_none
from .plans import random_plan, skewed_plan
from .session import Row, Session, attention_flops

# From the same kernel with its default options; weights and running maxima are rounded elsewhere.
_TOLERANCE = 1e-2
# Small enough for Triton's interpreter.
_TOY = Shape(1, 16, (2, 5, 9), 11)


def run(session: Session) -> Iterator[Row]:
    """Rows with TFLOP/s on kept pairs for every combination; `error` is the difference from the default options."""
    shapes, block = ((_TOY,), 32) if session.smoke else ((SHAPES[1], SHAPES[4]), 128)
    # The interpreter, which toy sizes may run in, multiplies bfloat16 wrongly.
    dtype = torch.float32 if session.smoke else torch.bfloat16
    for shape in shapes:
        call = Call.of(*session.randn(shape.bhsd, dtype), block, block)
        if not (support := check("triton:pointer", call)).ok:
            yield {"shape": list(shape.bhsd), "skipped": support.reason}
            continue
        plans: dict[str, Callable[[], SparsePlan]] = {
            "random 80%": partial(random_plan, shape.tokens, shape.heads, 0.2, block, block, session.device),
            "skewed 80%": partial(skewed_plan, shape.tokens, shape.heads, 0.2, block, session.device),
        }
        for (name, build), first, softmax in product(plans.items(), (False, True), ("online", "lazy", "static")):
            case = {
                "shape": list(shape.bhsd),
                "block": block,
                "plan": name,
                "longest_first": first,
                "softmax": softmax,
            }
            yield session.attempt(case, _measured(session, shape, dtype, build, first, softmax))


def _measured(
    session: Session, shape: Shape, dtype: torch.dtype, build: Callable[[], SparsePlan], first: bool, softmax: str
) -> Callable[[], Row]:
    def measured() -> Row:
        from dit_accel.kernels.triton_kernels.forward import triton_attention
        from dit_accel.kernels.triton_kernels.options import KernelOptions

        torch.manual_seed(5)
        plan, (q, k, v) = build(), session.randn(shape.bhsd, dtype)
        scale, options = shape.dim**-0.5, KernelOptions(longest_first=first, softmax=softmax)
        expected = triton_attention(q, k, v, plan, scale)[0]
        error = (triton_attention(q, k, v, plan, scale, options=options)[0] - expected).abs().max().item()
        if not error <= _TOLERANCE:
            raise RuntimeError(f"the result differs by {error} from that of the default options")
        timing = session.time(lambda: triton_attention(q, k, v, plan, scale, options=options))
        row = {"density": plan.density, "error": error} | timing.row()
        return row | session.rates(
            timing, dense_or_none(session, shape.bhsd), attention_flops(shape.bhsd), plan.density
        )

    return measured
