"""The recipe of learned gates: settings, when it searches, and what it is told of a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.families import Family
from dit_accel.kernels.gate.gate import GateWeights, StepGate, at_level
from dit_accel.layout import TokenLayout
from dit_accel.processors import ATTENTION, LearnedGateAttnProcessor, processor_by_name

SITE = SiteInfo("blocks.1.attn1", "self", 1, 6, "transformer")
VIDEO = TokenLayout.video_only((9, 16, 16))


def state(step: int, timestep: Any = 900.0, layout: TokenLayout = VIDEO) -> StepState:
    when = None if timestep is None else torch.as_tensor(timestep)
    return StepState(0, step, 50, "cond", "transformer", 0, layout, when)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"\(0, 1\].*got 0.0"),
        ({"density": 1.5}, "1.5"),
        ({"density": True}, "True"),
        ({"threshold": 1.0}, r"\(0, 1\), such as 0.002; got 1.0"),
        ({"threshold": 0}, r"\(0, 1\)"),
        ({"threshold": math.nan}, "nan"),
        ({"density": 0.5, "threshold": 0.1}, "two rules"),
        ({"threshold": 0.1, "schedule": {"layer_budget": {2: 0.5}}}, "give a density"),
        ({"search_every": 0}, "1 or more"),
        ({"gates": ""}, "path of a file"),
        ({"gates": 3}, "path of a file.*got 3"),
        ({"compensate": 1}, "True or False"),
        ({"block": 32}, r"64 or 128.*got 32"),
        ({"window": 3}, "window"),
    ],
)
def test_bad_settings_say_what_is_valid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("learned_gate", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"density": 1, "block": 64},
        {"threshold": 0.004, "search_every": 5, "compensate": True, "backend": "gather"},
        {"gates": Path("elsewhere.safetensors"), "schedule": {"dense_steps": 3, "step_budget": [(0.5, 2.0)]}},
    ],
)
def test_settings_build_an_equal_recipe(settings: dict[str, Any]) -> None:
    processor = LearnedGateAttnProcessor(**settings)
    assert processor_by_name("learned_gate", **processor.settings()).settings() == processor.settings()
    assert ATTENTION["learned_gate"] is LearnedGateAttnProcessor


def test_defaults_are_those_of_the_field() -> None:
    processor = LearnedGateAttnProcessor()
    assert (processor.density, processor.block, processor.gates) == (0.25, 64, "shapes-wan")
    assert [s for s in range(50) if processor.is_sparse(SITE, state(s))] == list(range(12, 50))
    first = SiteInfo("blocks.0.attn1", "self", 0, 6, "transformer")
    assert not any(processor.is_sparse(first, state(s)) for s in range(50))
    seldom = LearnedGateAttnProcessor(search_every=3)
    assert [s for s in range(12, 20) if seldom.renews(SITE, state(s))] == [12, 15, 18]


def test_gates_take_only_the_block_they_were_trained_with() -> None:
    assert LearnedGateAttnProcessor(block=64).block == 64
    with pytest.raises(ValueError, match="blocks of 64 tokens; leave out block=128"):
        LearnedGateAttnProcessor(block=128).load()


def test_shipped_gates_are_refused_elsewhere() -> None:
    def layout(root: Any, arguments: Any) -> TokenLayout:
        return VIDEO

    processor = LearnedGateAttnProcessor()
    processor.check_family(Family("WanTransformer3DModel", layout, lambda path, module: "self", ("blocks",)))
    with pytest.raises(ValueError, match=r"not for a Other.*dit-accel train-gate"):
        processor.check_family(Family("Other", layout, lambda path, module: "self", ("blocks",)))
    processor.check_sites({SITE: (3, 64)})
    with pytest.raises(ValueError, match="for 3 heads of 64 channels, this model has 12 of 64 there"):
        processor.check_sites({SITE: (12, 64)})
    with pytest.raises(ValueError, match=r"6 of kind self.*30 sites"):
        processor.check_sites({SiteInfo("blocks.1.attn1", "self", 1, 30, "transformer"): (3, 64)})
    with pytest.raises(ValueError, match="layer 9; this model has layers 0 to 5"):
        LearnedGateAttnProcessor(schedule={"layer_budget": {9: 0.5}}).check_schedule({SITE: 3})


@pytest.mark.parametrize("timestep", [400.0, [400.0], [[0.0, 400.0], [0.0, 400.0]]])
def test_a_step_is_told_by_its_timestep(timestep: Any) -> None:
    processor = LearnedGateAttnProcessor()
    setup = processor.set_up(SITE, VIDEO, torch.device("cpu"))
    told = processor.at_step(setup, SITE, state(20, timestep))
    wanted = at_level(processor.load().gate_of(SITE), torch.tensor(0.4))
    assert isinstance(told.gate, StepGate)
    assert all(torch.equal(a, b) for a, b in zip(told.gate, wanted, strict=True))
    assert told.counts is not None and told.counts.tolist() == [[9]]  # of 36 blocks


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = LearnedGateAttnProcessor()
    setup = processor.set_up(SITE, VIDEO, torch.device("cpu"))
    processor.at_step(setup, SITE, state(20))  # makes the counts that all steps share
    q, k = torch.randn(2, 1, 3, VIDEO.length, 64)
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    told = processor.at_step(setup, SITE, state(21, 350.0))
    plan = processor.find_plan(q, k, told, scale=None)
    monkeypatch.undo()
    assert plan.counts.unique().tolist() == [9]


@pytest.mark.parametrize(
    ("text", "sinks", "kept"),
    [(None, [], 2), ((0, 10), [0], 2), ((400, 450), [6, 7], 2), ((400, 600), [6, 7, 8, 9], 2)],
)
def test_text_is_beside_the_density(text: tuple[int, int] | None, sinks: list[int], kept: int) -> None:
    start = text[1] if text and text[0] == 0 else 0
    layout = TokenLayout((1, 20, 20), (start, start + 400), text)
    processor = LearnedGateAttnProcessor()
    setup = processor.set_up(SITE, layout, torch.device("cpu"))
    told = processor.at_step(setup, SITE, state(20, layout=layout))
    q, k = torch.randn(2, 1, 3, layout.length, 64)
    plan = processor.find_plan(q, k, told, scale=None).to_bool()
    rows = [i for i in range(plan.shape[-1]) if i not in sinks]
    assert told.counts is not None and told.counts.tolist() == [[kept]] and setup.blocks == len(rows)
    assert plan[:, :, sinks].all() and plan[..., sinks].all()
    assert (plan[:, :, rows].sum(-1) == kept + len(sinks)).all()


@pytest.mark.parametrize(
    ("options", "text", "width"),
    [
        ({}, None, 9),  # a quarter of 36 blocks
        ({}, (2304, 2310), 37),  # rows of text are as long as there are blocks
        ({"threshold": 0.01}, None, 36),
        ({"schedule": {"step_budget": [(0.5, 2)]}}, None, 36),
    ],
)
def test_lists_are_as_long_as_any_row_may_be(options: dict[str, Any], text: Any, width: int) -> None:
    layout = TokenLayout(VIDEO.grid, VIDEO.visual, text)
    processor = LearnedGateAttnProcessor(**options)
    told = processor.at_step(processor.set_up(SITE, layout, torch.device("cpu")), SITE, state(40, layout=layout))
    q, k = torch.randn(2, 1, 3, layout.length, 64)
    plan = processor.find_plan(q, k, told, scale=None)
    assert plan.indices.shape[-1] == width >= int(plan.counts.max())


def test_autocast_changes_no_plan() -> None:
    processor = LearnedGateAttnProcessor()
    setup = processor.set_up(SITE, VIDEO, torch.device("cpu"))
    q, k = torch.randn(2, 1, 3, VIDEO.length, 64, generator=torch.Generator().manual_seed(0))
    plain = processor.find_plan(q, k, processor.at_step(setup, SITE, state(20)), scale=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = processor.find_plan(q, k, processor.at_step(setup, SITE, state(20)), scale=None)
    assert torch.equal(cast.to_bool(), plain.to_bool())


def test_a_timestep_of_the_host_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = LearnedGateAttnProcessor()
    setup = processor.set_up(SITE, VIDEO, torch.device("cpu"))
    move: Any = torch.Tensor.to
    waits = []

    def spy(x: torch.Tensor, *places: Any, non_blocking: bool = False, **named: Any) -> torch.Tensor:
        waits.append(not non_blocking)
        moved: torch.Tensor = move(x, *places, non_blocking=non_blocking, **named)
        return moved

    monkeypatch.setattr(torch.Tensor, "to", spy)
    processor.at_step(setup, SITE, state(20, 400.0))
    assert waits and not any(waits)


def test_weights_go_where_the_model_is() -> None:
    setup = LearnedGateAttnProcessor().set_up(SITE, VIDEO, torch.device("meta"))
    assert isinstance(setup.weights, GateWeights) and setup.weights.query.device.type == "meta"


def test_layouts_and_calls_that_gates_cannot_see() -> None:
    processor, cpu = LearnedGateAttnProcessor(), torch.device("cpu")
    with pytest.raises(ValueError, match="3 padding tokens"):
        processor.set_up(SITE, TokenLayout((1, 2, 4), (0, 8), padding=3), cpu)
    with pytest.raises(ValueError, match="raster order"):
        processor.set_up(SITE, TokenLayout((1, 2, 4), (0, 8), order=torch.arange(8)), cpu)
    setup = processor.set_up(SITE, VIDEO, cpu)
    with pytest.raises(ValueError, match="pass timestep="):
        processor.at_step(setup, SITE, state(20, None))
