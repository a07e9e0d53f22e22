"""The block lists that the authors of ProfilingDiT ship with their code (arXiv 2504.03140)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A list as it was published.

    Attributes:
        root_class: the transformer it is for.
        layers: blocks of that transformer.
        blocks: background blocks, in execution order.
        boundary: index of the first block of a second stack, which no run crosses; None for one stack.
        computed: steps at which the blocks behind the boundary (all without one) run in full, of ``steps``; None for a
            uniform interval.
        steps: sampling steps that ``computed`` was made for.
        source: where it is from.
    """

    root_class: str
    layers: int
    blocks: tuple[int, ...]
    boundary: int | None
    computed: tuple[int, ...] | None
    steps: int
    source: str


DENSE_STEPS = 6
INTERVAL = 6
STEPWISE = (6, 18, 26, 32, 38, 42, 46, 48)
_DOUBLE = 20  # double-stream blocks of HunyuanVideo, which come first
_SINGLE = (0, 2, *range(4, 8), *range(10, 22), 23, *range(25, 28), 31, 33)

PUBLISHED = {
    "wan2.1-14b": Published(
        "WanTransformer3DModel",
        40,
        (0, *range(2, 8), *range(10, 21), *range(25, 33), 37, 38),
        None,
        None,
        50,
        "code of ProfilingDiT, Wan2.1 14B, uniform interval 6",
    ),
    "hunyuan-video": Published(
        "HunyuanVideoTransformer3DModel",
        60,
        (*range(6, 20), *(_DOUBLE + block for block in _SINGLE)),
        _DOUBLE,
        STEPWISE,
        50,
        "code of ProfilingDiT, HunyuanVideo: double blocks 6 to 19 every 6 steps, single blocks stepwise",
    ),
}


def published(name: str) -> Published:
    """A list by name.

    Raises:
        ValueError: for an unknown name, with those there are.
    """
    if name not in PUBLISHED:
        raise ValueError(
            f"no block list is published as {name!r}; there are {', '.join(PUBLISHED)}; or give a profile"
        )
    return PUBLISHED[name]


def published_for(root_class: str, layers: int) -> str | None:
    """The name of the list for a model; None without one."""
    return next((name for name, of in PUBLISHED.items() if (of.root_class, of.layers) == (root_class, layers)), None)
