"""Block-sparse attention over sparsity, block sizes, head dims and kinds of plans, against cuDNN in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from dit_accel.kernels.attend import attend
from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.kernels.support import NAMES, Call, check, choose
from dit_accel.plan.radial import radial_plan

from .plans import random_plan, skewed_plan
from .session import Row, Session, Timing, attention_flops

_SPARSITIES = (0.8, 0.9, 0.5, 0.0)


@dataclass(frozen=True)
class Shape:
    """Heads, head dim, and a token grid with text behind it."""

    heads: int
    dim: int
    grid: tuple[int, int, int]
    text: int = 0

    @property
    def tokens(self) -> int:
        """Video and text."""
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text

    @property
    def bhsd(self) -> tuple[int, int, int, int]:
        """As attention sees it."""
        return (1, self.heads, self.tokens, self.dim)


# Wan at 480p and 720p and HunyuanVideo at 720p (heads of 24 throughout, as dense figures elsewhere have them); then
# head dim 64, where the exponential is the bottleneck.
SHAPES = (
    Shape(24, 128, (21, 30, 52)),
    Shape(24, 128, (21, 45, 80)),
    Shape(24, 128, (33, 45, 80), 256),
    Shape(16, 64, (16, 32, 32)),
    Shape(24, 64, (32, 32, 32)),
)
SMOKE_SHAPES = (Shape(2, 32, (3, 7, 9), 11),)


def run(session: Session) -> Iterator[Row]:
    """Rows with TFLOP/s on kept pairs and efficiency, the most telling blocks first."""
    blocks = ((32, 32), (32, 16)) if session.smoke else ((128, 128), (128, 64), (64, 64))
    shapes = SMOKE_SHAPES if session.smoke else SHAPES
    for block_q, block_kv in blocks:
        for shape in shapes:
            case = {"shape": list(shape.bhsd), "block": [block_q, block_kv]}
            for name, build in _plans(session.device, shape, block_q, block_kv).items():
                yield session.attempt(case | {"plan": name}, _measured(session, shape, build))
        if (block_q, block_kv) == blocks[0]:
            yield from _variants(session, shapes, block_q)
    shape, block = shapes[-1] if session.smoke else shapes[1], blocks[0][0]
    case = {"shape": list(shape.bhsd), "block": [block, block]}
    build = partial(skewed_plan, shape.tokens, shape.heads, 0.2, block, session.device)
    yield session.attempt(case | {"plan": "skewed 80%"}, _measured(session, shape, build))
    build = partial(random_plan, shape.tokens, shape.heads, 0.2, block, block, session.device)
    case |= {"plan": "random 80%", "layout": "heads before tokens in memory"}
    yield session.attempt(case, _measured(session, shape, build, heads_first=True))


def _variants(session: Session, shapes: tuple[Shape, ...], block: int) -> Iterator[Row]:
    """Each variant of the Triton kernel by name, or why it does not run here."""
    for name in (name for name in NAMES if name.startswith("triton:")):
        for shape in shapes:
            call = Call.of(*session.randn(shape.bhsd, torch.bfloat16), block, block)
            case = {"shape": list(shape.bhsd), "block": [block, block], "variant": name}
            if name in session.refused:
                yield case | {"skipped": session.refused[name]}
                continue
            if not (support := check(name, call)).ok:
                yield case | {"skipped": support.reason}
                continue
            for sparsity in (0.8, 0.9):
                density = 1.0 - sparsity
                build = partial(random_plan, shape.tokens, shape.heads, density, block, block, session.device)
                measured = _measured(session, shape, build, backend=name)
                yield session.attempt(case | {"plan": f"random {sparsity:.0%}"}, measured)


def _plans(device: torch.device, shape: Shape, block_q: int, block_kv: int) -> dict[str, Callable[[], SparsePlan]]:
    plans: dict[str, Callable[[], SparsePlan]] = {
        f"random {sparsity:.0%}": partial(
            random_plan, shape.tokens, shape.heads, 1.0 - sparsity, block_q, block_kv, device
        )
        for sparsity in _SPARSITIES
    }
    # Radial plans know square blocks only.
    if block_q == block_kv:
        radial = partial(radial_plan, shape.grid, block=block_q, text_tokens=shape.text, device=device)
        plans |= {"radial": radial, "radial, blocks cut": partial(radial, mask="element")}
    return plans


def _measured(
    session: Session,
    shape: Shape,
    build: Callable[[], SparsePlan],
    heads_first: bool = False,
    backend: str = "auto",
) -> Callable[[], Row]:
    def measured() -> Row:
        plan = build()
        q, k, v = session.randn(shape.bhsd, torch.bfloat16)
        if heads_first:
            q, k, v = (t.contiguous() for t in (q, k, v))
        timing = session.time(lambda: attend(q, k, v, plan, backend=backend))
        call = Call.of(q, k, v, plan.block_q, plan.block_kv, all_full=plan.pair_test is None)
        used = choose(call) if backend == "auto" else check(backend, call)
        row = {"density": plan.density, "backend": used.backend, "kernel": used.variant} | timing.row()
        return row | session.rates(
            timing, dense_or_none(session, shape.bhsd), attention_flops(shape.bhsd), plan.density
        )

    return measured


def dense_or_none(session: Session, shape: tuple[int, int, int, int], kind: str = "cudnn") -> Timing | None:
    """The dense time to compare with; None where cuDNN does not run, which the ceilings say."""
    try:
        return session.dense(shape, torch.bfloat16, kind)
    except RuntimeError:
        return None
