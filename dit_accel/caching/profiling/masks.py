"""Where the foreground is: by the denoised latents, a mask of one's own, or words of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .otsu import otsu_mask

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What a mask can be made from: one call of the model.

    Attributes:
        denoised: the video or image as the model expects it at that step, ``[batch, channels, frames, height, width]``
            float32 latents; one frame for images.
        grid: tokens along (frames, height, width).
        step: index of the sampling step.
        branch: branch of guidance.
        expert: attribute name of the root in its pipeline.
        words: share of attention that each token pays to the subject's words ``[batch, tokens]``, by path of the
            module that attends; empty unless the mask asks for them.
    """

    denoised: Tensor
    grid: Grid
    step: int
    branch: str
    expert: str
    words: Mapping[str, Tensor] = field(default_factory=dict)


MaskSource = Callable[[Scene], Tensor]
"""Gives the foreground, bool or 0 to 1, ``[(batch,) (frames,) height, width]``, at the size of the grid or larger."""


@dataclass(frozen=True)
class Saliency:
    """The default: what moves and what stands out from its frame, by Otsu's threshold in each frame.

    A frame's change is the mean absolute difference to its neighbors in time, over the channels; standing out is the
    mean absolute difference to the frame's median. Both are divided by their mean over the frame. One-frame grids have
    no change, and go by standing out alone.

    Attributes:
        temporal: weight of change.
        spatial: weight of standing out.

    Raises:
        ValueError: if a weight is negative or both are 0; in a call, if an image has change alone to go by.
    """

    temporal: float = 1.0
    spatial: float = 1.0

    def __post_init__(self) -> None:
        if min(self.temporal, self.spatial) < 0 or self.temporal + self.spatial <= 0:
            raise ValueError(
                f"the weights of saliency are numbers from 0, not both 0; got temporal={self.temporal}, "
                f"spatial={self.spatial}"
            )

    def __call__(self, scene: Scene) -> Tensor:
        """The mask on the token grid, ``[batch, frames, height, width]``."""
        values = scene.denoised
        if values.shape[2] == 1 and self.spatial == 0:
            raise ValueError("an image has no change over time; give Saliency a spatial weight above 0")
        found = self.spatial * _evened(standing_out(values)) if self.spatial else 0
        if self.temporal and values.shape[2] > 1:
            found = found + self.temporal * _evened(change(values))
        assert isinstance(found, Tensor)
        return otsu_mask(to_grid(found, scene.grid).flatten(2)).unflatten(2, scene.grid[1:])


@dataclass(frozen=True)
class SubjectWords:
    """The tokens that attend most to some words of the prompt, by Otsu's threshold in each frame.

    Attributes:
        words: places of the words among the text tokens the model is given, from 0.
    """

    words: tuple[int, ...]

    def __call__(self, scene: Scene) -> Tensor:
        """The mask on the token grid, ``[batch, frames, height, width]``."""
        if not scene.words:
            raise ValueError("the model attends to no text at the recorded steps; take another mask")
        mean = torch.stack(list(scene.words.values())).mean(0)
        return otsu_mask(mean.unflatten(1, (scene.grid[0], -1))).unflatten(2, scene.grid[1:])


@dataclass(frozen=True, eq=False)
class FixedMask:
    """A mask given by the user for all prompts and steps.

    Attributes:
        mask: ``[(frames,) height, width]``, bool or 0 to 1.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.ndim not in (2, 3) or 0 in self.mask.shape:
            raise ValueError(f"a mask is [height, width] or [frames, height, width]; got {tuple(self.mask.shape)}")

    def __call__(self, scene: Scene) -> Tensor:
        """The mask itself."""
        return self.mask.to(scene.denoised.device)


def source_of(mask: MaskSource | Tensor | None) -> MaskSource:
    """What the user gave, as a source.

    Raises:
        ValueError: if it is none of the three.
    """
    if mask is None:
        return Saliency()
    if isinstance(mask, Tensor):
        return FixedMask(mask)
    if not callable(mask):
        raise ValueError(
            "mask is a tensor [(frames,) height, width], a function of a Scene, or None for saliency; got "
            f"{type(mask).__name__}"
        )
    return mask


def token_mask(mask: Tensor, grid: Grid, batch: int) -> Tensor:
    """A mask by token: those of which at least half is foreground.

    Args:
        mask: ``[(batch,) (frames,) height, width]``. Without frames, or with one, it is for all frames.
        grid: tokens along (frames, height, width).
        batch: of the call.

    Returns:
        bool ``[batch, frames, height * width]``.

    Raises:
        ValueError: if it is smaller than the grid, has frames where the grid has one, or another batch size.
    """
    if not 2 <= mask.ndim <= 4:
        raise ValueError(f"a mask is [(batch,) (frames,) height, width]; got {tuple(mask.shape)}")
    full = mask[(None,) * (4 - mask.ndim)].float()
    if full.shape[1] > 1 and grid[0] == 1:
        raise ValueError(f"the mask has {full.shape[1]} frames, and the model makes images; give a mask of one frame")
    sizes = tuple(full.shape[1:])
    if any(size < tokens for size, tokens in zip(sizes[1:], grid[1:], strict=True)) or 1 < sizes[0] < grid[0]:
        raise ValueError(f"the mask of {_by(sizes)} is smaller than the token grid of {_by(grid)}; give one as large")
    if full.shape[0] not in (1, batch):
        raise ValueError(f"the mask is for a batch of {full.shape[0]}, and the model runs one of {batch}")
    if sizes[0] == 1:
        full = full.expand(-1, grid[0], -1, -1)
    return (to_grid(full, grid) >= 0.5).flatten(2).expand(batch, -1, -1)


def to_grid(values: Tensor, grid: Grid) -> Tensor:
    """Averages ``[batch, frames, height, width]`` over the cells of the token grid."""
    return values if tuple(values.shape[1:]) == grid else F.adaptive_avg_pool3d(values, grid)


def change(denoised: Tensor) -> Tensor:
    """Mean absolute difference to the frames before and after, ``[batch, frames, height, width]``."""
    steps = denoised.diff(dim=2).abs().mean(1)
    both = torch.cat([steps[:, :1], steps], 1) + torch.cat([steps, steps[:, -1:]], 1)
    return both / 2


def standing_out(denoised: Tensor) -> Tensor:
    """Mean absolute difference to the median of the frame, ``[batch, frames, height, width]``."""
    median = denoised.flatten(3).median(-1).values[..., None, None]
    return (denoised - median).abs().mean(1)


def _evened(values: Tensor) -> Tensor:
    """Over the mean of the frame; what is 0 everywhere stays 0."""
    return values / values.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
