"""How much noise there is at each sampling step, whatever kind of scheduler says it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_EDGE = 1e-6
_ROUNDING = 1e-3  # by which pure noise of flow matching may be above 1
_OF_DIFFUSION = ("epsilon", "v_prediction", "sample")  # prediction types; flow matching has its own, or says nothing


class Level(NamedTuple):
    """One sampling step as its scheduler knows it.

    Attributes:
        timestep: None if none is listed.
        sigma: noise level; None if nothing says it.
        flow: whether the latents are ``(1 - sigma) signal + sigma noise`` (flow matching); else they are ``signal +
            sigma noise``, or a multiple of that.
    """

    timestep: float | None
    sigma: float | None
    flow: bool = True


def read_levels(scheduler: Any) -> list[Level]:
    """The steps that a scheduler is set to, and what it lists behind the last of them.

    Schedulers that list no ``sigmas`` but have ``alphas_cumprod`` (DDIM, PNDM, those of CogVideoX) are at ``sqrt((1 -
    alpha) / alpha)``, as in the ``sigmas`` of those that list both; likewise where one level is listed for two
    timesteps that differ (KDPM2, whose second call of a step is at a level in between). Tensors on a device are waited
    for.

    Args:
        scheduler: of a pipeline, or None.
    """
    timesteps, listed, alphas = (_numbers(scheduler, name) for name in ("timesteps", "sigmas", "alphas_cumprod"))
    flow, sigmas = _is_flow(scheduler, listed, alphas), list[float | None](listed)
    if alphas and not flow and (not listed or _is_uneven(timesteps, listed)):
        sigmas = [_sigma_at(alphas, timestep) for timestep in timesteps]
    return [Level(timestep, sigma, flow) for timestep, sigma in itertools.zip_longest(timesteps, sigmas)]


def log_snr(sigma: float, flow: bool = True) -> float:
    """``log(alpha / sigma)``, half the log signal-to-noise ratio: the ``lambda`` of DPM-Solver (arXiv 2206.00927).

    It rises as noise falls.

    Args:
        sigma: noise level.
        flow: as in :class:`Level`.

    Returns:
        ``log((1 - sigma) / sigma)`` or ``-log(sigma)``; levels closer than 1e-6 to pure noise, or to none, count as
        that far.

    Raises:
        ValueError: for a level of flow matching above 1, but for rounding.
    """
    share = noise_share(sigma, flow)
    return math.log((1 - share) / share)


def noise_share(sigma: float, flow: bool = True) -> float:
    """The part of noise where signal and noise sum to 1, as ``sigma`` itself in flow matching; see :func:`log_snr`."""
    if flow and sigma > 1 + _ROUNDING:
        raise ValueError(f"flow matching has noise levels from 0 to 1; got {sigma:g}")
    share = sigma if flow else sigma / (1 + sigma)
    return min(max(share, _EDGE), 1 - _EDGE)


def is_pure_noise(sigma: float, flow: bool = True) -> bool:
    """Whether a level has no signal, so that its ratio is 0: the first step of most samplers of flow matching."""
    return noise_share(sigma, flow) >= 1 - _EDGE


def _is_flow(scheduler: Any, sigmas: Sequence[float], alphas: Sequence[float]) -> bool:
    config = getattr(scheduler, "config", None) or {}
    kind = config.get("prediction_type")
    if config.get("use_flow_sigmas") or kind == "flow_prediction":
        return True
    return not alphas and kind not in _OF_DIFFUSION and max(sigmas, default=0.0) <= 1 + _ROUNDING


def _is_uneven(timesteps: Sequence[float], sigmas: Sequence[float]) -> bool:
    pairs = itertools.pairwise(zip(timesteps, sigmas, strict=False))
    return any(here[1] == after[1] and here[0] != after[0] for here, after in pairs)


def _sigma_at(alphas: Sequence[float], timestep: float) -> float | None:
    """The level at a timestep, between two of training on a line in ``log(sigma)``; None outside of them."""
    below, above = math.floor(timestep), math.ceil(timestep)
    if not 0 <= below <= above < len(alphas):
        return None
    first, second = (math.log(_sigma(alphas[each])) for each in (below, above))
    return math.exp(first + (timestep - below) * (second - first))


def _sigma(alpha: float) -> float:
    return min(math.sqrt((1 - alpha) / alpha), 1 / _EDGE) if alpha > 0 else 1 / _EDGE


def _numbers(scheduler: Any, name: str) -> list[float]:
    """What a scheduler lists under a name, as numbers; empty if it lists nothing."""
    values = getattr(scheduler, name, None)
    return [] if values is None else [float(value) for value in torch.as_tensor(values).flatten().tolist()]
