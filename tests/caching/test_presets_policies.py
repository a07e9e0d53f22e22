"""Presets that follow a policy: their published settings, how models are told apart, and what errors say."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from dit_accel.caching.limits import Limits
from dit_accel.caching.policies import (
    AnyOf,
    Interval,
    Magnitude,
    Policy,
    Polynomial,
    ProbeDiff,
    ScmMask,
    Static,
    UnitDiff,
)
from dit_accel.caching.policies.spectral import Spectral
from dit_accel.caching.policies.transform import Transform
from dit_accel.caching.predictors.linear import AdaptiveLinear
from dit_accel.caching.predictors.reuse import Reuse
from dit_accel.caching.predictors.taylor import Taylor
from dit_accel.caching.presets import PRESETS, preset_by_name, settings_of
from dit_accel.caching.presets.coefficients import TEACACHE
from dit_accel.caching.presets.ratios import MAGCACHE
from dit_accel.caching.recipe import Cache
from dit_accel.caching.scopes.base import Scope
from dit_accel.caching.scopes.blocks import EachBlock, Tail, Whole
from dit_accel.caching.scopes.output import Output


def model(root_class: str, checkpoint: str = "", **config: Any) -> nn.Module:
    """Something that looks like a model of a class with a config, and nothing else of it."""
    root: Any = type(root_class, (nn.Module,), {})()
    root.config = SimpleNamespace(**config, _name_or_path=checkpoint)
    return root


def cache_of(name: str, root: nn.Module | None = None, settings: dict[str, Any] | None = None) -> Cache:
    """The one cache of a preset."""
    found = preset_by_name(name, root, settings)
    assert isinstance(found, Cache)
    return found


def wan(layers: int, heads: int, channels: int, checkpoint: str = "") -> nn.Module:
    return model(
        "WanTransformer3DModel", checkpoint, num_layers=layers, num_attention_heads=heads, in_channels=channels
    )


FLUX: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "in_channels": 64, "guidance_embeds": True}
COG: dict[str, Any] = {
    "num_layers": 42,
    "patch_size_t": None,
    "in_channels": 16,
    "use_rotary_positional_embeddings": True,
}

TOLD_APART = [
    (wan(30, 12, 16), "Wan 2.1 T2V 1.3B", "Wan 2.1 T2V 1.3B"),
    (wan(40, 40, 16, "Wan-AI/Wan2.1-T2V-14B-Diffusers"), "Wan 2.1 T2V 14B", "Wan 2.1 T2V 14B"),
    (wan(40, 40, 16, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"), None, "Wan 2.2 T2V A14B"),
    (wan(40, 40, 36, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"), "Wan 2.1 I2V 480P", "Wan 2.1 I2V 480P"),
    (wan(40, 40, 36, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"), "Wan 2.1 I2V 720P", "Wan 2.1 I2V 720P"),
    (wan(40, 40, 36, "Wan-AI/Wan2.2-I2V-A14B-Diffusers"), None, "Wan 2.2 I2V A14B"),
    (wan(40, 40, 16, "/models/mine"), None, None),  # Wan 2.1 or 2.2: their configs are the same
    (wan(30, 24, 48), None, "Wan 2.2 TI2V 5B"),
    (wan(2, 2, 16), None, None),
    (model("FluxTransformer2DModel", "black-forest-labs/FLUX.1-dev", **FLUX), "FLUX.1", "FLUX.1"),
    (model("FluxTransformer2DModel", "black-forest-labs/FLUX.1-Kontext-dev", **FLUX), "FLUX.1", "FLUX.1 Kontext"),
    (model("FluxTransformer2DModel", "x", **{**FLUX, "guidance_embeds": False}), None, None),  # schnell
    (model("CogVideoXTransformer3DModel", **COG), "CogVideoX 5B", None),
    (model("CogVideoXTransformer3DModel", **{**COG, "in_channels": 32}), "CogVideoX 5B", None),
    (model("CogVideoXTransformer3DModel", **{**COG, "patch_size_t": 2}), "CogVideoX 1.5 5B", None),
    (
        model("CogVideoXTransformer3DModel", **{**COG, "patch_size_t": 2, "in_channels": 32}),
        "CogVideoX 1.5 5B I2V",
        None,
    ),
    (
        model("CogVideoXTransformer3DModel", **{**COG, "num_layers": 30, "use_rotary_positional_embeddings": False}),
        "CogVideoX 2B",
        None,
    ),
    (
        model("HunyuanVideoTransformer3DModel", num_layers=20, num_single_layers=40, image_condition_type=None),
        "HunyuanVideo",
        "HunyuanVideo 720p",
    ),
    (
        model(
            "HunyuanVideoTransformer3DModel", num_layers=20, num_single_layers=40, image_condition_type="latent_concat"
        ),
        None,
        None,
    ),
]


@pytest.mark.parametrize(("root", "name"), [(root, name) for root, name, _ in TOLD_APART])
def test_teacache_finds_the_polynomial_of_a_model(root: nn.Module, name: str | None) -> None:
    if name is None:
        with pytest.raises(ValueError, match=r"no TeaCache coefficients .* give coefficients=.*, or say by model="):
            preset_by_name("teacache", root)
        return
    (row,) = (row for row in TEACACHE if row.model == name and row.signal == "default")
    assert cache_of("teacache", root) == Cache(
        Whole(),
        Polynomial(row.coefficients, row.threshold),
        limits=Limits(warmup=row.warmup, cooldown=row.cooldown),
        name="teacache",
    )


@pytest.mark.parametrize(("root", "name"), [(root, name) for root, _, name in TOLD_APART])
def test_magcache_finds_the_ratios_of_a_model(root: nn.Module, name: str | None) -> None:
    if name is None:
        with pytest.raises(ValueError, match=r"no MagCache ratios .*; calibrate: .*, or say by model="):
            preset_by_name("magcache", root)
        return
    (row,) = (row for row in MAGCACHE if row.model == name)
    assert cache_of("magcache", root) == Cache(
        Whole(),
        Magnitude(row.ratios, row.threshold, row.max_skips, row.always),
        limits=Limits(warmup=row.retention),
        name="magcache",
    )


def test_teacache_has_the_published_polynomials() -> None:
    """Figures of the paper's code, at places picked by hand."""
    by_model = {(row.model, row.signal): row for row in TEACACHE}
    assert by_model["FLUX.1", "default"].coefficients[0] == 498.651651
    assert by_model["HunyuanVideo", "default"].coefficients == (
        733.226126,
        -401.131952,
        67.5869174,
        -3.149878,
        0.0961237896,
    )
    assert by_model["Wan 2.1 T2V 1.3B", "default"].coefficients[1] == -1311.10545
    assert by_model["Wan 2.1 T2V 14B", "projection"].coefficients[0] == -303318.725
    assert by_model["Wan 2.1 I2V 720P", "default"].coefficients[4] == -0.23412683
    assert len(by_model) == len(TEACACHE) == 22
    assert all(len(row.coefficients) == 5 and row.threshold > 0 and row.source for row in TEACACHE)
    assert all((row.warmup, row.cooldown) == (5, 0) for row in TEACACHE if row.signal == "projection")


