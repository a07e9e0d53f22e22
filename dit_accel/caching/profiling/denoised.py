"""The denoised latents ``x0`` that a call of a root model amounts to, on a grid of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...layout import TokenLayout

INPUTS = ("hidden_states", "sample")  # names of a root's latents


def latents_of(arguments: Mapping[str, Any], name: str) -> Tensor:
    """The latents among the bound arguments of a root.

    Raises:
        ValueError: if there are none under a known name.
    """
    found = next((arguments[key] for key in INPUTS if isinstance(arguments.get(key), Tensor)), None)
    if found is None:
        raise ValueError(
            f"{name} takes no {' or '.join(INPUTS)}, so its latents cannot be told; profile another model"
        )
    return found


def denoise(scheduler: Any, latents: Tensor, output: Tensor, step: int, timestep: Any) -> Tensor:
    """What the model takes the finished latents for: ``x - sigma v`` for flow matching.

    Schedulers of diffusion go by ``alphas_cumprod`` at the timestep and their prediction type.

    Args:
        scheduler: of the pipeline.
        latents: as the model was given them, scaled by the scheduler.
        output: what it made of them, same shape.
        step: index of the sampling step.
        timestep: as the model was given it.

    Returns:
        float32, same shape.

    Raises:
        ValueError: if the scheduler lists no noise levels.
    """
    x, v = latents.float(), output.float()
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", "flow_prediction")
    alphas, sigmas = (getattr(scheduler, name, None) for name in ("alphas_cumprod", "sigmas"))
    if alphas is not None and kind in ("epsilon", "v_prediction", "sample"):
        alpha = alphas[int(torch.as_tensor(timestep).max())].to(x.device, torch.float32)
        if kind == "epsilon":
            return (x - (1 - alpha).sqrt() * v) / alpha.sqrt()
        return alpha.sqrt() * x - (1 - alpha).sqrt() * v if kind == "v_prediction" else v
    if sigmas is None or step >= len(sigmas):
        raise ValueError(
            f"{type(scheduler).__name__} lists no noise level for step {step}, so denoised latents cannot be told; "
            "use a scheduler with sigmas or alphas_cumprod"
        )
    return x - torch.as_tensor(sigmas[step]).to(x.device, torch.float32) * v


def paired(latents: Tensor, output: Tensor, layout: TokenLayout, frames_first: bool) -> tuple[Tensor, Tensor]:
    """Input and output as ``[batch, channels, frames, height, width]``, without what only one of them has.

    Conditions that follow the latents along the channels, or reference tokens that follow those of the image, are left
    out.

    Args:
        latents: ``[B, C, F, H, W]``, ``[B, F, C, H, W]`` (CogVideoX), ``[B, C, H, W]`` or packed ``[B, tokens, C]``.
        output: likewise.
        layout: of the call.
        frames_first: whether five axes have frames before channels.

    Raises:
        ValueError: for shapes that are none of these.
    """
    x, v = (_spread(part, layout, frames_first) for part in (latents, output))
    channels = min(x.shape[1], v.shape[1])
    x, v = x[:, :channels], v[:, :channels]
    if x.shape != v.shape:
        raise ValueError(f"latents of {tuple(latents.shape)} and an output of {tuple(output.shape)} do not fit")
    return x, v


def _spread(values: Tensor, layout: TokenLayout, frames_first: bool) -> Tensor:
    if values.ndim == 5:
        return values.transpose(1, 2) if frames_first else values
    if values.ndim == 4:
        return values.unsqueeze(2)
    count = math.prod(layout.grid)
    if values.ndim != 3 or values.shape[1] < count:
        raise ValueError(
            f"latents of shape {tuple(values.shape)} are neither images, videos, nor the tokens of a "
            f"{' x '.join(map(str, layout.grid))} grid"
        )
    return values[:, :count].transpose(1, 2).unflatten(2, layout.grid)
