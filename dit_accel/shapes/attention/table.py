"""The figures as Markdown, with what papers report beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...inspect.recorder import Record

DISTANCES = (0, 1, 2, 4, 8, 16, 32)  # of a profile that get a column
# What papers, or their code, say about the same things; none of them gives these very figures for its model.
PUBLISHED = (
    (
        "decay with distance",
        "exp(-a x frames - b x distance in space) fits with R² > 0.985",
        "Radial Attention, arXiv 2506.19852",
    ),
    (
        "pairs kept by distance alone",
        "28.7 % in Wan 2.1 14B (69 frames), 27.5 % in HunyuanVideo (117 frames), both 768x1280",
        "the rule and the settings of Radial Attention's code, computed by us",
    ),
    (
        "blocks kept for an estimated 95 % of the mass",
        "45.5 % in HunyuanVideo",
        "XAttention with tau 0.95, by a survey of May 2026",
    ),
    (
        "pairs kept for an estimated 90 % of the mass",
        "25.5 % in HunyuanVideo, 720p",
        "Sparse VideoGen 2 with top-p 0.9",
    ),
    (
        "recall of the top 20 % of blocks of 64",
        "heads above 80 % are concentrated enough to be made sparser still",
        "AdaSpa, arXiv 2502.21079",
    ),
    ("first frame", "kept for all queries in Wan, not in HunyuanVideo", "Radial Attention's code"),
    (
        "same frame, or same place in other frames",
        "for each head the better of two masks, one of each kind; 30 % of the pairs in Wan, 25 % in HunyuanVideo",
        "Sparse VideoGen's code",
    ),
    (
        "windows in images",
        "10 % of the keys (80x80 of 256x256 tokens): GenEval 0.5785, dense 0.5750; FLUX.1-dev, 9 of 28 steps dense",
        "Generalized Neighborhood Attention, arXiv 2504.16922",
    ),
)

Column = tuple[str, Callable[[Record], str]]


def attention_tables(report: Record) -> str:
    """Markdown tables of a report: its layers, then what papers report.

    Args:
        report: what ``python -m dit_accel.shapes.attention`` writes.
    """
    layers = report["layers"]
    parts = [_table(columns, layers) for columns in (_concentration(layers), *_locality(layers))]
    published = ["| | published | by |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in PUBLISHED)]
    return "\n\n".join([_heading(report), *parts, _notes(layers), "\n".join(published)]) + "\n"


def _heading(report: Record) -> str:
    settings, prompts = report["settings"], len(report["prompts"])
    size = " x ".join(str(settings[name]) for name in ("frames", "height", "width"))
    steps = ", ".join(str(step) for step in report["recorded_steps"])
    return (
        f"{settings['model']}, {prompts} held-out prompt{'s' if prompts > 1 else ''}, {size}, steps {steps} of"
        f" {settings['steps']}, blocks of {report['block']} tokens."
    )


def _name(layer: Record) -> str:
    return f"`{layer['path']}`"


def _concentration(layers: Sequence[Record]) -> list[Column]:
    columns: list[Column] = [
        ("layer", _name),
        ("grid", lambda layer: "x".join(str(side) for side in layer["grid"])),
        ("heads", lambda layer: str(layer["heads"])),
        ("recall of the top 10 % of blocks (heads)", lambda layer: _share(layer, "recall_10")),
        ("recall of the top 20 %", lambda layer: _percent(layer["recall_20"])),
        ("heads above 80 % there", lambda layer: _count(layer["concentrated_heads"])),
        ("density for 95 % of the mass (heads)", lambda layer: _share(layer, "density_95")),
    ]
    has_text = any(layer["text"] is not None for layer in layers)
    return [*columns, ("mass on text", lambda layer: _percent(layer["text"]))] if has_text else columns


def _locality(layers: Sequence[Record]) -> list[list[Column]]:
    """One table on distance in space, and for clips one on frames."""
    tables = [[("layer", _name), *_profile("space", "tokens", layers)]]
    if any(layer["frames"] for layer in layers):
        others: list[Column] = [
            ("first frame", lambda layer: _percent(layer["first_frame"])),
            ("same frame (heads)", lambda layer: _share(layer, "same_frame")),
            ("same place in other frames (heads)", lambda layer: _share(layer, "same_position")),
        ]
        tables.insert(0, [("layer", _name), *_profile("frames", "frames", layers), *others])
    return tables


def _profile(name: str, unit: str, layers: Sequence[Record]) -> list[Column]:
    longest = max((len(layer[name]["profile"]) for layer in layers if layer[name]), default=0)

    def weight(distance: int) -> Callable[[Record], str]:
        def cell(layer: Record) -> str:
            profile = layer[name]["profile"] if layer[name] else []
            return f"{profile[distance]:.2f}" if distance < len(profile) else "-"

        return cell

    def fit(layer: Record) -> str:
        found = layer[name]
        return f"{found['rate']:.2f} ({found['r_squared']:.2f})" if found and found["rate"] is not None else "-"

    columns = [
        (f"{distance} {unit}" if distance == 0 else str(distance), weight(distance))
        for distance in DISTANCES
        if distance < longest
    ]
    return [*columns, (f"rate per {unit[:-1]} (R²)", fit)]


def _notes(layers: Sequence[Record]) -> str:
    frames = max(layer["grid"][0] for layer in layers)
    lines = [
        "Weights by distance are relative to uniform attention, which has 1 everywhere, a recall of 10 % and 20 %, and"
        " a density of 95 %. The rate is that of the fitted exponential. Parentheses: the lowest and the highest head."
    ]
    if frames > 1:
        lines.append(
            f"Uniform attention gives the first frame and the same frame {1 / frames:.1%} each, and the same place in"
            f" other frames {(frames - 1) / max(layer['tokens'] for layer in layers):.1%}."
        )
    if any(layer["recall_10"] is None for layer in layers):
        lines.append("Layers of fewer than 10 blocks have no recall.")
    return " ".join(lines)


def _table(columns: Sequence[Column], layers: Sequence[Record]) -> str:
    rows = [[name for name, _ in columns], ["---"] * len(columns)]
    rows += [[cell(layer) for _, cell in columns] for layer in layers]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _share(layer: Record, name: str) -> str:
    if layer[name] is None:
        return "-"
    heads = layer["by_head"][name]
    return f"{_percent(layer[name])} ({_percent(min(heads))} to {_percent(max(heads))})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)
