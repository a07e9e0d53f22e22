"""The attention methods of the command line, and the options of each: the one place that lists them."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from . import neighborhood
from .option import Option, option, switch
from .values import (
    NONE,
    amounts,
    dense_layers,
    dense_steps,
    early_and_later,
    grid,
    patch,
    real,
    schedule,
    seed_or_even,
    steps,
    whole,
    whole_or_grid,
    wholes,
)


class Method(NamedTuple):
    """What a method can be told, besides what all can.

    Attributes:
        summary: what it keeps, in a few words.
        own: options of this method alone.
        shared: names of :data:`SHARED` options that it has.
    """

    summary: str
    own: tuple[Option, ...]
    shared: tuple[str, ...] = ()


above_0 = real(0, above=True)

COMMON = (
    option("block", "size of the blocks kept or skipped", type=whole(1), metavar="TOKENS"),
    option("dense_steps", "first steps (12, or 0.25 of all) dense", type=dense_steps, metavar="N"),
    option("dense_layers", "first layers, or a list (0,3 or 3,), dense", type=dense_layers, metavar="N"),
    option("schedule", "both of these, and budgets by step, layer and head", type=schedule, metavar="JSON"),
    option("backend", "kernels to use (default: auto)", choices=["auto", "triton", "gather", "reference"]),
)
AUTO = ("dense_steps", "dense_layers", "backend")  # those that every method has
SHARED = {
    each.name: each
    for each in (
        option("density", "part of all blocks to keep, in (0, 1]", type=above_0, metavar="PART"),
        option("select", "which blocks or cells are kept", choices=["top_k", "top_p", "threshold"]),
        option(
            "amount",
            "how many, in the unit of --select; vmoba: or three (3,20,15), by partition",
            type=amounts,
            metavar="N",
        ),
        switch("first_frame", "whether all see the first frame; grid: heads that look within frames"),
        option(
            "boundaries",
            "blocks that hold parts of several cells or clusters; vmoba: cut or keep, cluster: keep or exact",
            choices=["cut", "keep", "exact"],
        ),
        option("search_every", "steps between searches", type=whole(1), metavar="N"),
        switch("compensate", "whether blocks left out count by their means"),
    )
}
_RADIAL = (
    option("decay", "how fast the kept width shrinks", type=above_0, metavar="FACTOR"),
    option("rule", "the code's mask, or the paper's", choices=["authors", "paper"]),
    option("mask", "mask whole blocks, or single tokens", choices=["block", "element"]),
    switch("sink", "whether all see the first frame"),
)
_ADASPA = (
    switch("levels", "whether heads with recall to spare give blocks to others"),
    option("recall", "part of the softmax to keep, for --density", type=above_0, metavar="PART"),
    option("recall_over", "who reaches it", choices=["row", "head"]),
    option("min_density", "part of all blocks that --recall keeps at least", type=real(0), metavar="PART"),
    option("max_density", "part that it keeps at most", type=above_0, metavar="PART"),
    option("search_again", "later searches (30, or 0.6 of all)", type=steps, metavar="N,N"),
    option("drift", "search if means of blocks turned so far (1 - cosine)", type=above_0, metavar="N"),
    switch("cache_lse", "whether it uses the row sums of before"),
)
_BLOCK_ROUTING = (
    option("score", "what a block is judged by", choices=["pooled", "sub_block", "mass"]),
    option("head_shared", "one list of blocks for all heads", action="store_true"),
)
_COMPENSATED = (
    option("tau", "standard deviations that exact blocks stand out by", type=float, metavar="N"),
    option("variance", "how the deviation is found", choices=["diag", "exact"]),
    option("morton", "blocks along Morton's curve", action="store_true"),
)
_CLUSTER = (
    option("top_p", "part of its mass that a cluster of queries keeps (default: 0.9)", type=above_0, metavar="PART"),
    option("min_kc_ratio", "part of the key clusters that it keeps at least (0.1)", type=real(0), metavar="PART"),
    option("q_clusters", "clusters of queries (default: by length)", type=whole(1), metavar="N"),
    option("k_clusters", "clusters of keys (default: by length)", type=whole(1), metavar="N"),
    option("first_iterations", "rounds of k-means in a first search (10)", type=whole(1), metavar="N"),
    option("iterations", "rounds in later searches (2)", type=whole(1), metavar="N"),
)
_VMOBA = (
    option("chunk", "frames of a chunk, for every third layer", type=whole(1), metavar="N"),
    option("patch", "patches over all frames, the next layer", type=patch, metavar="HxW"),
    option("cube", "cubes, the layer after that", type=grid, metavar="FxHxW"),
    option("scope", "among whose cells to choose", choices=["query", "cell", "head", "all"]),
)
_AGENT = (
    option("mode", "merge similar tokens (UNets), or pool queries (others)", choices=["auto", "merge", "pool"]),
    option("cell", "merge: side of the squares of tokens (4,2)", type=early_and_later(whole(1)), metavar="N[,N]"),
    option(
        "merge", "merge: part of the tokens merged away (0.4)", type=early_and_later(real(0)), metavar="PART[,PART]"
    ),
    option(
        "agent_ratio", "merge: the same for agents (0.95,0.5)", type=early_and_later(real(0)), metavar="PART[,PART]"
    ),
    option("switch", "merge: where later steps begin (20, or 0.4 of all)", type=dense_steps, metavar="N"),
    option("max_downsample", "coarsest level of a UNet that takes part", type=int, choices=[1, 2, 4, 8]),
    switch("random", "merge: whether tokens are drawn, or each square's first taken"),
    option("draw_seed", "merge: of these draws (0)", type=whole(0), metavar="N", setting="seed"),
    option("agents", "pool: tile of an agent, or how many at most (1x2x4)", type=whole_or_grid, metavar="FxHxW|N"),
    option("second_scale_power", "power of the scale of scores with agents (0.3)", type=above_0, metavar="N"),
    option("shortcut", "part of the values added (merge: 0.075, pool: 0)", type=real(0), metavar="PART"),
)
_GRID = (
    option("pattern", "space or time, or lines at equal distances", choices=["spatial_temporal", "stride"]),
    option("probe_rows", "queries that are asked (64)", type=whole(1), metavar="N"),
    option(
        "probe_seed",
        "of their draw (0), or even: spread over the video",
        type=seed_or_even,
        metavar="N|even",
        setting="seed",
    ),
    option("multiples", "stride: of a row and a frame, that are tried (1,2)", type=wholes, metavar="N,N"),
)
_LEARNED_GATE = (
    option("gates", "file of dit-accel train-gate, or a shipped model (shapes-wan)", metavar="FILE"),
    option(
        "threshold", "for --density: least part of the gate's softmax, such as 0.002", type=above_0, metavar="PART"
    ),
)
_SEARCHES = ("search_every", "compensate")
_SELECTS = ("select", "amount")
METHODS = {
    "radial": Method("blocks near in time and space", _RADIAL),
    "neighborhood": Method("a window around each token", neighborhood.own_options()),
    "adaspa": Method("blocks of most exact mass, found twice", _ADASPA, ("density", "compensate")),
    "block_routing": Method("blocks that score best", _BLOCK_ROUTING, (*_SELECTS, "first_frame", *_SEARCHES)),
    "compensated": Method("blocks that stand out, and means of the rest", _COMPENSATED, ("density", *_SEARCHES)),
    "cluster": Method("clusters of tokens that attend alike", _CLUSTER, ("density", "boundaries", *_SEARCHES)),
    "vmoba": Method("cells of the video, by turns over the layers", _VMOBA, (*_SELECTS, "boundaries", *_SEARCHES)),
    "agent": Method("everything, through a few agent tokens", _AGENT),
    "grid": Method("a mask for each head: space, time or lines", _GRID, ("density", "first_frame", *_SEARCHES)),
    "learned_gate": Method("blocks that a trained gate rates highest", _LEARNED_GATE, ("density", *_SEARCHES)),
}
CHOICES = (*METHODS, "auto", "dense")


def options_of(choice: str) -> tuple[Option, ...]:
    """All options that go with one of :data:`CHOICES`."""
    if choice == "dense":
        return ()
    if choice == "auto":
        return tuple(each for each in COMMON if each.name in AUTO)
    method = METHODS[choice]
    return (*COMMON, *(SHARED[name] for name in method.shared), *method.own)


def all_options() -> tuple[Option, ...]:
    """Those of every method, each once."""
    return (*COMMON, *SHARED.values(), *(each for method in METHODS.values() for each in method.own))


def given_options(options: argparse.Namespace) -> list[Option]:
    """Those that were given."""
    return [each for each in all_options() if getattr(options, each.name) is not None]


def given_settings(options: argparse.Namespace, given: list[Option]) -> dict[str, Any]:
    """The same as settings of the method, by the names of its constructor."""
    values = {each.setting or each.name: getattr(options, each.name) for each in given}
    return {name: None if value is NONE else value for name, value in values.items()}


def add_arguments(parser: argparse.ArgumentParser, usual: str = "radial; beside a feature cache, dense") -> None:
    """Declares all of them: what all methods have, what several have, and a group for each method.

    Args:
        parser: of a command.
        usual: what the help says of attention that is not named.
    """
    common = parser.add_argument_group("attention")
    common.add_argument("--attention", choices=CHOICES, help=f"(default: {usual})")
    common.add_argument(
        "--preset", metavar="NAME", help="published settings: a name, none, or auto, those for the model (default)"
    )
    for each in COMMON:
        each.add_to(common)
    several = parser.add_argument_group("attention, settings of several methods")
    for name, each in SHARED.items():
        owners = ", ".join(method for method, facts in METHODS.items() if name in facts.shared)
        each.add_to(several, after=f" [{owners}]")
    for name, method in METHODS.items():
        group = parser.add_argument_group(f"--attention {name}", method.summary)
        for each in method.own:
            each.add_to(group)
