"""What progress may decide in a later session, and what a cache that fails may hide from a search for a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig

from dit_accel.quality.key import key_of
from dit_accel.quality.pairs import Bench, Pair
from dit_accel.quality.profile import ProfileWarning
from dit_accel.quality.progress import Progress, context_of
from dit_accel.quality.sampling import NotFinite, Sampler
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.tuning import tune

from .conftest import HELD_OUT, PROMPTS, TinyPipeline
from .test_tune import FREE, LISTED, SIZE, count_calls

SPEC = CacheSpec(10, "output", "reuse", (0, 3, 6))
PAIR = Pair(PROMPTS[0], 30.0, 0.9, 0.1)


class WithParts(TinyPipeline):
    """With more models beside the transformer."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self._parts = parts

    @property
    def components(self) -> dict[str, Any]:
        return super().components | self._parts


def part(weight: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """With a configuration as those of transformers are, which is no mapping."""
    found: Any = nn.Linear(2, 2)
    nn.init.constant_(found.weight, weight)
    nn.init.zeros_(found.bias)
    found.config = CLIPTextConfig(attention_dropout=dropout)
    return found


def opened(file: Path, pipe: TinyPipeline) -> Progress:
    """The progress of a pipeline."""
    return Progress(file, PROMPTS, context_of(Sampler(pipe, {}), key_of(pipe)))


# ---- seconds of an earlier session ---------------------------------------------------------------------------------


def kept_with(seconds: float, pipe: TinyPipeline, file: Path) -> None:
    """Progress of a tuning for a time, as if every cached call had taken so many seconds."""
    assert not tune(pipe, max_time=13, progress=file, **FREE, **LISTED).is_off
    header, *lines = file.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["pair"]["seconds"] = seconds
    assert records
    file.write_text("\n".join([header, *map(json.dumps, records)]) + "\n")


@pytest.mark.parametrize("seconds", [1000.0, 0.5])
def test_a_time_is_judged_by_seconds_of_this_session(
    pipe: TinyPipeline, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls(pipe, monkeypatch)
    kept_with(seconds, pipe, tmp_path / "kept.jsonl")
    profile = tune(pipe, max_time=13, progress=tmp_path / "kept.jsonl", **FREE, **LISTED)
    assert profile.spec is not None and profile.spec.computed is not None and len(profile.spec.computed) == 6
    assert profile.measured["seconds"] == {"worst": 13, "median": 13}


def test_seconds_of_an_earlier_session_are_not_told_as_those_of_this_one(
    pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls(pipe, monkeypatch)
    kept_with(0.5, pipe, tmp_path / "kept.jsonl")
    with pytest.warns(ProfileWarning, match="nothing is fast enough"):
        profile = tune(pipe, max_time=2, progress=tmp_path / "kept.jsonl", **FREE, **LISTED)
    assert profile.is_off and "takes 0.5 s" not in profile.reason


# ---- pairs of another sampler or another part ----------------------------------------------------------------------


def test_another_setting_of_the_scheduler_is_refused(tmp_path: Path) -> None:
    first, second = (
        TinyPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=karras)) for karras in (False, True)
    )
    opened(tmp_path / "kept.jsonl", first).add(SPEC, 0, PAIR)
    with pytest.raises(ValueError, match="scheduler was"):
        opened(tmp_path / "kept.jsonl", second)
    assert opened(tmp_path / "kept.jsonl", first).pairs == {(SPEC, 0): PAIR}


def test_a_model_that_was_moved_is_the_same(tmp_path: Path) -> None:
    opened(tmp_path / "kept.jsonl", TinyPipeline()).add(SPEC, 0, PAIR)
    moved = TinyPipeline()
    moved.config["_name_or_path"] = "elsewhere/pipeline"
    assert opened(tmp_path / "kept.jsonl", moved).pairs == {(SPEC, 0): PAIR}


@pytest.mark.parametrize("changes", [{"weight": 2.0}, {"dropout": 0.5}])
def test_another_part_of_the_pipeline_is_refused(changes: dict[str, float], tmp_path: Path) -> None:
    opened(tmp_path / "kept.jsonl", WithParts(text_encoder=part(), vae=part())).add(SPEC, 0, PAIR)
    for name in ("text_encoder", "vae"):
        other = WithParts(**({"text_encoder": part(), "vae": part()} | {name: part(**changes)}))
        with pytest.raises(ValueError, match="parts was"):
            opened(tmp_path / "kept.jsonl", other)
    same = WithParts(text_encoder=part(), vae=part())
    assert opened(tmp_path / "kept.jsonl", same).pairs == {(SPEC, 0): PAIR}


def test_weights_on_no_device_are_refused_with_progress_alone(tmp_path: Path) -> None:
    few = FREE | LISTED | {"num_inference_steps": 8, "target_psnr": 20.0}
    pipe = WithParts(text_encoder=nn.Linear(2, 2, device=torch.device("meta")))
    with pytest.raises(ValueError, match=r"weights of text_encoder are on no device.*leave progress out"):
        tune(pipe, progress=tmp_path / "kept.jsonl", **few)
    assert not pipe.calls and not (tmp_path / "kept.jsonl").exists()
    with pytest.warns(ProfileWarning, match="8 steps are too few"):
        assert tune(pipe, **few).is_off


# ---- caches that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failing", "seconds", "found"), [((2, 3), 13, 6), ((2, 3), 9, 4), ((5,), 11, 4)])
def test_a_cache_that_fails_hides_no_other_from_a_time(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...], seconds: float, found: int
) -> None:
    """Neither slower ones, nor faster ones where all slower ones are too slow."""
    stock = Bench.pair

    def pair(self: Bench, spec: CacheSpec, number: int, timed: bool = False) -> Pair:
        if spec.computed is not None and len(spec.computed) in failing:
            raise NotFinite("the pipeline gave NaN")
        return stock(self, spec, number, timed)

    count_calls(pipe, monkeypatch)
    monkeypatch.setattr(Bench, "pair", pair)
    profile = tune(pipe, max_time=seconds, **FREE, **LISTED)
    assert profile.spec is not None and profile.spec.computed is not None, profile.reason
    assert len(profile.spec.computed) == found


# ---- kinds that are not wanted -------------------------------------------------------------------------------------


def test_what_progress_knows_of_other_kinds_is_not_chosen(
    pipe: TinyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, everyone = tmp_path / "kept.jsonl", [*PROMPTS, *HELD_OUT]
    kept = Progress(file, everyone, context_of(Sampler(pipe, SIZE), key_of(pipe)))
    for number, prompt in enumerate(everyone):
        perfect = Pair(prompt, 100.0, 1.0, 1e-6, seconds=0.001, dense_seconds=1.0)
        kept.add(CacheSpec(10, "whole", "reuse", (0, 5)), number, perfect)
    monkeypatch.setattr("dit_accel.quality.tuner.last_good", lambda *_: None)  # no walk finds anything
    profile = tune(pipe, target_psnr=12, progress=file, **FREE, **LISTED)
    assert profile.spec is not None and profile.spec.scope != "whole"
