"""The whole search as one torch operator, for compiled code.

Compiled code then chooses the very blocks that eager code does (fused scores would round otherwise, and ties fall the
other way), and a search that loops over strips of scores stays one node of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .always import Ranges

# Spelled out, since older torch releases do not read postponed annotations such as `Tensor | None`.
_SCHEMA = (
    "(Tensor q, Tensor k, int block_q, int block_kv, str score, str keep, float amount, bool is_count, "
    "Tensor? amounts, Tensor? always, int[] always_q, int[] always_kv, int minimum, int? stride, "
    "str? variance, float? scale, Tensor? lse, str backend, int width) -> (Tensor, Tensor)"
)


@torch.library.custom_op("dit_accel::search_lists", mutates_args=(), schema=_SCHEMA)
def search_lists(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_kv: int,
    score: str,
    keep: str,
    amount: float,
    is_count: bool,
    amounts: Tensor | None,
    always: Tensor | None,
    always_q: list[int],
    always_kv: list[int],
    minimum: int,
    stride: int | None,
    variance: str | None,
    scale: float | None,
    lse: Tensor | None,
    backend: str,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Runs `dynamic_plan`; use that, it turns to this operator by itself while it is being compiled.

    Args:
        q: As there, and all arguments that are not listed here.
        k: As there.
        block_q: As there.
        block_kv: As there.
        score: As there.
        keep: As there.
        amount: Its number, unused if `amounts` is given.
        is_count: Whether that number is an int.
        amounts: Its tensor, or None.
        always: As there.
        always_q: Starts and stops of its ranges in turn.
        always_kv: Likewise.
        minimum: As there.
        stride: As there.
        variance: As there.
        scale: As there.
        lse: As there.
        backend: As there.
        width: Width of the lists, which follows from the other arguments.

    Returns:
        `indices` and `counts` of the plan.
    """
    from .plan import dynamic_plan

    options: dict[str, Any] = {"score": score, "keep": keep, "stride": stride, "variance": variance, "scale": scale}
    plan = dynamic_plan(
        q,
        k,
        block_q=block_q,
        block_kv=block_kv,
        amount=amounts if amounts is not None else int(amount) if is_count else amount,
        always=always,
        always_q=_pairs(always_q),
        always_kv=_pairs(always_kv),
        minimum=minimum,
        lse=lse,
        backend=backend,
        **options,
    )
    assert plan.indices.shape[-1] == width  # else the compiled graph would read past the lists
    return plan.indices, plan.counts


@search_lists.register_fake
def _(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_kv: int,
    score: str,
    keep: str,
    amount: float,
    is_count: bool,
    amounts: Tensor | None,
    always: Tensor | None,
    always_q: list[int],
    always_kv: list[int],
    minimum: int,
    stride: int | None,
    variance: str | None,
    scale: float | None,
    lse: Tensor | None,
    backend: str,
    width: int,
) -> tuple[Tensor, Tensor]:
    rows = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    return q.new_empty(*rows, width, dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


def compiled_lists(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_kv: int,
    score: str,
    keep: str,
    amount: float | Tensor,
    always: Tensor | None,
    always_q: Ranges,
    always_kv: Ranges,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Calls the operator with the arguments of `dynamic_plan`, in its order, and the width of the lists.

    Returns:
        `indices` and `counts` of the plan.
    """
    number, amounts = (0.0, amount) if isinstance(amount, Tensor) else (float(amount), None)
    numbers = (block_q, block_kv, score, keep, number, isinstance(amount, int), amounts)
    flat_q, flat_kv = ([int(edge) for pair in ranges for edge in pair] for ranges in (always_q, always_kv))
    lists: tuple[Tensor, Tensor] = search_lists(q.detach(), k.detach(), *numbers, always, flat_q, flat_kv, *rest)
    return lists


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
