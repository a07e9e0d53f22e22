"""Presets that keep what single modules gave: FORA, Pyramid Attention Broadcast, TaylorSeer and FasterCache."""

from __future__ import annotations

from ..limits import Limits
from ..policies.broadcast import Broadcast
from ..policies.static import Interval
from ..predictors.dynamic_reuse import DynamicReuse
from ..predictors.taylor import Taylor
from ..recipe import Cache
from ..scopes.guidance import Guidance
from ..scopes.modules import ATTENTION_KINDS, Attention, Modules


def fora(*, interval: int = 3) -> Cache:
    """FORA (arXiv 2407.01425): attention and feed-forward outputs are computed every ``interval`` steps.

    Args:
        interval: distance of computed steps; the authors use 2 to 7, and 3 for most figures.

    Raises:
        ValueError: for settings out of range, naming the range.
    """
    return Cache(Modules(), Interval(interval), name="fora")


def pab(*, spatial: int = 2, temporal: int = 3, cross: int = 5, window: tuple[float, float] = (100.0, 800.0)) -> Cache:
    """Pyramid Attention Broadcast (arXiv 2408.12588): attention outputs, at intervals that differ by kind.

    Args:
        spatial: distance of computed steps for self-attention; also for joint attention of images or video and text.
        temporal: for attention along time.
        cross: for attention to text.
        window: timesteps, from 1000 (noise) to 0, between which outputs are reused.

    Raises:
        ValueError: for settings out of range, naming the range.
    """
    ranges = {"self": spatial, "joint": spatial, "temporal": temporal, "cross": cross}
    return Cache(Attention(), Broadcast(ranges, window), name="pab")


def taylorseer(*, interval: int = 6, order: int = 2, first_enhance: int = 3) -> Cache:
    """TaylorSeer (arXiv 2503.06923): every attention and feed-forward output is extrapolated from computed steps.

    Args:
        interval: distance of computed steps.
        order: of the extrapolation, 1 to 4; ``order + 1`` values are kept of every module.
        first_enhance: first steps that are computed, from 1; intervals count from the last of them.

    Raises:
        ValueError: for settings out of range, naming the range.
    """
    if isinstance(first_enhance, bool) or not isinstance(first_enhance, int) or first_enhance < 1:
        raise ValueError(f"first_enhance counts computed first steps, from 1; got {first_enhance!r}")
    predictor = Taylor(order, form="taylorseer", kappa=None)
    policy, limits = Interval(interval, first_enhance - 1), Limits(warmup=first_enhance)
    return Cache(Modules(), policy, predictor, limits, name="taylorseer")


def fastercache(
    *,
    every: int = 2,
    window: tuple[float, float] = (-1.0, 681.0),
    first_weight: float = 0.0,
    last_weight: float = 1.0,
    uncond_every: int = 5,
    uncond_window: tuple[float, float] = (-1.0, 641.0),
    low: float = 1.1,
    high: float = 1.1,
) -> tuple[Cache, Cache]:
    """FasterCache (arXiv 2410.19355): dynamic reuse of self-attention, and the unconditional branch from the other.

    Args:
        every: distance of steps whose attention is computed, inside the window.
        window: timesteps, from 1000 to 0, between which attention is reused.
        first_weight: share of the latest change that reused attention is moved on by, at the first step.
        last_weight: likewise at the last step.
        uncond_every: distance of steps whose unconditional branch is computed, inside its window.
        uncond_window: likewise, for the unconditional branch.
        low: factor on low frequencies of the kept difference of both branches, at each step it is used again.
        high: likewise on high frequencies.

    Raises:
        ValueError: for settings out of range, naming the range.
    """
    kinds = tuple(kind for kind in ATTENTION_KINDS if kind != "cross")
    attention = Cache(
        Attention(kinds),
        Broadcast(dict.fromkeys(kinds, every), window),
        DynamicReuse(first_weight, last_weight),
        name="fastercache",
    )
    # Innermost, so that the attention cache sees whole batches; each branch is asked for itself.
    guidance = Cache(
        Guidance(low, high),
        Broadcast({"guidance": uncond_every}, uncond_window),
        decide="each",
        name="fastercache-cfg",
    )
    return guidance, attention
