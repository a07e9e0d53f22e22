"""What goes through a transformer block: the tensors it is given and returns, so that somebody may stand in for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .registry import Family

Modulated = Callable[[Any, Mapping[str, Any], nn.Module, Mapping[str, Any]], Tensor]
"""``(root, arguments of the root, first block, arguments of the block) -> tensor``; see ``Family.modulated``."""


@dataclass(frozen=True)
class BlockStreams:
    """The streams of the blocks in one list: tensors that every block takes and returns, changed.

    Attributes:
        names: in the order in which a block returns them. The parameters of its forward have the same names, in any
            order. ``"hidden_states"`` is the stream of the video or image tokens.
        bare: whether a block returns its one stream as it is, not in a tuple.

    Raises:
        ValueError: no names, a name twice, or several for a bare tensor.
    """

    names: tuple[str, ...]
    bare: bool = False

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"streams are one or more different parameters of the block's forward; got {self.names}")
        if self.bare and len(self.names) != 1:
            raise ValueError(f"a bare tensor is one stream; got the names {self.names}")


def streams_of(family: Family, path: str) -> BlockStreams:
    """The streams of the block at ``path``, such as ``"blocks.3"``.

    Raises:
        ValueError: if the family does not say.
    """
    name = path.partition(".")[0]
    if name not in family.block_streams:
        known = ", ".join(sorted(family.block_streams)) or "nothing"
        raise ValueError(
            f"the blocks in {family.root_class}.{name} cannot be skipped: its family says what blocks take and return "
            f"for {known}; cache single modules or the output, or register the family with block_streams"
        )
    return family.block_streams[name]


def block_arguments(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a block was called with, by the names of its class's forward; defaults that were not given are left out.

    Raises:
        TypeError: if the forward takes no such arguments.
    """
    bound = _signature(block).bind(block, *args, **kwargs).arguments
    bound.pop("self", None)
    return bound


def read_streams(
    block: nn.Module, streams: BlockStreams, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, ...]:
    """The streams that enter a block, in the order of ``streams.names``.

    Args:
        block: the block itself; what its class's forward takes is looked at, so that hooks on it do not matter.
        streams: of the list that it belongs to.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        each ``[batch, tokens, channels]``; None where the call gave none.

    Raises:
        ValueError: if the forward has no parameter of that name.
    """
    parameters = _signature(block).parameters
    absent = [name for name in streams.names if name not in parameters]
    if absent:
        raise ValueError(
            f"{type(block).__name__}.forward has no parameter {', '.join(absent)}; name the streams as it does: "
            f"{', '.join(list(parameters)[1:])}"
        )
    found = block_arguments(block, args, kwargs)
    return tuple(found.get(name) for name in streams.names)


def pack_streams(streams: BlockStreams, values: Sequence[Tensor | None]) -> Any:
    """What a block would return whose streams come out as ``values``, in the order of ``streams.names``.

    Raises:
        ValueError: for another number of values.
    """
    if len(values) != len(streams.names):
        raise ValueError(f"{len(values)} values do not fill the streams {streams.names}; give one for each")
    return values[0] if streams.bare else tuple(values)


def unpack_streams(streams: BlockStreams, output: Any) -> tuple[Tensor | None, ...]:
    """The streams that leave a block, from what it returned; the counterpart of :func:`pack_streams`.

    A stream may end: the last block of Stable Diffusion 3 returns None for the text.

    Raises:
        ValueError: if the block returned something else than its family says.
    """
    if streams.bare:
        values: tuple[Any, ...] = (output,)
    else:
        values = tuple(output) if isinstance(output, (tuple, list)) else ()
    if len(values) != len(streams.names) or not all(value is None or isinstance(value, Tensor) for value in values):
        wanted = "a tensor" if streams.bare else f"a tuple of {len(streams.names)} tensors"
        raise ValueError(f"a block should return {wanted} for {', '.join(streams.names)}; got {_describe(output)}")
    return values


def modulated_input(
    family: Family,
    root: nn.Module,
    arguments: Mapping[str, Any],
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str = "default",
) -> Tensor:
    """The signal that tells, before the first block runs, how much a call differs from the one before.

    Args:
        family: of the root.
        root: the model.
        arguments: bound arguments of its forward.
        block: its first block.
        args: positional arguments of that block.
        kwargs: keyword arguments of that block.
        name: which signal, among ``family.modulated``.

    Raises:
        ValueError: if the family has no such signal.
    """
    if name not in family.modulated:
        known = ", ".join(repr(each) for each in family.modulated) or "none"
        raise ValueError(
            f"{family.root_class} has no modulated input {name!r} to look at; it has: {known}. Take a policy that "
            "looks at something else, or register the family with modulated"
        )
    return family.modulated[name](root, arguments, block, block_arguments(block, args, kwargs))


def _signature(block: nn.Module) -> inspect.Signature:
    """Of the forward of the block's class: hooks on the instance may hide its own."""
    kind: Any = type(block)  # mypy does not take a module's class for hashable
    found: inspect.Signature = _signature_of(kind)
    return found


@functools.cache
def _signature_of(block_class: Any) -> inspect.Signature:
    return inspect.signature(block_class.forward)


def _describe(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {', '.join(type(part).__name__ for part in output) or 'nothing'}"
    return type(output).__name__
