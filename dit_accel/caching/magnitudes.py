"""Calibration of MagCache: records how large the residual of all blocks is at each step of a dense run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..families import family_of
from ..families.streams import read_streams, streams_of, unpack_streams
from ..install.blocks import BlockHook, BlockInfo
from ..roots import find_roots
from .policies.magnitude import magnitude_ratios, token_norms

if TYPE_CHECKING:
    from ..clock import StepState

_MAIN = "hidden_states"


class MagnitudeRecorder(BlockHook):
    """Measures a model while it runs dense, for the preset ``magcache``.

    ::

        recorder = MagnitudeRecorder(pipe)
        with dit_accel.accelerate(pipe, block_hooks=[recorder]):
            pipe(prompt, num_inference_steps=50)
        dit_accel.accelerate(pipe, cache="magcache", cache_settings={"ratios": recorder.ratios()})

    Ratios hold for the model, the scheduler with its shift, and the guidance that were recorded.

    Args:
        target: the pipeline, or its transformer.
        branch: branch of guidance that is measured; None for the first one of each step.

    Raises:
        UnknownModelError: if the model is of no registered family.
    """

    def __init__(self, target: Any, branch: str | None = None) -> None:
        self._roots, self._branch = find_roots(target), branch
        self._entered: Tensor | None = None
        self._generation = -1
        self._norms: dict[int, Tensor] = {}  # by step, of the latest generation

    def around(self, block: BlockInfo, state: StepState, run: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        """Runs the block, and looks at what enters the first and leaves the last one."""
        if self._branch not in (None, state.branch):
            return run()
        if state.generation != self._generation:
            self._generation, self._norms = state.generation, {}
        if state.step in self._norms:  # another branch of the step
            return run()
        root = self._roots[block.expert]
        streams = streams_of(family_of(root), block.path)
        place = streams.names.index(_MAIN)
        if block.index == 0:
            module = root.get_submodule(block.path)
            self._entered = read_streams(module, streams, arguments["args"], arguments["kwargs"])[place]
        output = run()
        if block.index == block.count - 1 and self._entered is not None:
            left = unpack_streams(streams, output)[place]
            if left is not None:
                self._norms[state.step] = token_norms(left - self._entered)
            self._entered = None
        return output

    def ratios(self) -> tuple[float, ...]:
        """Ratios of the latest generation, one for each step; waits for the device.

        Raises:
            ValueError: if no whole generation was recorded.
        """
        steps = sorted(self._norms)
        if not steps or steps != list(range(len(steps))):
            raise ValueError(
                "no whole generation was recorded; give the recorder to accelerate(block_hooks=[...]) and run the "
                "pipeline once, without a cache"
            )
        return magnitude_ratios([self._norms[step] for step in steps])
