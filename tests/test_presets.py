"""Published settings: what is in the table, which of them a model gets, and who wins."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from dit_accel import Schedule
from dit_accel.presets import (
    PRESETS,
    ModelFacts,
    Preset,
    complete,
    facts_of,
    fitting,
    layered,
    named,
    presets_of,
    recipe_by_name,
)
from dit_accel.presets.table import REPLACES
from dit_accel.processors import ATTENTION, VMOBA_PRESETS

WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16}
HUNYUAN_13B = {"num_layers": 20, "num_single_layers": 40}


def facts(root: str, config: dict[str, Any], experts: int = 1) -> ModelFacts:
    return ModelFacts((root, "ModelMixin", "object"), config, experts)


def facts_for(preset: Preset) -> ModelFacts:
    return facts(preset.root_class, dict(preset.config), preset.experts)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.method}-{preset.name}")
def test_every_preset_builds_its_method_as_published(preset: Preset) -> None:
    recipe, completed = recipe_by_name(preset.method, {}, facts_for(preset), preset.name)
    assert type(recipe) is ATTENTION[preset.method]
    assert completed is not None and completed.preset is preset and not completed.changed
    built = recipe.settings()
    for name, value in preset.settings.items():
        wanted, got = _plain(value), _plain(built[name])
        assert got == wanted or got == [wanted] * len(got), name  # one number for all, spelled out
    again, completed = recipe_by_name(preset.method, built, facts_for(preset), preset.name)
    assert again.settings() == built and completed is not None and not completed.changed


def test_every_radial_preset_says_its_decay() -> None:
    """What a script leaves to its own default, 1, is not ours, 0.2."""
    decays = {preset.name: preset.settings["decay"] for preset in presets_of("radial")}
    assert decays["wan2.1-14b-2x-length"] == decays["hunyuanvideo-4x-length"] == 1.0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.method}-{preset.name}")
def test_every_preset_is_named_once_says_its_source_and_fits_its_model_alone(preset: Preset) -> None:
    assert [other for other in presets_of(preset.method) if other.name == preset.name] == [preset]
    assert "arXiv" in preset.source and preset.settings
    if preset.by_name:
        assert fitting(preset.method, facts_for(preset)) is not preset
        return
    fit = [other for other in presets_of(preset.method) if other.config == preset.config and not other.by_name]
    assert [other for other in fit if other.experts == preset.experts] == [preset]
    wanted = facts_for(preset)
    for name in preset.config:  # any other number is another model
        other = facts(preset.root_class, dict(preset.config) | {name: 7}, preset.experts)
        assert fitting(preset.method, other) is None
    assert fitting(preset.method, facts("OtherTransformer", dict(preset.config), preset.experts)) is None
    assert fitting(preset.method, ModelFacts(("Mine", *wanted.classes), wanted.config, wanted.experts)) is preset


@pytest.mark.parametrize(
    ("method", "model", "wanted"),
    [
        ("radial", facts(WAN, WAN_14B), {"decay": 0.2, "dense_steps": 0.24, "dense_layers": 1, "sink": True}),
        ("radial", facts(WAN, WAN_14B, 2), {"decay": 0.8, "dense_steps": 0.275, "dense_layers": 1, "sink": True}),
        ("radial", facts(HUNYUAN, HUNYUAN_13B), {"decay": 0.95, "dense_steps": 0.24, "sink": False}),
        ("adaspa", facts(HUNYUAN, HUNYUAN_13B), {"density": 0.2, "block": 64, "dense_steps": 0.2}),
        ("vmoba", facts(WAN, {"num_layers": 30, "num_attention_heads": 12}), {"amount": (3, 20, 15), "chunk": 2}),
        ("neighborhood", facts(HUNYUAN, HUNYUAN_13B), {"window": (0.6, 0.5, 0.3), "dense_steps": 0.3}),
        ("compensated", facts(WAN, WAN_14B), {"tau": 1.0, "dense_steps": 0.2, "dense_layers": 1}),
        ("agent", facts("UNet2DConditionModel", {"cross_attention_dim": 768}), {"switch": 0.4, "merge": 0.4}),
        ("grid", facts(WAN, WAN_14B), {"density": 0.3, "dense_steps": 0.2}),
        ("grid", facts(WAN, WAN_14B | {"in_channels": 36}), {"density": 0.3, "dense_steps": 0.35}),
        ("grid", facts(HUNYUAN, HUNYUAN_13B), {"density": 0.25, "dense_steps": 0.1}),
        ("cluster", facts(WAN, WAN_14B), {"top_p": 0.9, "q_clusters": 300, "k_clusters": 1000, "dense_steps": 0.2}),
        ("cluster", facts(HUNYUAN, HUNYUAN_13B), {"q_clusters": 400, "first_iterations": 50, "dense_steps": 0.1}),
        ("radial", facts(WAN, {"num_layers": 6, "num_attention_heads": 3}), None),  # shapes-wan
        ("radial", facts("FluxTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}), None),
        ("neighborhood", facts("FluxTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}), None),
        ("block_routing", facts(WAN, WAN_14B), None),
    ],
)
def test_which_settings_a_model_gets(method: str, model: ModelFacts, wanted: dict[str, Any] | None) -> None:
    completed = complete(method, {}, model)
    if wanted is None:
        assert completed.preset is None and completed.settings == {} and completed.describe() is None
    else:
        assert wanted.items() <= completed.settings.items()


def test_presets_of_vmoba_are_those_of_its_module() -> None:
    chosen = named("vmoba", "wan2.1-1.3b", facts(WAN, {}))
    assert chosen.settings == VMOBA_PRESETS["wan-1.3b-480x832"] | {"dense_steps": 0.24}


@pytest.mark.parametrize(
    ("method", "given", "preset", "wanted", "absent", "changed"),
    [
        ("radial", {"decay": 0.5}, "auto", {"decay": 0.5, "dense_layers": 0}, (), ("decay",)),
        ("radial", {"decay": 0.95}, "auto", {"decay": 0.95}, (), ()),  # what it is anyway
        ("radial", {"decay": 0.5}, None, {"decay": 0.5}, ("dense_layers", "sink"), None),
        ("radial", {"sink": True}, "wan2.2-a14b", {"decay": 0.8, "sink": True}, (), ()),
        ("adaspa", {"recall": 0.9}, "auto", {"recall": 0.9, "block": 64}, ("density",), ("density",)),
        ("compensated", {"density": 0.1}, "auto", {"density": 0.1}, ("tau", "variance"), ("tau", "variance")),
        ("grid", {"pattern": "stride"}, "auto", {"density": 0.25}, ("first_frame",), ("pattern", "first_frame")),
        ("cluster", {"density": 0.1}, "auto", {"density": 0.1}, ("top_p",), ("top_p", "min_kc_ratio")),
        ("neighborhood", {"window": 0.5}, "auto", {"window": 0.5}, ("stride",), ("window", "stride")),
        ("vmoba", {"select": "threshold"}, "wan2.1-1.3b", {"chunk": 2}, ("amount",), ("select", "scope", "amount")),
        ("vmoba", {"amount": 9}, "wan2.1-1.3b", {"amount": 9, "select": "top_k"}, (), ("amount",)),
        ("radial", {"schedule": Schedule()}, "auto", {"decay": 0.95}, ("dense_steps", "dense_layers"), None),
    ],
)
def test_what_the_user_gives_wins_and_takes_its_rivals_along(
    method: str,
    given: dict[str, Any],
    preset: str | None,
    wanted: dict[str, Any],
    absent: tuple[str, ...],
    changed: tuple[str, ...] | None,
) -> None:
    completed = complete(method, given, facts(HUNYUAN, HUNYUAN_13B), preset)
    assert wanted.items() <= completed.settings.items() and given.items() <= completed.settings.items()
    assert not set(absent) & set(completed.settings)
    ATTENTION[method](**completed.settings)
    if changed is not None:
        assert set(completed.changed) == set(changed)
        assert all(name in str(completed.describe()) for name in changed)


def test_a_schedule_without_dense_steps_has_those_of_the_preset() -> None:
    given = {"schedule": {"dense_layers": [0, 3]}}
    recipe, completed = recipe_by_name("radial", given, facts(WAN, WAN_14B, 2))
    assert completed is not None and completed.changed == ("dense_layers",)
    assert recipe.schedule == Schedule(dense_steps=0.275, dense_layers=(0, 3))
    assert given == {"schedule": {"dense_layers": [0, 3]}}  # as the user had it


@pytest.mark.parametrize(
    ("method", "lower", "given", "wanted"),
    [
        ("radial", {"decay": 0.3, "block": 64}, {"decay": 0.5}, {"decay": 0.5, "block": 64}),
        ("adaspa", {"recall": 0.9, "block": 64}, {"density": 0.1}, {"density": 0.1, "block": 64}),
        ("cluster", {"density": 0.1}, {"top_p": 0.9}, {"top_p": 0.9}),
        ("learned_gate", {"threshold": 0.01}, {"density": 0.2}, {"density": 0.2}),
        ("compensated", {"density": 0.1}, {"tau": None, "density": 0.2}, {"tau": None, "density": 0.2}),
        (
            "radial",
            {"dense_steps": 3},
            {"schedule": {"dense_layers": 2}},
            {"schedule": {"dense_layers": 2, "dense_steps": 3}},
        ),
        ("radial", {"dense_steps": 3}, {"schedule": {"dense_steps": 1}}, {"schedule": {"dense_steps": 1}}),
        ("radial", {"dense_steps": 3}, {"schedule": Schedule()}, {"schedule": Schedule()}),
        # Where agents are pooled, the warm-up is not that of merging, nor is the shortcut.
        ("agent", {"dense_steps": 0}, {"mode": "pool", "schedule": {}}, {"mode": "pool", "schedule": {}}),
        ("agent", {"shortcut": 0.075, "merge": 0.4}, {"mode": "pool"}, {"mode": "pool", "merge": 0.4}),
    ],
)
def test_what_is_given_leaves_room_for_the_rest(
    method: str, lower: dict[str, Any], given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert layered(method, lower, given) == wanted
    ATTENTION[method](**wanted)


def test_rivals_are_settings_of_the_method() -> None:
    for method, replaces in REPLACES.items():
        for known in (inspect.signature(ATTENTION[name]).parameters for name in ATTENTION if method in (name, "all")):
            assert {*replaces, *(name for names in replaces.values() for name in names)} <= set(known)


@pytest.mark.parametrize(
    ("method", "preset", "words"),
    [
        ("radial", "wan", ["radial has no preset 'wan'", "fit this model: wan2.1-14b, wan2.1-14b-4-steps", "hunyuan"]),
        ("vmoba", "wan", ["fit this model: none", "other models: wan2.1-1.3b"]),
        ("block_routing", "wan", ["fit this model: none; for other models: none", "None for"]),
        ("radail", "auto", ["unknown attention method 'radail'", "radial", "auto"]),
        ("radail", "wan", ["unknown attention method 'radail'"]),
        ("auto", "wan2.1-14b", ["belongs to one method", '"auto" or None']),
    ],
)
def test_unknown_names_are_refused_with_those_that_fit(method: str, preset: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        recipe_by_name(method, {}, facts(WAN, WAN_14B), preset)
    assert all(word in str(error.value) for word in words), error.value


def test_facts_count_the_experts_of_a_pipeline() -> None:
    class Root:
        def __init__(self) -> None:
            self.config = {"num_layers": 40}

    class Other(Root):
        pass

    one, two = Root(), Root()
    assert facts_of({"transformer": one}).experts == 1
    both = facts_of({"transformer": one, "transformer_2": two})
    assert (both.experts, both.config, both.classes) == (2, {"num_layers": 40}, ("Root", "object"))
    assert facts_of({"transformer": one, "refiner": Other()}).experts == 1
    assert facts_of({"model": object()}).config == {}
