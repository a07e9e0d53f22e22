"""Who takes part in the table of methods, and by which setting each is brought to a density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...inspect.tuning import Knob, Options, knob_of
from ...kernels.token_order import morton_order, with_text
from ...processors import ATTENTION, SparseAttnProcessor, processor_by_name

if TYPE_CHECKING:
    import torch

    from ...install.permutation import OrderFor
    from ...layout import TokenLayout

EQUAL, PUBLISHED = "equal density", "as published"
ALIKE: Options = {"dense_steps": 0.24, "dense_layers": 1, "block": 64}  # of all that are compared at equal density


class Contender(NamedTuple):
    """A method with its settings.

    Attributes:
        name: of its row.
        method: a name of ``ATTENTION``.
        group: ``EQUAL`` or ``PUBLISHED``.
        options: its settings; others keep their defaults.
        knobs: what brings it to a density, the next one where those before do not reach it; none leaves it alone.
        order: token order of the whole model: ``"morton"``, ``"own"`` for that of the method's plan, or None.
    """

    name: str
    method: str
    group: str
    options: Options
    knobs: Sequence[Knob] = ()
    order: str | None = None

    def recipe(self, options: Options) -> SparseAttnProcessor:
        """The method with these settings beside its own.

        Raises:
            ValueError: if one of them is out of range.
        """
        return processor_by_name(self.method, **self.options | options)

    def order_for(self, recipe: SparseAttnProcessor) -> OrderFor | None:
        """The token order, as ``accelerate(token_order=...)`` takes it."""
        if self.order == "morton":
            return _morton
        return None if self.order is None else getattr(recipe, "token_order")  # noqa: B009, not every method has it


SPARSER: tuple[Options, ...] = ({}, {"mask": "element"}, {"mask": "element", "sink": False})
RADIAL = tuple(knob_of("radial")._replace(fixed=fixed) for fixed in SPARSER)  # the next one where decay does not reach

Row = tuple[str, str, Options, str | None]  # name, method, settings, token order
ROWS: tuple[Row, ...] = (
    ("radial", "radial", {}, None),
    ("neighborhood", "neighborhood", {}, None),
    ("neighborhood, own order", "neighborhood", {}, "own"),
    ("neighborhood, whole blocks", "neighborhood", {"snap": True}, "own"),
    ("vmoba", "vmoba", {}, None),
    ("adaspa", "adaspa", {}, None),
    ("adaspa, one dense step less", "adaspa", {"dense_steps": 0.19}, None),  # of 20: its search is dense
    ("adaspa, morton", "adaspa", {}, "morton"),
    ("adaspa, compensate", "adaspa", {"compensate": True}, None),
    ("block_routing", "block_routing", {}, None),
    ("block_routing, morton", "block_routing", {}, "morton"),
    ("block_routing, sub-blocks", "block_routing", {"score": "sub_block"}, None),
    ("block_routing, exact mass", "block_routing", {"score": "mass", "search_every": 4}, None),
    ("compensated", "compensated", {}, None),
    ("compensated, morton", "compensated", {}, "morton"),
    ("grid", "grid", {}, None),
    ("cluster", "cluster", {}, None),
    ("cluster, compensate", "cluster", {"compensate": True}, None),
    ("learned_gate", "learned_gate", {}, None),
)


def contenders(only: Sequence[str] = ()) -> list[Contender]:
    """All contenders, or those of these names.

    Raises:
        ValueError: for a name that nobody has.
    """
    equal = [
        Contender(name, method, EQUAL, _alike(method) | options, _knobs(method), order)
        for name, method, options, order in ROWS
    ]
    published = [Contender(f"{method}, published", method, PUBLISHED, {}) for method in ATTENTION]
    everyone = [*equal, *published]
    unknown = sorted({*only} - {each.name for each in everyone})
    if unknown:
        raise ValueError(
            f"nobody is called {', '.join(map(repr, unknown))}; choose among "
            + "; ".join(each.name for each in everyone)
        )
    return [each for each in everyone if not only or each.name in only]


def _knobs(method: str) -> Sequence[Knob]:
    return RADIAL if method == "radial" else [knob_of(method)]


def _alike(method: str) -> Options:
    """The common settings, as far as the method has them."""
    known = processor_by_name(method).settings()
    return {name: value for name, value in ALIKE.items() if name in known}


def _morton(layout: TokenLayout) -> torch.Tensor:
    start, stop = layout.visual
    return with_text(morton_order(layout.grid), before=start, after=layout.length - stop)
