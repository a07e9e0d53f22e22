"""What it costs to look at q and k and choose blocks, against the attention call that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dit_accel.kernels.attend import attend
from dit_accel.kernels.search.plan import count_density, dynamic_plan

from .forward import SHAPES, SMOKE_SHAPES, Shape
from .session import Row, Session

_KEPT = 0.15


def run(session: Session) -> Iterator[Row]:
    """Rows with the times of planning and of attention, and their ratio `overhead`."""
    shapes, block = (SMOKE_SHAPES, 32) if session.smoke else ((SHAPES[1], SHAPES[2], SHAPES[4]), 128)
    rules: list[dict[str, Any]] = [
        {"score": "pooled", "keep": "topk", "amount": _KEPT},
        {"score": "pooled", "keep": "topp", "amount": 0.9},
        {"score": "lse", "keep": "topk", "amount": _KEPT},
        {"score": "mass", "keep": "topk", "amount": _KEPT},
    ]
    for shape in shapes:
        for rule in rules:
            case = {"shape": list(shape.bhsd), "block": block} | rule
            yield session.attempt(case, _measured(session, shape, block, rule))


def _measured(session: Session, shape: Shape, block: int, rule: dict[str, Any]) -> Callable[[], Row]:
    def measured() -> Row:
        q, k, v = session.randn(shape.bhsd, torch.bfloat16)
        # The search takes [batch, tokens, heads, dim].
        q_tokens, k_tokens = q.transpose(1, 2), k.transpose(1, 2)

        def build() -> Any:
            return dynamic_plan(q_tokens, k_tokens, block_q=block, block_kv=block, **rule)

        plan = build()
        planning = session.time(build)
        attention = session.time(lambda: attend(q, k, v, plan))
        row: Row = {"density": count_density(plan).density, "planning": planning.row(), "attention": attention.row()}
        return row if session.smoke else row | {"overhead": round(planning.p50 / attention.p50, 4)}

    return measured
