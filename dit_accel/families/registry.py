"""What we know about a model: a dozen lines of facts per root class, and no code of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from .streams import BlockStreams, Modulated


class UnknownModelError(ValueError):
    """The root class of a model is not registered."""


def _same_layout(root: Any, path: str, layout: TokenLayout) -> TokenLayout:
    return layout


def _no_padding(root: Any, arguments: Mapping[str, Any]) -> int | None:
    return None


Take = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class TokenStream:
    """Where a root's tokens can be put into another order once per call, around all of its blocks.

    From the makers to the exit the model must treat tokens alike but for what the makers make.

    Attributes:
        makers: paths of the modules whose outputs hold something for each token: the tokens themselves, rotary tables,
            modulation by token. Each function gets the output and ``take(tensor, axis)``, which permutes an axis, and
            returns the output with every such axis permuted.
        exit: path of the module whose output, ``[batch, tokens, channels]``, is put back.
    """

    makers: Mapping[str, Callable[[Any, Take], Any]]
    exit: str


@dataclass(frozen=True)
class Family:
    """The facts about one root class.

    Attributes:
        root_class: name of the transformer or UNet class; subclasses match too.
        layout: reads the token layout from the root module and its bound forward arguments.
        site_kind: tells from its path and module what an attention module is: ``"self"``, ``"cross"``, ``"joint"`` or
            ``"temporal"``; None for modules that must stay stock (text refiners, audio).
        block_lists: attribute names of the module lists whose members are the blocks, in execution order; a module
            that is no list counts as one block.
        pipeline_roots: attribute names under which a pipeline holds roots of this class.
        makes_video: whether its grids may have several frames; methods that live on these refuse other families.
        text_first: whether text tokens come before those of the video or image where both attend jointly.
        site_layout: tells where the query tokens of an attention module are, from the root, the module's path and the
            layout of the root's tokens; by default it is the root's.
        padding: how many tokens at the end of the sequence are hidden by the mask that all sites of a call are given,
            from the root and its bound forward arguments; the layout counts them as text. None if there is no mask,
            or one that differs in the batch or hides other tokens. What hidden tokens see must reach no other token.
        token_stream: where its tokens can be permuted once per call; None where they cannot.
        block_streams: by block list, the tensors that its blocks take and return; without it blocks of that list
            cannot be skipped. UNets have none, since their blocks return other tensors than they take.
        modulated: by name, what tells before the first block runs how much a call differs from the one before, from
            the root, its bound arguments, the first block and the block's bound arguments. ``"default"`` is what
            TeaCache (arXiv 2411.19108) looks at in this model; it may wait for nothing and must not change anything.
        mlp_names: last part of the paths of the feed-forward modules in the blocks, such as ``"ff"``. Where attention
            and feed-forward share a projection (single blocks), there is no such module.
    """

    root_class: str
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    site_kind: Callable[[str, nn.Module], str | None]
    block_lists: tuple[str, ...]
    pipeline_roots: tuple[str, ...] = ("transformer", "transformer_2")
    makes_video: bool = True
    text_first: bool = False
    site_layout: Callable[[Any, str, TokenLayout], TokenLayout] = _same_layout
    padding: Callable[[Any, Mapping[str, Any]], int | None] = _no_padding
    token_stream: TokenStream | None = None
    block_streams: Mapping[str, BlockStreams] = field(default_factory=dict)
    modulated: Mapping[str, Modulated] = field(default_factory=dict)
    mlp_names: tuple[str, ...] = ()


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Makes a model known; a later registration of the same class replaces the earlier one."""
    _FAMILIES[family.root_class] = family
    return family


def family_of(root: nn.Module) -> Family:
    """The facts about a root module.

    Raises:
        UnknownModelError: if neither its class nor a base class is registered; the message shows how to add one.
    """
    for base in type(root).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    raise UnknownModelError(
        f"{type(root).__name__} is not a model dit_accel knows; known: {', '.join(sorted(_FAMILIES))}. "
        f"Describe it with dit_accel.families.register_family(Family(root_class={type(root).__name__!r}, layout=..., "
        "site_kind=..., block_lists=...)); CONTRIBUTING.md shows an example."
    )


def is_known(root: object) -> bool:
    """Whether the class of an object, or one of its bases, is registered."""
    return any(base.__name__ in _FAMILIES for base in type(root).__mro__)
