"""``dit-accel simulate --method vmoba``: what a number of cells fixes; a threshold fixes nothing before it runs."""

from __future__ import annotations

import argparse
from typing import Any

from .errors import UsageError, one_line
from .plain import plain


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Cells and density of each partition, and their mean, since layers take turns.

    Raises:
        UsageError: if there are no numbers of cells, or the method refuses them.
    """
    if options.top_k is None:
        raise UsageError(
            "vmoba with a threshold chooses its cells in the queries and keys of each call, so its density is known "
            "only at run time (dit-accel render --attention vmoba reports it); give --top-k 3,20,15 to simulate "
            "numbers of cells"
        )
    from dit_accel.kernels.search.cells import grid_cells
    from dit_accel.plan.simulate import KERNEL_EFFICIENCY
    from dit_accel.plan.vmoba import top_k_density
    from dit_accel.processors.vmoba import PARTITIONS, VMoBAAttnProcessor

    try:
        processor = VMoBAAttnProcessor(select="top_k", scope="query", amount=options.top_k, block=options.block)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    length = options.grid[0] * options.grid[1] * options.grid[2] + options.text
    result: dict[str, Any] = {"method": "vmoba", "grid": "x".join(map(str, options.grid)), "tokens": length}
    result |= {"block": options.block, "text_tokens": options.text}
    least, most = [], []
    for partition, count in zip(PARTITIONS, processor.amount, strict=True):
        cell = processor.cell(partition, options.grid)
        cells = grid_cells(options.grid, cell, block_q=options.block, block_kv=options.block, length=length)
        low, high = top_k_density(cells, int(count))
        result |= {f"{partition}_cell": "x".join(map(str, cell)), f"{partition}_cells": cells.sizes.numel()}
        result |= {
            f"{partition}_top_k": count,
            f"{partition}_lowest_density": low,
            f"{partition}_highest_density": high,
        }
        least.append(low)
        most.append(high)
    density = {"lowest_density": sum(least) / 3, "highest_density": sum(most) / 3}
    assumptions = {
        "kernel_efficiency": KERNEL_EFFICIENCY,
        "formula": "kernel_efficiency / highest_density; blocks kept in part and the search are not in it",
        "scope": "layers by turns, --scope query; an upper bound, not measured",
    }
    speedup = {"predicted_speedup": KERNEL_EFFICIENCY / density["highest_density"]}
    prediction: dict[str, Any] = plain(result | density | speedup | {"assumptions": assumptions})
    return prediction
