"""The backward pass on kept blocks, against cuDNN's dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dit_accel.kernels.attend import attend

from .forward import SHAPES, SMOKE_SHAPES, Shape, dense_or_none
from .plans import random_plan
from .session import Row, Session, attention_flops

# Five products where the forward pass has two.
_FLOPS_OF_FORWARD = 2.5


def run(session: Session) -> Iterator[Row]:
    """Rows with TFLOP/s on kept pairs of the backward pass alone."""
    shapes, blocks = (SMOKE_SHAPES, (32,)) if session.smoke else ((SHAPES[0], SHAPES[1], SHAPES[4]), (128, 64))
    for block in blocks:
        for shape in shapes:
            for density in (0.2, 1.0):
                case = {"shape": list(shape.bhsd), "block": block, "plan": f"random {1 - density:.0%}"}
                yield session.attempt(case, _measured(session, shape, block, density))


def _measured(session: Session, shape: Shape, block: int, density: float) -> Callable[[], Row]:
    def measured() -> Row:
        plan = random_plan(shape.tokens, shape.heads, density, block, block, session.device)
        inputs = [t.requires_grad_() for t in session.randn(shape.bhsd, torch.bfloat16)]
        out = attend(*inputs, plan)
        grad = torch.randn_like(out)
        timing = session.time(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
        flops = _FLOPS_OF_FORWARD * attention_flops(shape.bhsd)
        dense = dense_or_none(session, shape.bhsd, "cudnn backward")
        return {"density": plan.density} | timing.row() | session.rates(timing, dense, flops, plan.density)

    return measured
