"""Options of neighborhood attention, for ``render`` and ``simulate``, and its prediction."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .errors import UsageError, one_line
from .option import Option, option
from .plain import plain


def own_options(*, layers: bool = True) -> tuple[Option, ...]:
    """The options; ``layers`` for those that need several layers to differ."""
    words = ("widest", "alternate") if layers else ("widest",)
    return (
        option(
            "window",
            "keys of a query, 18x24x24 tokens or 0.6 of each side (default: 0.6)",
            type=per_axis(_number),
            metavar="N[xNxN]",
        ),
        option("stride", "queries that share a window, or tile", type=per_axis(int, "tile"), metavar="N[xNxN]"),
        option(
            "dilation",
            f"distance between keys, or {' or '.join(words)}",
            type=per_axis(int, *words),
            metavar="N[xNxN]",
        ),
        option("causal", "no later keys, such as 1x0x0 for frames", type=per_axis(_bit), metavar="B[xBxB]"),
        option("tile", "tokens of a tile (default: chosen)", type=per_axis(int), metavar="N[xNxN]"),
        option("snap", "compute all blocks that it touches whole", action="store_true"),
    )


def per_axis(number: Callable[[str], Any], *words: str) -> Callable[[str], Any]:
    """A converter for one value (``0.6``), one for each dimension (``18x24x24``), or one of some words."""
    accepted = "one number, or one for each dimension with x between, such as 2x8x8"

    def convert(text: str) -> Any:
        if text in words:
            return text
        try:
            values = [number(part) for part in text.lower().split("x")]
        except ValueError as error:
            either = f", or {' or '.join(words)}" if words else ""
            raise argparse.ArgumentTypeError(f"give {accepted}{either}, got {text!r}") from error
        return values[0] if len(values) == 1 else tuple(values)

    return convert


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Density and bounds of the plan.

    Raises:
        UsageError: if an option does not fit the grid.
    """
    from dit_accel.plan import simulate
    from dit_accel.plan.neighborhood import neighborhood_plan, shape_for
    from dit_accel.plan.tile_cost import simulation

    names = [each.name for each in own_options()]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    snap = {"snap": given.pop("snap", False)}
    try:
        shape = shape_for(options.grid, block=options.block, **given)
        exact = given | {"tile": shape.tile, "block": options.block}
        plan = neighborhood_plan(options.grid, **exact, **snap, after=options.text)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    prediction: dict[str, Any] = plain(
        {
            "method": "neighborhood",
            **{name: "x".join(str(int(n)) for n in value) for name, value in shape.details().items()},
            "tokens": plan.q_len,
            "text_tokens": options.text,
            "block": options.block,
            **snap,
            "density": plan.stats.density,
            "computed_share": simulate.computed_share(plan),
            "predicted_speedup": simulate.predicted_speedup(plan),
            **simulation(shape),
            "assumptions": simulate.assumptions(),
        }
    )
    return prediction


def _number(text: str) -> int | float:
    return int(text) if text.strip().isdecimal() else float(text)


def _bit(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"
