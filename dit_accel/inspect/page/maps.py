"""The section of the report that is pictures: who attends to whom, and what the methods keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean

from torch import Tensor

from ..inspection import Pictures
from ..recorder import Record
from .layout import Section, breakable, folded, scrolling
from .pictures import MOST, mask_image, mass_image
from .tables import ramp_legend
from .words import layer_code, layer_name


def maps(report: Record, pictures: Mapping[tuple[str, str], Pictures]) -> Section:
    """Small pictures of attention and of what the methods keep, layer by layer."""
    layers = report["layers"]
    parts = [
        folded(_summary(layer, layers), _layer_maps(layer, layers, pictures[layer["expert"], layer["path"]]), is_open)
        for layer, is_open in zip(layers, [True, *[False] * len(layers)], strict=False)
    ]
    scales = ramp_legend("Attention, times uniform", f"1/{MOST:g}", f"{MOST:g}", "1")
    kept = ramp_legend("Pairs computed", "none", "all") if any(layer["methods"] for layer in layers) else ""
    return Section(
        "Maps",
        "<p>Each picture has queries from top to bottom and keys from left to right, visual tokens in order of "
        "frames. A row of pictures is a head: its attention, on a logarithmic scale, and the pairs that each method "
        "computes, the percentage being their density. All are means over the calls that were looked at.</p>"
        f"<div class='scales'>{scales}{kept}</div>{''.join(parts)}",
    )


def _summary(layer: Record, layers: Sequence[Record]) -> str:
    won = Counter(name for name in layer["best"] if name is not None).most_common()
    best = ", ".join(f"{name} {count}" for name, count in won)
    return layer_code(layer, layers) + (f"<small>best for its heads: {escape(best)}</small>" if best else "")


def _layer_maps(layer: Record, layers: Sequence[Record], pictures: Pictures) -> str:
    """A table: a row for each head, attention first and then each method."""
    path, heads = layer_name(layer, layers), range(layer["heads"])
    columns = [_column(f"Attention, {path}", pictures.mass, mass_image, len(heads))]
    names = ["attention"]
    for name, figures in layer["methods"].items():
        picture = pictures.masks[name]
        columns.append(_column(f"What {name} keeps, {path}", picture, mask_image, len(heads)))
        names.append(f"{breakable(name)}<small>{fmean(figures['density']):.0%}</small>")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    cells = ["".join(column[number] for column in columns) for number in heads]
    rows = "".join(f'<tr><th scope="row">head {number}</th>{row}</tr>' for number, row in enumerate(cells))
    table = f'<table class="maps"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return scrolling(f"Maps of {path}", table)


def _column(title: str, pictures: Tensor, image: Callable[[Tensor], str], heads: int) -> list[str]:
    """A cell for each head; one picture for all of them takes all rows."""
    if len(pictures) == 1 and heads > 1:
        picture = _picture(image(pictures[0]), f"{title}, all heads")
        return [f'<td rowspan="{heads}">{picture}<small>all heads</small></td>', *[""] * (heads - 1)]
    return [f"<td>{_picture(image(picture), f'{title}, head {head}')}</td>" for head, picture in enumerate(pictures)]


def _picture(address: str, words: str) -> str:
    return f'<img src="{address}" alt="{escape(words)}" title="{escape(words)}" loading="lazy">'
