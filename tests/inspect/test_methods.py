"""Candidates keep about what is asked for, and say why they cannot."""

from __future__ import annotations

import pytest
import torch

from dit_accel.families import family_of
from dit_accel.inspect import methods
from dit_accel.inspect.methods import Candidate, candidates
from dit_accel.inspect.tuning import OTHER_KNOBS, Knob
from dit_accel.processors import ATTENTION, processor_by_name

from .oracle import call_for, video

GRID = (8, 16, 16)  # 32 blocks of 64


def root(name):
    import diffusers

    return object.__new__(getattr(diffusers, name))


def usable():
    """Methods that can be told a density, but for gates, which fit the model that they were trained on."""
    found = []
    for name in set(ATTENTION) - {"learned_gate"}:
        try:
            Candidate(name, 0.3)
        except ValueError:
            continue
        found.append(name)
    return sorted(found)


def test_every_method_that_chooses_pairs_can_be_told_a_density():
    """One that refuses would be left out below, silently."""
    assert usable() == sorted(set(ATTENTION) - {"learned_gate", "agent"})


@pytest.mark.parametrize("name", usable())
def test_plans_have_about_the_density_asked_for(name):
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, 2048, 16) for _ in range(2))
    candidate = Candidate(name, 0.75 if name == "radial" else 0.3)  # radial keeps whole neighboring frames
    call = call_for(video(GRID))
    recipe, plan = candidate.plan(call, query, key, key)
    assert plan.density == pytest.approx(candidate.density, rel=0.2)
    assert plan.density == pytest.approx(float(plan.element_mask().double().mean()), abs=1e-6)
    assert processor_by_name(name, **recipe.settings()).settings() == recipe.settings()
    again = Candidate(name, candidate.density).plan(call, query, key, key)[1]
    assert torch.equal(again.element_mask(), plan.element_mask())
    schedule = {"layer_budget": {0: 0.5}} if candidate.follows_budgets() else {}
    schedule |= {"head_budget": {0: [2.0, 1.0]}} if candidate.follows_head_budgets() else {}
    processor_by_name(name, **candidate.amount_found(), schedule=schedule)


def test_the_search_goes_on_where_the_first_guess_is_off(monkeypatch):
    """A method whose density is the cube of its setting."""

    class Cubed(Knob):
        def turned(self, value):
            return super().turned(max(value**3, 1e-3))

    monkeypatch.setitem(OTHER_KNOBS, "block_routing", Cubed("amount", 0.005, 1.0))
    query = torch.randn(1, 1, 4096, 8)
    candidate = Candidate("block_routing", 0.25)
    _, plan = candidate.plan(call_for(video((16, 16, 16))), query, query, query)
    assert plan.density == pytest.approx(0.25, rel=0.05)


def test_static_plans_are_built_once_and_dynamic_ones_at_each_call(monkeypatch):
    built = []
    real = methods.plan_of
    monkeypatch.setattr(methods, "plan_of", lambda *parts: built.append(parts[0]) or real(*parts))
    query = torch.randn(1, 1, 2048, 8)
    for name, more in (("neighborhood", 0), ("block_routing", 1)):
        candidate = Candidate(name, 0.25)
        candidate.plan(call_for(video(GRID)), query, query, query)
        before = len(built)
        candidate.plan(call_for(video(GRID)), query, query, query)
        assert len(built) - before == more


def test_methods_that_cannot_act_are_named_with_the_reason():
    found, refused = candidates(None, 0.25, [family_of(root("UNet2DConditionModel"))])
    assert "radial" not in {candidate.name for candidate in found} and "single images" in refused["radial"]
    assert {candidate.name for candidate in found} | set(refused) == set(ATTENTION)
    with pytest.raises(ValueError, match="single images"):
        candidates(["radial"], 0.25, [family_of(root("UNet2DConditionModel"))])
    video_methods, _ = candidates(None, 0.25, [family_of(root("WanTransformer3DModel"))])
    assert {"radial", "adaspa", "compensated"} <= {candidate.name for candidate in video_methods}


@pytest.mark.parametrize(("name", "density"), [("magic", 0.2), ("radial", 0.0), ("radial", 1.5)])
def test_bad_candidates_are_refused(name, density):
    with pytest.raises(ValueError, match=r"unknown attention method|in \(0, 1\]"):
        Candidate(name, density)


def test_nothing_is_found_before_the_first_call():
    candidate = Candidate("radial", 0.5)
    assert candidate.chosen(call_for(video(GRID))) is None
    with pytest.raises(ValueError, match="has not been tried"):
        candidate.amount_found()
