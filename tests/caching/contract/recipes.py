"""Caches that stand for all: each scope and each moment of decision once.

Those with thresholds have ones that everything passes, and limits that end every reuse: so what they decide does not
hang on the last digits of an untrained model, and is the same for every prompt.
"""

from __future__ import annotations

from dataclasses import replace

from dit_accel.caching.limits import Limits
from dit_accel.caching.policies.probe import ProbeDiff
from dit_accel.caching.policies.transform import Transform
from dit_accel.caching.presets.modules import fora
from dit_accel.caching.presets.static import static
from dit_accel.caching.presets.unet import deepcache
from dit_accel.caching.recipe import Cache
from dit_accel.caching.scopes.blocks import Tail
from dit_accel.caching.scopes.output import Output

ALWAYS = 1e9  # a threshold below which everything is
TWO = Limits(max_consecutive=2)

PROBE = Cache(Tail(1, 0), ProbeDiff(ALWAYS, blocks=1), limits=TWO, name="probe")
OUTPUT = Cache(Output(), Transform(ALWAYS), limits=replace(TWO, warmup=2), name="output")
TRANSFORMERS = {"static": static(every=3), "probe": PROBE, "output": OUTPUT, "modules": fora(interval=3)}
UNETS = {"output": OUTPUT, "modules": fora(interval=3), "deep": deepcache(interval=3)}
ZERO = {"probe": replace(PROBE, policy=ProbeDiff(0.0, blocks=1)), "output": replace(OUTPUT, policy=Transform(0.0))}


def probing(threshold: float) -> Cache:
    """First block cache with a threshold."""
    return replace(PROBE, policy=ProbeDiff(threshold, blocks=1))


UNET_CASES = ("sd15",)
CASES = ("wan", "wan-two-experts", "flux", "sd3", "hunyuan", "cogvideox", *UNET_CASES)
SEQUENTIAL = ("wan", "wan-two-experts", "flux", "hunyuan")
SWITCHABLE = ("wan", "wan-two-experts", "sd3", "sd15")


def recipes_for(case: str) -> dict[str, Cache]:
    """Those that fit a case, by name."""
    return UNETS if case in UNET_CASES else TRANSFORMERS


def pairs(cases: tuple[str, ...] = CASES) -> list[tuple[str, str]]:
    """Case and cache."""
    return [(case, cache) for case in cases for cache in recipes_for(case)]


def computing_all(cache: Cache) -> Cache:
    """The same with limits that forbid any reuse."""
    return replace(cache, limits=Limits(warmup=1.0))
