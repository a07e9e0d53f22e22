"""The block seam: asks, for each transformer block, whether to run it and with what result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .forward import wrap_forward

if TYPE_CHECKING:
    from ..clock import StepClock, StepState


@dataclass(frozen=True)
class BlockInfo:
    """Which block of which root.

    Attributes:
        path: name of the block within its root, such as ``"blocks.3"``.
        index: place of the block in execution order, from 0.
        count: number of blocks in the root.
        expert: attribute name of the root in its pipeline.
    """

    path: str
    index: int
    count: int
    expert: str


class BlockHook:
    """Base class of what acts on whole blocks; override :meth:`around`."""

    def around(self, block: BlockInfo, state: StepState, run: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        """Returns the block's output: that of ``run()``, which computes it, or a prediction of it.

        Args:
            block: which block.
            state: which step and branch.
            run: computes the block (and any hooks installed before this one) on the model's own inputs.
            arguments: those inputs, ``{"args": tuple, "kwargs": dict}``; their tokens are in the order that
                ``state.layout`` tells.
        """
        return run()


class BlockRecorder(BlockHook):
    """Records which blocks ran: :attr:`ran` lists ``(step, branch, expert, block index)`` in order."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, str, str, int]] = []

    def around(self, block: BlockInfo, state: StepState, run: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        """Runs the block and notes that it did."""
        self.ran.append((state.step, state.branch, block.expert, block.index))
        return run()


def wrap_block(
    module: nn.Module, info: BlockInfo, clock: StepClock, hooks: tuple[BlockHook, ...]
) -> Callable[[], None]:
    """Puts hooks around a block's forward; the first hook is outermost.

    Returns:
        a function that undoes it, leaving the module as it was found.
    """

    def around(run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = clock.state
        if state is None:  # the block was called outside its root
            return run()
        for hook in reversed(hooks):
            run = _step(hook, info, state, run, {"args": args, "kwargs": kwargs})
        return run()

    return wrap_forward(module, around)


def _step(
    hook: BlockHook, info: BlockInfo, state: StepState, run: Callable[[], Any], arguments: Mapping[str, Any]
) -> Callable[[], Any]:
    return lambda: hook.around(info, state, run, arguments)
