"""What profiling looks at while a pipeline runs: after each call of a model, which blocks saw the foreground."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import block_of, block_paths
from .denoised import denoise, latents_of, paired
from .enrichment import enrichment
from .masks import MaskSource, Scene, SubjectWords, token_mask
from .received import ReceivedAttentionRecorder, WordAttentionRecorder

if TYPE_CHECKING:
    from ...clock import StepClock


class Looking:
    """What is measured while a pipeline runs.

    Args:
        roots: the models by expert.
        mask: where the foreground is.
        recorder: of the attention received.
        at: steps to look at; None for all.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        mask: MaskSource,
        recorder: ReceivedAttentionRecorder,
        at: Collection[int] | None,
    ) -> None:
        self._roots, self._mask, self._received = roots, mask, recorder
        self._words = WordAttentionRecorder(mask.words, at) if isinstance(mask, SubjectWords) else None
        self._paths = {expert: block_paths(root) for expert, root in roots.items()}
        self._sums = {expert: torch.zeros(2, len(paths), dtype=torch.float64) for expert, paths in self._paths.items()}
        self._shares: list[float] = []
        self._grids: set[tuple[int, int, int]] = set()

    @property
    def controls(self) -> list[Any]:
        """To be installed."""
        return [self._received] if self._words is None else [self._received, self._words]

    def attach(self, expert: str, clock: StepClock, scheduler: Any) -> Callable[[], None]:
        """Looks at the calls of one model from now on; returns the function that ends it."""
        root = self._roots[expert]
        signature = inspect.signature(type(root).forward)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            arguments = signature.bind_partial(module, *args, **kwargs).arguments
            self._look(expert, arguments, output[0], clock, scheduler)

        return root.register_forward_hook(after, with_kwargs=True).remove

    def scores(self) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
        """Mean enrichment of each block, over all experts and by expert.

        Raises:
            ValueError: if a block was never looked at, or no frame told anything.
        """
        for expert, (_, counts) in self._sums.items():
            missing = [self._paths[expert][index] for index in (counts == 0).nonzero().flatten().tolist()]
            if len(missing) == len(counts):
                raise ValueError(
                    f"nothing was learned about {expert}: either no step that was looked at ran it, or no frame had "
                    "both foreground and background; look at more steps, or give a mask"
                )
            if missing:
                raise ValueError(f"no self-attention or joint attention ran in {', '.join(missing)} of {expert}")
        means = {expert: (sums / counts) for expert, (sums, counts) in self._sums.items()}
        mean = torch.stack(list(means.values())).mean(0)
        by_expert = {expert: tuple(of.tolist()) for expert, of in means.items()} if len(means) > 1 else {}
        return tuple(mean.tolist()), by_expert

    def facts(self) -> dict[str, Any]:
        """What there was to look at: calls, token grids, and the mean share of the foreground."""
        count = len(self._shares)
        grids = sorted(list(grid) for grid in self._grids)
        return {"calls": count, "grids": grids, "foreground_share": sum(self._shares) / max(1, count)}

    def _look(
        self, expert: str, arguments: Mapping[str, Any], output: Tensor, clock: StepClock, scheduler: Any
    ) -> None:
        received, state = self._received.calls, clock.state
        words = self._words.calls if self._words is not None else {}
        if not received or state is None:
            words.clear()
            return
        root, layout = self._roots[expert], state.layout
        latents = latents_of(arguments, type(root).__name__)
        pair = paired(latents, output, layout, frames_first="CogVideoX" in type(root).__name__)
        denoised = denoise(scheduler, *pair, state.step, state.timestep)
        scene = Scene(denoised, layout.grid, state.step, state.branch, expert, dict(words))
        mask = token_mask(self._mask(scene), layout.grid, denoised.shape[0])
        found = self._by_block(expert, received)
        values = torch.stack([enrichment(score.view_as(mask), mask) for score in found.values()]).flatten(1).cpu()
        self._add(expert, list(found), values.double())
        self._shares.append(float(mask.float().mean()))
        self._grids.add(layout.grid)
        received.clear()
        words.clear()

    def _by_block(self, expert: str, received: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Scores ``[batch, tokens]`` of each block: the mean over its modules (Stable Diffusion 3.5 has two)."""
        parts: dict[int, list[Tensor]] = {}
        for path, score in received.items():
            block = block_of(self._paths[expert], path)
            if block is not None:
                parts.setdefault(block, []).append(score)
        return {block: torch.stack(scores).mean(0) for block, scores in sorted(parts.items())}

    def _add(self, expert: str, blocks: list[int], values: Tensor) -> None:
        sums, counts = self._sums[expert]
        index = torch.tensor(blocks)
        sums.index_add_(0, index, values.nansum(1))
        counts.index_add_(0, index, (~values.isnan()).sum(1).double())
