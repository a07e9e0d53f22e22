"""Every method takes a schedule, gives it back in its settings, and refuses budgets that it cannot follow."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import Schedule
from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.layout import TokenLayout
from dit_accel.processors import ATTENTION, RadialAttnProcessor, processor_by_name
from dit_accel.processors.budget import block_counts, count_tensor

SITE = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
BUDGETS: dict[str, Any] = {"step_budget": [[0.0, 2.0], [0.5, 1.0]], "layer_budget": {"1": 0.5}}
HEADS: dict[str, Any] = {"head_budget": {"1": [1.0, 0.5]}}
# What a method needs before its budget can be scaled.
SCALED: dict[str, dict[str, Any]] = {
    "compensated": {"density": 0.2},
    "cluster": {"density": 0.2},
    "vmoba": {"select": "top_k"},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_shorthands_are_a_schedule(name: str) -> None:
    own = processor_by_name(name).schedule
    short = processor_by_name(name, dense_steps=3, dense_layers=[1, 2])
    assert short.schedule == Schedule(dense_steps=3, dense_layers={1, 2})
    for given_so in (Schedule(dense_steps=3, dense_layers=[2, 1]), {"dense_steps": 3, "dense_layers": [1, 2]}):
        processor = processor_by_name(name, schedule=given_so)
        assert processor.schedule == short.schedule
        assert processor.settings() == short.settings()
    # What a mapping leaves out is the method's own.
    assert processor_by_name(name, schedule={"dense_steps": own.dense_steps}).schedule == own


@pytest.mark.parametrize("name", ATTENTION)
def test_settings_build_an_equal_recipe_after_json(name: str) -> None:
    recipes = [processor_by_name(name), processor_by_name(name, dense_steps=0.5, dense_layers=[0, 3])]
    if ATTENTION[name].scales_budget:
        heads = HEADS if ATTENTION[name].scales_heads else {}
        recipes.append(processor_by_name(name, **SCALED.get(name, {}), schedule=BUDGETS | heads))
        assert recipes[-1].schedule.has_budgets
    for recipe in recipes:
        plain = recipe.settings()
        assert json.loads(json.dumps(plain)) == plain
        again = processor_by_name(name, **json.loads(json.dumps(plain)))
        assert again.settings() == plain and again.schedule == recipe.schedule
        assert repr(again) == repr(recipe)


@pytest.mark.parametrize("name", ATTENTION)
def test_budgets_that_cannot_be_followed_are_refused(name: str) -> None:
    method = ATTENTION[name]
    if not method.scales_budget:
        with pytest.raises(ValueError, match=f"{method.__name__} cannot follow step_budget"):
            processor_by_name(name, schedule=BUDGETS)
    elif not method.scales_heads:
        with pytest.raises(ValueError, match=f"{method.__name__} cannot follow head_budget: its plan is shared"):
            processor_by_name(name, schedule=HEADS)
    else:
        processor_by_name(name, **SCALED.get(name, {}), schedule=BUDGETS | HEADS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("radial", {"rule": "paper", "schedule": BUDGETS}, "use rule='authors'"),
        ("block_routing", {"select": "top_p", "schedule": BUDGETS}, "use select='top_k'"),
        ("block_routing", {"select": "threshold", "schedule": BUDGETS}, "use select='top_k'"),
        ("block_routing", {"head_shared": True, "schedule": HEADS}, "use step_budget or layer_budget"),
        ("compensated", {"tau": 1.0, "schedule": BUDGETS}, "give a density instead"),
        ("compensated", {"schedule": HEADS}, "give a density instead"),
        ("adaspa", {"recall": 0.9, "schedule": BUDGETS}, "use a density"),
        ("vmoba", {"schedule": BUDGETS}, "use select='top_k'"),
        ("vmoba", {"select": "top_k", "scope": "all", "schedule": HEADS}, "use scope='head' or 'query'"),
        ("adaspa", {"dense_steps": 3, "schedule": {}}, "both a schedule and dense_steps were given"),
        ("radial", {"dense_layers": 0, "dense_steps": 0, "schedule": Schedule()}, "dense_steps and dense_layers were"),
        ("radial", {"schedule": {"steps": 3}}, "a schedule has no 'steps'"),
        ("radial", {"schedule": {"_fractions": ()}}, "a schedule has no '_fractions'"),
        ("radial", {"schedule": 3}, r"schedule is a dit_accel.Schedule or a mapping of its arguments; got 3"),
        ("radial", {"schedule": {"step_budget": [[0.0, 0.0]]}}, "must be a positive number"),
        ("radial", {"schedule": {"layer_budget": 2.0}}, "must map layers to factors"),
    ],
)
def test_what_settings_leave_no_room_for_is_said(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name(name, **options)


def test_heads_and_layers_that_a_model_lacks_are_refused() -> None:
    sites = {SiteInfo(f"blocks.{layer}.attn1", "self", layer, 3, "transformer"): 4 for layer in range(3)}
    processor_by_name("block_routing", schedule={"head_budget": {2: [1, 2, 3, 4]}}).check_schedule(sites)
    with pytest.raises(ValueError, match=r"2 factors for layer 1, but blocks.1.attn1 has 4 heads"):
        processor_by_name("block_routing", schedule=HEADS).check_schedule(sites)
    for budget in ({"layer_budget": {3: 1.0}}, {"head_budget": {3: [1.0] * 4}}):
        with pytest.raises(ValueError, match=r"names layer 3; this model has layers 0 to 2"):
            processor_by_name("block_routing", schedule=budget).check_schedule(sites)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(1, 9), st.sampled_from([0.05, 0.25, 1 / 3, 1.0])),
    st.integers(1, 40),
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=4),
)
def test_counts_are_scaled_parts_rounded_up(amount: int | float, blocks: int, factors: list[float]) -> None:
    counts = block_counts(amount, blocks, factors)
    for count, factor in zip(counts, factors, strict=True):
        wanted = amount * factor if isinstance(amount, int) else amount * factor * blocks
        fitting = [n for n in range(1, blocks + 1) if n >= wanted - 1e-6]
        assert count == (fitting[0] if fitting else blocks)
    tensor = count_tensor(counts, torch.device("cpu"))
    assert tensor[:, 0].tolist() == list(counts) and tensor is count_tensor(counts, torch.device("cpu"))


def test_radial_plans_widen_with_the_budget() -> None:
    """The factor is one on the widths; the density follows it, never the other way."""
    layout, densities = TokenLayout.video_only((9, 12, 18)), []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 16.0):
        schedule = Schedule(dense_steps=0, dense_layers=0, layer_budget={1: factor})
        processor = RadialAttnProcessor(block=64, decay=0.5, mask="element", sink=False, schedule=schedule)
        recipe = processor.for_step(SITE, StepState(0, 0, 9, "cond", "transformer", 0, layout, None))
        assert recipe is processor.for_step(SITE, StepState(1, 8, 9, "uncond", "transformer", 0, layout, None))
        densities.append(recipe.build_plan(layout, torch.device("cpu")).density)
    assert densities == sorted(densities) and densities[0] < 0.8 * densities[-1]
