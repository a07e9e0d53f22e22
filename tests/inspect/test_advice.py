"""Conclusions from figures that were made up for them, and settings that methods accept."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.inspect.advice import advise, best_densities, error_by_layer, hard_layers
from dit_accel.inspect.methods import Candidate
from dit_accel.processors import processor_by_name

from .oracle import call_for, video


def layer(index, errors, recall=None, densities=None, best="compensated", expert="transformer"):
    """The part of a layer's record that advice looks at; ``errors`` by method, of two heads each."""
    methods = {
        name: {"error": list(pair), "recall": [0.5, 0.5], "density": (densities or {}).get(name, [0.25, 0.25])}
        for name, pair in errors.items()
    }
    curve = recall or {"0.1": [0.3, 0.3], "0.25": [0.6, 0.6], "0.5": [0.9, 0.9]}
    heads = len(next(iter(curve.values())))
    return {
        "layer": index,
        "expert": expert,
        "heads": heads,
        "methods": methods,
        "recall": {"64": curve},
        "best": [best] * heads,
    }


def tried(*names):
    """Candidates that have seen a call."""
    query = torch.randn(1, 2, 640, 8)
    found = [Candidate(name, 0.25) for name in names]
    for candidate in found:
        candidate.plan(call_for(video((10, 8, 8))), query, query, query)
    return found


def test_the_method_of_the_smallest_error_and_its_hard_layers():
    candidates = tried("compensated", "block_routing")
    errors = [(0.02, 0.04), (0.3, 0.5), (0.03, 0.03), (0.05, 0.05)]
    layers = [layer(n, {"compensated": pair, "block_routing": (0.6, 0.6)}) for n, pair in enumerate(errors)]
    advice = advise(layers, candidates)
    assert advice["method"] == "compensated" and advice["hard_layers"] == [1]
    assert advice["error_by_layer"] == {"0": 0.03, "1": 0.4, "2": 0.03, "3": 0.05}
    assert advice["methods"]["compensated"]["error"] == pytest.approx(1.02 / 8, abs=1e-4)
    assert advice["methods"]["compensated"]["heads_won"] == 8 and advice["methods"]["block_routing"]["heads_won"] == 0
    assert advice["suggestion"]["schedule"]["dense_layers"] == [1]
    assert advice["suggestion"]["density"] == pytest.approx(0.25, rel=0.1)


def test_a_suggestion_is_what_the_method_takes():
    easy = {"0.1": [0.9, 0.7], "0.25": [0.95, 0.9], "0.5": [1.0, 0.95]}
    layers = [layer(0, {"compensated": (0.1, 0.1)}, recall=easy), layer(1, {"compensated": (0.1, 0.1)})]
    (candidate,) = tried("compensated")
    suggestion = dict(advise(layers, [candidate])["suggestion"])
    recipe = processor_by_name(suggestion.pop("attention"), **suggestion)
    budget = suggestion["schedule"]["layer_budget"]
    assert budget[0] < 1 < budget[1], "the layer that is concentrated gains less by more"
    assert sum(budget.values()) == pytest.approx(2, abs=0.02), "and the mean stays"
    heads = suggestion["schedule"]["head_budget"]
    assert heads[0][0] < 1 < heads[0][1] and heads[1] == [1, 1], "heads alike get alike"
    assert recipe.settings()["density"] == suggestion["density"]


def test_heads_of_a_layer_that_gets_nothing_are_alike():
    """Half of one layer holds all of its attention, which uses up a quarter of both."""
    errors = {"compensated": (0.1, 0.1)}
    layers = [layer(0, errors, recall={"0.5": [1.0, 1.0]}), layer(1, errors, recall={"0.5": [0.5, 0.5]})]
    suggestion = dict(advise(layers, tried("compensated"))["suggestion"])
    assert suggestion["schedule"]["layer_budget"] == {0: 2.0, 1: 0.25}
    assert suggestion["schedule"]["head_budget"] == {0: [1.0, 1.0], 1: [1.0, 1.0]}
    processor_by_name(suggestion.pop("attention"), **suggestion)