def test_magcache_has_the_published_ratios() -> None:
    lengths = {row.model: len(row.ratios) for row in MAGCACHE}
    assert len(lengths) == len(MAGCACHE) == 14
    assert {lengths[name] for name in lengths if "FLUX" in name} == {28}
    assert {lengths[name] for name in lengths if "I2V" in name and "TI2V" not in name} == {40}
    assert all(row.ratios[0] == 1.0 and 0.4 < min(row.ratios) <= max(row.ratios) < 1.7 for row in MAGCACHE)
    by_model = {row.model: row for row in MAGCACHE}
    assert by_model["Wan 2.1 T2V 1.3B"].ratios[-1] == 0.81838
    assert by_model["FLUX.1"].ratios[1] == 1.21094 and by_model["FLUX.1"].always == (11,)


def test_a_model_can_be_named() -> None:
    policy = cache_of("teacache", wan(2, 2, 16), {"model": "Wan 2.1 T2V 1.3B", "signal": "projection"}).policy
    assert isinstance(policy, Polynomial) and policy.threshold == 0.05 and policy.signal == "projection"
    assert (
        cache_of("magcache", settings={"model": "HunyuanVideo 544p"}).policy
        != cache_of("magcache", settings={"model": "HunyuanVideo 720p"}).policy
    )
    with pytest.raises(ValueError, match=r"called 'Wan 3'; there are those of .*FLUX\.1"):
        preset_by_name("magcache", settings={"model": "Wan 3"})


def test_settings_of_ones_own_need_no_model() -> None:
    cache = cache_of("teacache", None, {"coefficients": [1, 0], "threshold": 0.2, "warmup": 3})
    assert cache.policy == Polynomial((1.0, 0.0), 0.2) and cache.limits == Limits(warmup=3, cooldown=1)
    cache = cache_of("magcache", None, {"ratios": [1.0, 0.9]})
    assert cache.policy == Magnitude((1.0, 0.9), 0.06, 3) and cache.limits == Limits(warmup=0.2)
    cache = cache_of("magcache", wan(30, 12, 16), {"threshold": 0.5, "max_skips": 1, "retention": 2})
    assert isinstance(cache.policy, Magnitude) and (cache.policy.threshold, cache.policy.max_skips) == (0.5, 1)
    with pytest.raises(ValueError, match="threshold of their own"):
        preset_by_name("teacache", None, {"coefficients": [1, 0]})
    with pytest.raises(ValueError, match=r"there are 'default', 'projection'"):
        preset_by_name("teacache", wan(30, 12, 16), {"signal": "e1"})


