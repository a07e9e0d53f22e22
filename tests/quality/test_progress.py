"""A tuning that was cut off goes on from its file, and never from one of other settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel.caching.policies.static import Static
from dit_accel.quality.key import key_of
from dit_accel.quality.pairs import Bench, Pair
from dit_accel.quality.profile import Profile
from dit_accel.quality.progress import Progress, context_of
from dit_accel.quality.sampling import Generation, Sampler
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.tuning import tune

from .conftest import HELD_OUT, PROMPTS, TinyPipeline

ASKED: dict[str, Any] = {"prompts": PROMPTS, "held_out": HELD_OUT, "target_psnr": 20.0, "coverage": None,
                         "min_speed_up": 0.01, "kinds": ("listed steps",), "num_inference_steps": 10}  # fmt: skip
SPEC = CacheSpec(10, "output", "reuse", (0, 3, 6))


@pytest.fixture(autouse=True)
def _seconds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each computed step: which cache is the fastest does not depend on the machine."""
    stock = Sampler.run

    def run(self: Sampler, prompt: str, number: int) -> Generation:
        handle = dit_accel.acceleration_of(self.pipe)
        policies = [] if handle is None else [engine.cache.policy for engine in handle.caches.engines]
        computed = [len(policy.computed()) for policy in policies if isinstance(policy, Static)]
        return replace(stock(self, prompt, number), seconds=float(computed[0] if computed else 10))

    monkeypatch.setattr(Sampler, "run", run)


def cut_after(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next tuning is interrupted once it has measured so many pairs."""
    stock, left = Bench.pair, [pairs]

    def pair(self: Bench, spec: CacheSpec, number: int, timed: bool = False) -> Pair:
        if not left[0]:
            raise KeyboardInterrupt
        made = self.runs["cached"]
        found = stock(self, spec, number, timed)
        left[0] -= self.runs["cached"] - made
        return found

    monkeypatch.setattr(Bench, "pair", pair)


def found_in(profile: Profile) -> Any:
    """What does not depend on the clock."""
    clockless = [{name: value for name, value in pair.items() if "seconds" not in name}
                 for pair in profile.measured["pairs"]]  # fmt: skip
    return profile.spec, profile.noise_floor["psnr"], clockless


@pytest.mark.parametrize("pairs", [1, 9])
def test_it_goes_on_where_it_was_cut_off(pairs: int, tmp_path: Path) -> None:
    whole, file, told = tune(TinyPipeline(), **ASKED), tmp_path / "deep" / "kept.jsonl", list[str]()
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        cut_after(pairs, monkeypatch)
        tune(TinyPipeline(), progress=file, **ASKED)
    profile = tune(TinyPipeline(), progress=str(file), tell=told.append, **ASKED)
    assert found_in(profile) == found_in(whole)
    made, wanted = profile.settings["generations"], whole.settings["generations"]
    assert made["cached"] == wanted["cached"] - pairs > 0
    assert told[0] == f"pairs are kept in '{file}', which has {pairs}; the same call goes on from there"
    again = tune(TinyPipeline(), progress=file, **ASKED)
    assert found_in(again) == found_in(whole) and again.measured == profile.measured
    assert again.settings["generations"] == {"dense": len(PROMPTS) + 1, "cached": 0}  # traces, and the noise floor


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"num_inference_steps": 12}, "call was"),
        ({"prompts": ["a", "b"]}, "prompts"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        cut_after(1, monkeypatch)
        tune(TinyPipeline(), progress=file, **ASKED)
    pipe, before = TinyPipeline(), file.read_text()
    with pytest.raises(ValueError, match=rf"other settings \(.*{words}.*delete it"):
        tune(pipe, progress=file, **(ASKED | changes))
    assert not pipe.calls and file.read_text() == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    file, pipe = tmp_path / "kept.jsonl", TinyPipeline()
    context = context_of(Sampler(pipe, {}), key_of(pipe))
    Progress(file, PROMPTS, context).add(SPEC, 0, Pair(PROMPTS[0], 30.0, 0.9, 0.1))
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    with pytest.raises(ValueError, match="key was"):
        Progress(file, PROMPTS, context_of(Sampler(pipe, {}), key_of(pipe)))


def test_pairs_come_back_as_they_were_and_the_latest_counts(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    exact = Pair(PROMPTS[1], float("inf"), 1.0, 0.0, seconds=2.5)
    moving = Pair(PROMPTS[0], 30.25, 0.9, 0.1, motion=0.5, flicker=0.01, lpips=0.2, seconds=2.5, dense_seconds=5.0)
    kept = Progress(file, PROMPTS, {"seed": 0})
    assert not file.exists()
    kept.add(SPEC, 1, exact)
    kept.add(SPEC, 0, Pair(PROMPTS[0], 1.0, 0.1, 0.1))
    kept.add(SPEC, 0, moving)
    assert Progress(file, PROMPTS, {"seed": 0}).pairs == {(SPEC, 1): exact, (SPEC, 0): moving}
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("entry", [{"number": 9}, {"cache": {"steps": 3}}, {"pair": {"psnr": "high"}}, {"pair": {}}])
def test_damage_is_named(entry: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    Progress(file, PROMPTS, {}).add(SPEC, 0, Pair(PROMPTS[0], 30.0, 0.9, 0.1))
    header, line = file.read_text().splitlines()
    file.write_text(f"{header}\n{json.dumps(json.loads(line) | entry)}\n")
    with pytest.raises(ValueError, match=r"kept\.jsonl is damaged .*delete it"):
        Progress(file, PROMPTS, {})


def test_a_file_that_cannot_be_written_is_named_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    pipe = TinyPipeline()
    with pytest.raises(OSError, match="taken"):
        tune(pipe, progress=tmp_path / "taken" / "kept.jsonl", **ASKED)
    assert not pipe.calls


def test_pictures_and_tensors_count_by_what_they_hold() -> None:
    pipe = TinyPipeline()

    def said(**call: Any) -> Any:
        sampler = Sampler(pipe, {})
        sampler.settings = call
        return context_of(sampler, key_of(pipe))["call"]

    black, white = (Image.new("RGB", (4, 4), color) for color in ("black", "white"))
    assert said(image=black) == said(image=black.copy()) != said(image=white)
    ones = torch.ones(2, dtype=torch.bfloat16)
    assert said(embeds=[ones]) == said(embeds=[ones.clone()]) != said(embeds=[ones * 2])
    assert said(size=12, extra={"a": (1, None)}) == {"size": 12, "extra": {"a": [1, None]}}
