"""The search for settings of a given density."""

from __future__ import annotations

import pytest
import torch

from dit_accel.inspect.tuning import OTHER_KNOBS, Knob, knob_of, plan_of, tune
from dit_accel.processors import ATTENTION, AgentAttnProcessor, GridAttnProcessor, RadialAttnProcessor

from .oracle import call_for, video

CPU = torch.device("cpu")


def test_a_knob_is_turned_until_the_density_is_there() -> None:
    options, density = tune(lambda options: options["size"] ** 3, [Knob("size", 0.01, 1.0)], 0.25)
    assert density == pytest.approx(0.25, rel=0.011)
    assert options["size"] == pytest.approx(0.25 ** (1 / 3), rel=0.01)


def test_the_target_itself_is_tried_first() -> None:
    asked: list[float] = []

    def density(options: dict[str, float]) -> float:
        asked.append(options["size"])
        return options["size"]

    assert tune(density, [Knob("size", 0.01, 1.0)], 0.25) == ({"size": 0.25}, 0.25)
    assert asked == [0.25]


def test_the_next_knob_helps_where_one_does_not_reach() -> None:
    def density(options: dict[str, float]) -> float:
        return 0.2 + 0.5 * options["size"] if options["far"] else 0.6 + 0.4 * options["size"]

    knobs = [Knob("size", 0.001, 1.0, {"far": far}) for far in (False, True)]
    options, found = tune(density, knobs, 0.25)
    assert options["far"]
    assert found == pytest.approx(0.25, rel=0.011)
    options, found = tune(density, knobs[:1], 0.25)
    assert found == pytest.approx(0.6, abs=0.01)  # as near as it comes


def test_without_sparse_calls_there_is_nothing_to_tune() -> None:
    with pytest.raises(ValueError, match="no call is sparse"):
        tune(lambda options: None, [Knob("size", 0.01, 1.0)], 0.25)


def test_a_search_may_be_a_rough_one() -> None:
    asked: list[float] = []

    def density(options: dict[str, float]) -> float:
        asked.append(options["size"])
        return options["size"] ** 3

    _, found = tune(density, [Knob("size", 0.01, 1.0)], 0.25, near=0.2)
    assert found == pytest.approx(0.25, rel=0.2)
    rough = len(asked)
    tune(density, [Knob("size", 0.01, 1.0)], 0.25, near=0.001)
    assert rough < len(asked) - rough
    asked.clear()
    tune(density, [Knob("size", 0.01, 1.0)], 0.25, near=0.0, turns=3)
    assert len(asked) == 3


def test_every_knob_is_a_setting_of_its_method() -> None:
    assert set(OTHER_KNOBS) <= set(ATTENTION)
    for name, method in ATTENTION.items():
        if knob_of(name).name in method().settings():
            assert method(**knob_of(name).turned(0.5)).settings()[knob_of(name).name] in (0.5, [0.5] * 3)
    assert knob_of("adaspa").name == "density"


def test_plans_are_those_of_a_first_search() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 2048, 16) for _ in range(3))
    call = call_for(video((8, 16, 16)))
    radial = RadialAttnProcessor(block=64, schedule={"layer_budget": {0: 0.5}})
    half = RadialAttnProcessor(block=64, decay=0.5 * radial.decay)
    assert torch.equal(plan_of(radial, call, query, key, value).to_bool(), half.build_plan(call.layout, CPU).to_bool())
    grid = GridAttnProcessor(density=0.3)
    setup = grid.at_step(grid.set_up(call.site, call.layout, CPU), call.site, call.state)
    wanted = grid.find_plan(query, key, setup, scale=None, value=value).element_mask()
    assert torch.equal(plan_of(grid, call, query, key, value).element_mask(), wanted)
    assert not torch.equal(grid.find_plan(query, key, setup, scale=None).element_mask(), wanted)  # values count
    with pytest.raises(ValueError, match="AgentAttnProcessor has no plan"):
        plan_of(AgentAttnProcessor(), call, query, key, value)