PUBLISHED: list[tuple[str, nn.Module | None, dict[str, Any], Scope, Policy, Any, Limits]] = [
    ("fbcache", None, {}, Tail(1, 0), ProbeDiff(0.08, 1), Reuse(), Limits()),
    ("dbcache", None, {}, Tail(8, 0), ProbeDiff(0.08, 8), Reuse(), Limits(warmup=8)),
    (
        "dbcache",
        None,
        {"front": 4, "back": 2, "order": 1, "max_cached_steps": 9, "max_consecutive": 3, "mask": "fast"},
        Tail(4, 2),
        AnyOf((ScmMask("fast"), ProbeDiff(0.08, 4))),
        Taylor(1),
        Limits(warmup=8, max_total=9, max_consecutive=3),
    ),
    (
        "dbcache",
        None,
        {"mask": [1, 0, 1], "mask_policy": "static"},
        Tail(8, 0),
        Static(mask=(1, 0, 1)),
        Reuse(),
        Limits(warmup=8),
    ),
    ("prune", None, {"dynamic": True}, EachBlock(8, 0), UnitDiff(0.08, dynamic=True), Reuse(), Limits(warmup=8)),
    ("easycache", wan(30, 12, 16), {}, Output(), Transform(0.05), Reuse(), Limits(warmup=10, cooldown=1)),
    (
        "easycache",
        model("HunyuanVideoTransformer3DModel"),
        {},
        Output(),
        Transform(0.025),
        Reuse(),
        Limits(warmup=5, cooldown=1),
    ),
    (
        "dicache",
        model("FluxTransformer2DModel"),
        {},
        Tail(1, 0),
        ProbeDiff(0.4, 1, "previous", accumulate=True, of="output"),
        AdaptiveLinear(1.0, 1.5),
        Limits(warmup=0.2, cooldown=1),
    ),
    (
        "dicache",
        wan(30, 12, 16),
        {"blocks": 2},
        Tail(2, 0),
        ProbeDiff(0.08, 2, "previous", accumulate=True, of="output"),
        AdaptiveLinear(1.0, 2.0),
        Limits(warmup=0.2),
    ),
    (
        "dicache",
        None,
        {"error": "delta_minus", "retention": 0},
        Tail(1, 0),
        ProbeDiff(0.08, 1, "previous", accumulate=True, of="excess"),
        AdaptiveLinear(1.0, 1.5),
        Limits(),
    ),
    (
        "seacache",
        None,
        {},
        Whole(),
        Spectral(0.25),
        Taylor(1, kappa=None),
        Limits(warmup=1, cooldown=1, max_consecutive=2),
    ),
    (
        "seacache",
        model("CogVideoXTransformer3DModel"),
        {"order": 0},
        Whole(),
        Spectral(0.25, axes=(1, 3, 4)),
        Reuse(),
        Limits(warmup=1, cooldown=1, max_consecutive=2),
    ),
    ("static", None, {}, Whole(), ScmMask("medium"), Reuse(), Limits()),
    ("static", None, {"every": 3, "start": 2, "order": 2}, Whole(), Interval(3, 2), Taylor(2), Limits()),
    ("static", None, {"compute_steps": [0, 4], "steps": 9}, Whole(), Static((0, 4), steps=9), Reuse(), Limits()),
]


@pytest.mark.parametrize(("name", "root", "settings", "scope", "policy", "predictor", "limits"), PUBLISHED)
def test_presets_have_the_published_settings(
    name: str,
    root: nn.Module | None,
    settings: dict[str, Any],
    scope: Scope,
    policy: Policy,
    predictor: Any,
    limits: Limits,
) -> None:
    assert cache_of(name, root, settings) == Cache(scope, policy, predictor, limits, name=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cache_of("teecache"), r"called 'teecache'; there are .*easycache, .*teacache"),
        (lambda: cache_of("fbcache", None, {"treshold": 1}), r"no setting 'treshold'; it has threshold, warmup"),
        (lambda: cache_of("fbcache", None, {"root": None}), "no setting 'root'"),
        (lambda: cache_of("static", None, {"every": 2, "mask": "slow"}), "one of mask"),
        (lambda: cache_of("static", None, {"start": 2}), "start goes with every"),
        (lambda: cache_of("static", None, {"mask": "turbo"}), "slow, medium, fast, ultra"),
        (lambda: cache_of("dbcache", None, {"mask_policy": "maybe"}), "dynamic"),
        (lambda: cache_of("dicache", None, {"error": "delta_x"}), "delta_minus"),
        (lambda: cache_of("seacache", None, {"order": 2}), "0 or 1"),
        (lambda: cache_of("fbcache", None, {"threshold": -1}), "from 0"),
    ],
)
def test_mistakes_are_answered_by_what_there_is(call: Callable[[], Cache], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_says_what_its_settings_are(name: str) -> None:
    """All are keywords, and each one is explained."""
    preset = PRESETS[name]
    assert preset.__doc__ and preset.__name__ == name
    for setting in settings_of(preset):
        assert f"        {setting}: " in preset.__doc__, f"{name} does not explain {setting}"


def test_settings_without_a_default_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def needy(strength: float, *, root: nn.Module | None = None) -> Cache:
        raise AssertionError(strength)

    monkeypatch.setitem(PRESETS, "needy", needy)
    with pytest.raises(ValueError, match="'needy' needs the setting 'strength'"):
        preset_by_name("needy")


def test_names_with_dashes_are_understood() -> None:
    with_underscore = next(name for name in PRESETS if "_" in name)
    assert preset_by_name(with_underscore.replace("_", "-")) == preset_by_name(with_underscore)
