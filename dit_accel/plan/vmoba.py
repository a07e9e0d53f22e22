"""What a top-k of VMoBA's cells keeps, as far as the grid says before queries and keys are known."""

from __future__ import annotations

from dit_accel.kernels.search.cells import Cells


def top_k_density(cells: Cells, count: int) -> tuple[float, float]:
    """The least and the greatest density that `count` cells for each query can come to (arXiv 2506.23858).

    Each block of queries keeps the cells of its tokens, and others up to `count`: the smallest or the largest ones.
    The two are equal where all cells are.  Holds for lists that end at cells (`grid_cells(cut=True)`), scope "query".

    Args:
        cells: Of a grid, with the tokens of the whole sequence.
        count: Cells for each query, its own included.

    Returns:
        Kept pairs over all pairs, text included.

    Raises:
        ValueError: A count below 1.
    """
    if count < 1:
        raise ValueError(f"A query keeps at least its own cell, so top_k is 1 or more; got {count}.")
    length = cells.order.numel()
    rest = length - cells.tokens
    sizes = cells.sizes.double().expand(cells.own.shape)
    others = (count - cells.own.sum(-1)).clamp(0)
    own_tokens = (sizes * cells.own).sum(-1)
    results = []
    for largest in (False, True):
        # Own cells are put behind all others, and count nothing again.
        ranked = sizes.masked_fill(cells.own, -1.0 if largest else float("inf")).sort(-1, descending=largest).values
        ranked = ranked.masked_fill((ranked < 0) | ranked.isinf(), 0)
        first = (ranked.cumsum(-1) * (others[:, None] > 0)).gather(
            -1, (others[:, None] - 1).clamp(0, sizes.shape[1] - 1)
        )
        keys = own_tokens + first[:, 0] + rest
        if rest:
            keys[cells.tokens // cells.block_q :] = length
        results.append(float((keys * cells.queries).sum() + rest * length) / length**2)
    return results[0], results[1]
