"""DiCache (arXiv 2508.17356)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..limits import Limits
from ..policies.probe import ProbeDiff
from ..predictors.linear import AdaptiveLinear
from ..recipe import Cache
from ..scopes.blocks import Tail

_THRESHOLDS = {
    "FluxTransformer2DModel": 0.4,
    "HunyuanVideoTransformer3DModel": 0.1,
    "WanTransformer3DModel": 0.08,
}


def dicache(
    root: nn.Module | None = None,
    *,
    threshold: float | None = None,
    blocks: int = 1,
    retention: int | float = 0.2,
    cooldown: int | float | None = None,
    highest: float | None = None,
    error: Literal["delta_y", "delta_minus"] = "delta_y",
) -> Cache:
    """Skips the blocks behind a probe while the probe's output changes little, summed over steps.

    Bu et al., "DiCache: Let Diffusion Model Determine Its Own Cache", arXiv 2508.17356. The residual is continued
    along the line of the two latest ones, as far as the probe went along its own. No calibration.

    Args:
        root: the model, which chooses the published settings.
        threshold: larger reuses more. Published: FLUX.1 0.4, HunyuanVideo 0.1, Wan 2.1 0.08; for others 0.1. With
            ``"delta_minus"`` 0.08.
        blocks: first blocks, which are the probe and always run; 1 to 5 are recommended.
        retention: first steps that are computed, or their share.
        cooldown: last steps that are computed. Published: FLUX.1 1, others 0.
        highest: bound on how far along the line. Published: Wan 2.1 2, others 1.5.
        error: ``"delta_y"``, the change of the probe's output, or ``"delta_minus"``, its distance from the change of
            the probe's input.

    Raises:
        ValueError: for settings out of range; on a model with too few blocks, when it is put on.
    """
    if error not in ("delta_y", "delta_minus"):
        raise ValueError(f'error is "delta_y" or "delta_minus"; got {error!r}')
    name = type(root).__name__
    if threshold is None:
        threshold = _THRESHOLDS.get(name, 0.1) if error == "delta_y" else 0.08
    if cooldown is None:
        cooldown = 1 if name == "FluxTransformer2DModel" else 0
    if highest is None:
        highest = 2.0 if name == "WanTransformer3DModel" else 1.5
    return Cache(
        Tail(blocks, 0),
        ProbeDiff(threshold, blocks, "previous", accumulate=True, of="output" if error == "delta_y" else "excess"),
        AdaptiveLinear(1.0, highest),
        Limits(warmup=retention, cooldown=cooldown),
        name="dicache",
    )
