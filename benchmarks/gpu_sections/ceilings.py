"""What this machine can do at best: a large matmul, cuDNN's dense attention, and torch's default choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .session import Row, Session, Timing, attention_flops


def run(session: Session) -> Iterator[Row]:
    """Rows with TFLOP/s; everything sparse is compared with the cuDNN rows."""
    shapes = [(1, 24, 32760, 128), (1, 24, 75600, 128), (1, 16, 16384, 64)]
    side, shapes = (64, [(1, 2, 256, 32)]) if session.smoke else (8192, shapes)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=session.device) for _ in range(2))
    yield session.attempt(
        {"what": "matmul", "size": side}, lambda: _row(session, session.time(lambda: a @ b), 2.0 * side**3)
    )
    for shape in shapes:
        for kind in ("cudnn", "default"):
            yield session.attempt(
                {"what": f"dense attention, {kind}", "shape": list(shape)}, _dense(session, shape, kind)
            )


def _dense(session: Session, shape: tuple[int, int, int, int], kind: str) -> Callable[[], Row]:
    return lambda: _row(session, session.dense(shape, torch.bfloat16, kind), attention_flops(shape))


def _row(session: Session, timing: Timing, flops: float) -> Row:
    return timing.row() | session.rates(timing, None, flops, 1.0)
