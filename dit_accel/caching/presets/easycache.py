"""EasyCache (arXiv 2507.02860)."""

from __future__ import annotations

from torch import nn

from ..limits import Limits
from ..policies.transform import Transform
from ..recipe import Cache
from ..scopes.output import Output

_HUNYUAN = ("HunyuanVideoTransformer3DModel", 0.025, 5)
_OTHERS = (0.05, 10)


def easycache(
    root: nn.Module | None = None,
    *,
    threshold: float | None = None,
    warmup: int | float | None = None,
    cooldown: int | float = 1,
) -> Cache:
    """Skips the whole model while the output, judged by how the latents move, should be much the same.

    Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching", arXiv
    2507.02860. What is kept is the difference of output and latents. No calibration.

    Args:
        root: the model, which chooses the published settings.
        threshold: larger reuses more. Published: Wan 2.1 0.05, HunyuanVideo 0.025; for others that of Wan.
        warmup: first steps that are computed. Published, for 50 steps: Wan 2.1 10, HunyuanVideo 5; for others 10.
        cooldown: last steps that are computed.

    Raises:
        ValueError: for settings out of range, naming the range.
    """
    published = _HUNYUAN[1:] if root is not None and type(root).__name__ == _HUNYUAN[0] else _OTHERS
    limits = Limits(warmup=published[1] if warmup is None else warmup, cooldown=cooldown)
    policy = Transform(published[0] if threshold is None else threshold)
    return Cache(Output(residual=True), policy, limits=limits, name="easycache")
