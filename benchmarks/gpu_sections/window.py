"""NATTEN's HunyuanVideo case: a blocked window over 30 x 48 x 80 tokens that drops 91 % of the pairs.

Source: "Generalized Neighborhood Attention", arXiv 2504.16922, and NATTEN's profiler guide: window (18, 24, 24),
stride (16, 8, 8), tiles of 2 x 8 x 8 tokens, so that every tile is seen whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dit_accel.kernels.attend import attend

from .forward import dense_or_none
from .plans import Triple, window_plan
from .session import Row, Session, attention_flops

_FULL: tuple[Triple, Triple, Triple, Triple] = ((30, 48, 80), (2, 8, 8), (18, 24, 24), (16, 8, 8))
_TOY: tuple[Triple, Triple, Triple, Triple] = ((6, 8, 8), (2, 4, 4), (4, 4, 4), (4, 4, 4))


def run(session: Session) -> Iterator[Row]:
    """One row with q, k, v and the output permuted in every call, one with tokens tile by tile already."""
    grid, tile, window, stride = _TOY if session.smoke else _FULL
    shape = (1, 2, 384, 32) if session.smoke else (1, 24, grid[0] * grid[1] * grid[2], 128)
    for ordered in (True, False):
        case = {"grid": list(grid), "window": list(window), "stride": list(stride), "shape": list(shape)}
        case |= {"permutation": "in every call" if ordered else "once per model forward, not timed here"}
        yield session.attempt(case, _measured(session, shape, (grid, tile, window, stride), ordered))


def _measured(
    session: Session, shape: tuple[int, int, int, int], axes: tuple[Triple, Triple, Triple, Triple], ordered: bool
) -> Callable[[], Row]:
    def measured() -> Row:
        plan = window_plan(*axes, session.device, ordered=ordered)
        q, k, v = session.randn(shape, torch.bfloat16)
        timing = session.time(lambda: attend(q, k, v, plan))
        rates = session.rates(timing, dense_or_none(session, shape), attention_flops(shape), plan.density)
        return {"density": plan.density} | timing.row() | rates

    return measured