def test_methods_whose_heads_share_a_plan_get_no_budget_by_head():
    layers = [layer(n, {"radial": (0.1, 0.1)}, densities={"radial": [0.8, 0.8]}) for n in range(2)]
    candidate = Candidate("radial", 0.8)
    query = torch.randn(1, 2, 640, 8)
    candidate.plan(call_for(video((10, 8, 8))), query, query, query)
    suggestion = dict(advise(layers, [candidate])["suggestion"])
    assert "head_budget" not in suggestion["schedule"] and suggestion["schedule"]["layer_budget"] == {0: 1, 1: 1}
    processor_by_name(suggestion.pop("attention"), **suggestion)


def test_experts_share_their_layers():
    layers = [layer(0, {"compensated": pair}, expert=e) for e, pair in (("a", (0.1, 0.1)), ("b", (0.3, 0.3)))]
    advice = advise(layers, tried("compensated"))
    assert advice["error_by_layer"] == {"0": 0.2}
    assert len(advice["suggestion"]["schedule"]["head_budget"][0]) == 2


def test_methods_that_are_too_dense_or_miss_layers_are_not_suggested():
    both = {"compensated": (0.3, 0.3), "block_routing": (0.1, 0.1)}
    dense = [layer(0, both, densities={"block_routing": [0.4, 0.4]})]
    candidates = tried("compensated", "block_routing")
    assert advise(dense, candidates)["method"] == "compensated"
    missing = [layer(0, both), layer(1, {"compensated": (0.3, 0.3)})]
    advice = advise(missing, candidates)
    assert advice["method"] == "compensated" and advice["methods"]["block_routing"]["layers"] == 1
    nobody = advise([layer(0, {}, best=None)], candidates)
    assert nobody["method"] is None and nobody["suggestion"] is None
    assert nobody["methods"]["compensated"]["error"] is None


def test_high_errors_everywhere_are_nobody_s_exception():
    assert hard_layers({0: 0.5, 1: 0.6, 2: 0.55}) == []
    assert hard_layers({0: 0.01, 1: 0.01, 2: 0.09}) == [], "below a tenth is not hard"
    assert hard_layers({0: 0.05, 1: 0.06, 2: 0.13, 3: 0.11}) == []
    assert hard_layers({0: 0.05, 1: 0.06, 2: 0.05, 3: 0.12}) == [3]
    records = [layer(1, {"x": (0.2, 0.4)}), layer(0, {"x": (0.1, 0.1)})]
    assert error_by_layer(records, "x") == pytest.approx({0: 0.1, 1: 0.3})


def concave(steps):
    """A recall curve of rising densities, steep first: the running sums of sorted shares."""
    shares = sorted(steps, reverse=True)
    total = sum(shares)
    densities = [(at + 1) / len(shares) for at in range(len(shares))]
    return densities[:-1], [sum(shares[: at + 1]) / total for at in range(len(shares) - 1)]


def recall(curve, density):
    """On straight lines between the points of a curve."""
    points = [(0.0, 0.0), *zip(*curve, strict=True), (1.0, 1.0)]
    for (low, under), (high, over) in itertools.pairwise(points):
        if density <= high:
            return under + (over - under) * (density - low) / (high - low)
    return 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=3),
    st.sampled_from([1 / 6, 1 / 3, 0.5, 2 / 3, 1.0]),
)
def test_no_other_densities_of_the_same_mean_keep_more(shares, density):
    """Every division of the blocks, in sixths of each head."""
    curves = [concave(part) for part in shares]
    found = best_densities(curves, density)
    assert sum(found) == pytest.approx(density * len(curves)) and all(0 <= part <= 1 + 1e-9 for part in found)
    kept = sum(recall(curve, part) for curve, part in zip(curves, found, strict=True))
    for sixths in itertools.product(range(7), repeat=len(curves)):
        if sum(sixths) <= 6 * density * len(curves) + 1e-9:
            other = sum(recall(curve, part / 6) for curve, part in zip(curves, sixths, strict=True))
            assert other <= kept + 1e-9
