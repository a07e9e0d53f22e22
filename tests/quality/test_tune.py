"""Tuning from end to end: what is promised is kept on real pairs, and refused where it cannot be."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler

import dit_accel
from dit_accel.caching import Anchor
from dit_accel.metrics import psnr
from dit_accel.quality.climb import last_good
from dit_accel.quality.pairs import Bench, NoiseFloor, Pair, alarms, compare, relative_error, speed_up, summary
from dit_accel.quality.profile import Profile, ProfileWarning
from dit_accel.quality.request import Margins, settled, steps_of
from dit_accel.quality.sampling import Generation, NotFinite, Sampler
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.target import Target
from dit_accel.quality.tuner import Tuner
from dit_accel.quality.tuning import tune, tune_all

from .conftest import HELD_OUT, PROMPTS, TinyPipeline

SIZE: dict[str, Any] = {"num_inference_steps": 10}
TARGETS = (25.0, 40.0)
LISTED: dict[str, Any] = {"kinds": ("listed steps",), "coverage": None}
FREE: dict[str, Any] = {"prompts": PROMPTS, "held_out": HELD_OUT, "min_speed_up": 0.01} | SIZE


def count_calls(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes time pass by the calls of the model that are computed, one second each, and one for every generation."""
    calls = [0]
    attention = pipe.transformer.blocks[0].attn1  # a skipped block is called, but does not attend
    attention.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    monkeypatch.setattr(Sampler, "_now", lambda self: calls[0] + len(pipe.calls))


@pytest.fixture(scope="module")
def tuned() -> Iterator[tuple[TinyPipeline, dict[float, Profile]]]:
    """Profiles for several targets, on one pipeline."""
    pipe = TinyPipeline()
    with pytest.MonkeyPatch.context() as monkeypatch:
        count_calls(pipe, monkeypatch)
        wanted = FREE | {"min_speed_up": 1.05}
        profiles = tune_all(pipe, [Target("psnr", target) for target in TARGETS], coverage=None, **wanted)
        yield pipe, dict(zip(TARGETS, profiles, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_the_promise_holds_on_pairs_made_by_hand(
    tuned: tuple[TinyPipeline, dict[float, Profile]], target: float
) -> None:
    pipe, profiles = tuned
    profile = profiles[target]
    assert not profile.is_off and profile.target == Target("psnr", target)
    recipe = profile.cache()
    assert recipe is not None
    found = []
    for number, prompt in enumerate([*PROMPTS, *HELD_OUT]):
        dense = Sampler(pipe, SIZE).run(prompt, number)
        with dit_accel.accelerate(pipe, cache=recipe):
            cached = Sampler(pipe, SIZE).run(prompt, number)
        found.append(psnr(cached.frames, dense.frames))
    assert min(found) >= target
    assert profile.measured["psnr"]["worst"] == pytest.approx(min(found), abs=1e-3)
    assert [pair["psnr"] for pair in profile.measured["pairs"]] == pytest.approx(found, abs=1e-3)
    assert profile.measured["prompts"] == 4 and profile.measured["held_out"] == 2
    assert f"{min(found):.2f} dB" in profile.reason


def test_speed_falls_with_the_target(tuned: tuple[TinyPipeline, dict[float, Profile]]) -> None:
    pipe, profiles = tuned
    speeds = [profile.measured["speed_up"] for _, profile in sorted(profiles.items())]
    assert speeds[0] > speeds[1] > 1.05
    for profile in profiles.values():
        seconds = []
        for number, prompt in enumerate(HELD_OUT, start=len(PROMPTS)):
            with dit_accel.accelerate(pipe, cache=profile.cache()):
                seconds.append(Sampler(pipe, SIZE).run(prompt, number).seconds)
        assert profile.measured["speed_up"] == pytest.approx(statistics.median(21 / each for each in seconds))


def test_a_profile_tells_what_was_run(tuned: tuple[TinyPipeline, dict[float, Profile]]) -> None:
    pipe, profiles = tuned
    profile = profiles[40.0]
    key = profile.key
    assert (key.steps, key.frames, key.size, key.guidance, key.shift) == (10, 2, (3, 3), 2.0, 3.0)
    assert key.pipeline == "TinyPipeline" and key.dtype == "float32" and key.attention == "stock"
    assert profile.settings["prompts"] == PROMPTS and profile.settings["call"] == SIZE
    verdicts = [row["verdict"] for row in profile.candidates]
    assert verdicts.count("chosen") == 1 and "below target" in verdicts
    chosen = next(row for row in profile.candidates if row["verdict"] == "chosen")
    assert profile.spec is not None and chosen["cache"] == profile.spec.describe()
    assert profile.noise_floor["psnr"] == float("inf") and profile.noise_floor["runs"] >= 2
    made = profile.settings["generations"]
    assert made["cached"] >= sum(row["prompts"] for row in profile.candidates) and made["cached"] < 80
    assert dit_accel.acceleration_of(pipe) is None


def test_other_targets(pipe: TinyPipeline) -> None:
    targets: list[tuple[dict[str, Any], str]] = [({"target_ssim": 0.9}, "ssim"), ({"max_rel_error": 0.1}, "rel_error")]
    for wanted, name in targets:
        profile = tune(pipe, **wanted, **FREE, **LISTED)
        assert not profile.is_off and profile.spec is not None and profile.spec.computed, profile.reason
        worst = profile.measured[name]["worst"]
        assert worst >= 0.9 if name == "ssim" else worst <= 0.1
        assert "EasyCache" not in str(profile.candidates)


def test_the_most_exact_cache_within_a_time(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    count_calls(pipe, monkeypatch)
    profile = tune(pipe, max_time=13, **FREE, **LISTED)
    assert profile.spec is not None and profile.spec.computed is not None
    assert len(profile.spec.computed) == 6  # 2 calls for each step, and 1 for the rest
    assert profile.measured["seconds"] == {"worst": 13, "median": 13} and "most exact" in profile.reason
    assert profile.measured["speed_up"] == pytest.approx(21 / 13)
    faster = FREE | {"min_speed_up": 1.3}
    profile = tune(pipe, max_time=20, **faster, **LISTED)  # 19 s would do, but is hardly worth a cache
    assert profile.measured["seconds"] == {"worst": 15, "median": 15}, profile.reason
    with pytest.warns(ProfileWarning, match="dense takes 21 s, which is fast enough"):
        assert tune(pipe, max_time=21, **FREE).is_off
    with pytest.warns(ProfileWarning, match=r"nothing is fast enough; the fastest cache takes \d+ s"):
        profile = tune(pipe, max_time=2, **FREE, **LISTED)
    assert profile.is_off and profile.candidates


def test_a_cache_that_does_not_pay_is_off_aloud(pipe: TinyPipeline) -> None:
    with pytest.warns(ProfileWarning, match="min_speed_up=1000"):
        profile = tune(pipe, target_psnr=30, **(FREE | LISTED | {"min_speed_up": 1000}))
    assert profile.is_off
    with pytest.warns(ProfileWarning, match="no cache is used"):
        assert profile.cache() is None


def test_targets_beyond_the_noise_floor_are_refused() -> None:
    pipe = TinyPipeline(drift=1e-3)
    with pytest.raises(ValueError, match=r"noise floor: two dense runs.*reach \d+"):
        tune(pipe, target_psnr=100, **FREE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": ["a"]}, "at least 2 prompts"),
        ({"held_out": ["a"]}, "2 held out"),
        ({"prompts": "a cat"}, "lists of texts"),
        ({"prompts": ["a", " "]}, "empty"),
        ({"held_out": [*HELD_OUT, PROMPTS[0]]}, "given twice"),
        ({"target_ssim": 0.9}, "exactly one target"),
        ({"target_psnr": -3}, "above 0"),
        ({"coverage": 1.0}, "coverage"),
        ({"min_speed_up": 0}, "min_speed_up"),
        ({"prompt": "x"}, "prompt cannot be given"),
        ({"beside": {"cache": "fora"}}, "leave out cache"),
        ({"beside": {"controls": []}}, "leave out controls"),
        ({"beside": {"attention": "nothing"}}, "unknown attention method"),
        ({"kinds": ("teacache",)}, "kinds are one or more of 'listed steps'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(pipe: TinyPipeline, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tune(pipe, **({"target_psnr": 30} | FREE | changes))
    assert pipe.calls == []


def test_runs_are_shared_by_targets(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    two, apart = [Target("psnr", 25.0), Target("rel_error", 0.2)], 0
    for target in two:
        alone = TinyPipeline()
        count_calls(alone, monkeypatch)
        wanted: dict[str, Any] = {target.keyword: target.value}
        tune(alone, **wanted, **FREE, **LISTED)
        apart += len(alone.calls)
    count_calls(pipe, monkeypatch)
    profiles = tune_all(pipe, two, **FREE, **LISTED)
    assert len(pipe.calls) <= apart - (len(PROMPTS) + 1)  # traces and the noise floor, and what both asked for
    assert [profile.target for profile in profiles] == two
    with pytest.raises(ValueError, match="at least one target"):
        tune_all(pipe, [], **FREE)


def test_of_several_targets_one_beyond_the_floor_is_off() -> None:
    pipe = TinyPipeline(drift=1e-3)
    profiles = tune_all(pipe, [Target("psnr", 25.0), Target("psnr", 95.0)], **FREE, **LISTED)
    assert not profiles[0].is_off and profiles[1].is_off and "noise floor" in profiles[1].reason


def test_an_anchor_is_tuned_beside(pipe: TinyPipeline) -> None:
    beside = {"attention": "compensated", "density": 0.5, "anchor": Anchor(), "dense_steps": 2}
    profile = tune(pipe, target_psnr=5, beside=beside, **FREE, **LISTED)
    assert not profile.is_off and "anchor" in profile.key.attention
    with pytest.raises(ValueError, match="an anchor wants"):
        tune(pipe, target_psnr=5, beside={"anchor": Anchor()}, **FREE, **LISTED)


@pytest.mark.parametrize(
    ("beside", "steps"), [({}, 0), ({"attention": "compensated", "dense_steps": 3, "anchor": Anchor()}, 3)]
)
def test_dense_steps_of_what_runs_beside_are_known(pipe: TinyPipeline, beside: dict[str, Any], steps: int) -> None:
    assert Bench(Sampler(pipe, SIZE), PROMPTS, settled(pipe, beside)).dense_steps(10) == steps
    assert dit_accel.acceleration_of(pipe) is None and not pipe.calls


def test_where_every_cache_fails_a_time_is_not_met(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(*_: object, **__: object) -> Pair:
        raise NotFinite("the pipeline gave NaN")

    count_calls(pipe, monkeypatch)
    monkeypatch.setattr(Bench, "pair", pair)
    with pytest.warns(ProfileWarning, match="every cache fails"):
        assert tune(pipe, max_time=3.0, **FREE, **LISTED).is_off


def test_what_cannot_be_put_on_is_refused_before_anything_runs(pipe: TinyPipeline) -> None:
    for beside in ({"attention": "radial", "dense_layers": [9]}, {"attentoin": "radial"}):
        with pytest.raises((ValueError, TypeError), match=r"names layer 9|attentoin"):
            tune(pipe, target_psnr=28, beside=beside, **FREE, **LISTED)
    assert not pipe.calls and dit_accel.acceleration_of(pipe) is None


@pytest.mark.parametrize("error", [NotFinite("the pipeline gave NaN"), torch.OutOfMemoryError("out of memory\nlong")])
def test_a_cache_that_fails_is_passed_over(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The fastest ones fail; the rest is searched as before."""
    stock, told = Bench.pair, list[str]()

    def pair(self: Bench, spec: CacheSpec, number: int, timed: bool = False) -> Pair:
        if spec.computed is not None and len(spec.computed) < 6:
            raise error
        return stock(self, spec, number, timed)

    monkeypatch.setattr(Bench, "pair", pair)
    profile = tune(pipe, target_psnr=20, tell=told.append, **FREE, **LISTED)
    assert profile.spec is not None and profile.spec.computed is not None and len(profile.spec.computed) >= 6
    assert any(line.startswith("fails (") and "long" not in line for line in told)


def test_reasons_name_what_the_target_is_about(pipe: TinyPipeline) -> None:
    profile = tune(pipe, target_ssim=0.9, **FREE, **LISTED)
    worst = {name: profile.measured[name]["worst"] for name in ("ssim", "psnr")}
    assert f"an SSIM of at least {worst['ssim']:.4f}, at least {worst['psnr']:.2f} dB PSNR" in profile.reason


def test_accelerated_pipelines_are_refused(pipe: TinyPipeline) -> None:
    with dit_accel.accelerate(pipe), pytest.raises(ValueError, match="accelerated already"):
        tune(pipe, target_psnr=30, **FREE)


def test_few_steps_are_off_unless_forced(pipe: TinyPipeline) -> None:
    few = FREE | {"num_inference_steps": 8}
    with pytest.warns(ProfileWarning, match="8 steps are too few.*force=True"):
        profile = tune(pipe, target_psnr=30, **few)
    assert profile.is_off and pipe.calls == [] and not profile.candidates
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProfileWarning)
        assert not tune(pipe, target_psnr=15, force=True, **few, **LISTED).is_off


def test_the_nearest_says_what_it_lacks(pipe: TinyPipeline) -> None:
    with pytest.warns(ProfileWarning, match="no cache is used for PSNR of at least 30 dB"):
        profile = tune(pipe, target_psnr=30, kinds=("listed steps",), coverage=0.999999, **FREE)
    found = re.search(r"nearest: .*, ([\d.]+) dB on its worst prompt and (-?[\d.]+) dB to be expected", profile.reason)
    assert found is not None, profile.reason
    assert float(found[1]) >= float(found[2]) and float(found[2]) < 30


@pytest.mark.parametrize(
    ("target", "values", "said"),
    [
        (Target("psnr", 30), (29.0, 27.9), "29.00 dB on its worst prompt and 22.00 dB to be expected of one more"),
        (Target("ssim", 0.9), (0.88, 0.87), "an SSIM of 0.8800 on its worst prompt and an SSIM of 0.9937 to be"),
        (
            Target("rel_error", 0.1),
            (0.12, 0.13),
            "a relative error of 0.12 on its worst prompt and a relative error of 0.0",
        ),
    ],
)
def test_the_nearest_is_one_that_all_prompts_were_run_on(
    target: Target, values: tuple[float, float], said: str
) -> None:
    """The walk of the other one ended at its first prompt, so nothing is to be expected of it."""
    whole, ended = CacheSpec(10, "output", "reuse", (0, 5)), CacheSpec(10, "output", "reuse", (0,))
    pairs = {
        spec: [Pair("a", **({"psnr": 1.0, "ssim": 0.1, "rel_error": 1.0} | {target.kind: value}))]
        for spec, value in zip((whole, ended), values, strict=True)
    }
    bench: Any = SimpleNamespace(sampler=None, prompts=[], measured=lambda: pairs)
    key: Any = None
    tuner = Tuner(target, Margins(), bench, 4, key, lambda _: None)
    tuner._bounds, tuner._unfinished = {whole: 22.0, ended: 27.9}, {ended}
    assert tuner._nearest().startswith(f"{whole.describe()}, {said}")
    tuner._unfinished = {whole, ended}
    assert tuner._nearest().startswith(ended.describe()) and tuner._nearest().endswith("with others left out")


def test_nan_without_a_cache_is_no_fault_of_one(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Sampler.run

    def run(self: Sampler, prompt: str, number: int) -> Generation:
        if prompt == HELD_OUT[0]:
            raise NotFinite("the pipeline gave NaN")
        return stock(self, prompt, number)

    monkeypatch.setattr(Sampler, "run", run)
    with pytest.raises(ValueError, match=f"without any cache, '{HELD_OUT[0]}'.*NaN"):
        tune(pipe, target_psnr=25, **FREE, **LISTED)


def test_steps_are_those_of_the_call_its_lists_or_the_pipeline(pipe: TinyPipeline) -> None:
    assert steps_of(pipe, {}) == 10 and steps_of(pipe, {"num_inference_steps": 7}) == 7
    assert steps_of(pipe, {"sigmas": [1.0, 0.5, 0.1]}) == 3 == steps_of(pipe, {"timesteps": torch.tensor([9, 5, 1])})


def test_what_only_the_probes_found_is_tried_before_giving_up(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.quality.tuner.last_good", lambda *_: None)  # no walk finds anything
    profile = tune(pipe, target_psnr=12, **FREE, **LISTED)
    assert not profile.is_off and profile.measured["psnr"]["worst"] >= 12


def test_a_looser_target_gets_no_slower_cache_than_a_stricter_one(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls(pipe, monkeypatch)
    real = Tuner.profile

    def blind(self: Tuner) -> Profile:
        """Finds nothing for the looser target."""
        return self.off("not looked for") if self.target.value == 25 else real(self)

    monkeypatch.setattr(Tuner, "profile", blind)
    targets = [Target("psnr", 25.0), Target("psnr", 40.0), Target("rel_error", 0.5)]
    loose, strict, other = tune_all(pipe, targets, **FREE, **LISTED)
    assert strict.spec is not None and loose.spec == strict.spec and loose.target == targets[0]
    assert loose.measured == strict.measured
    assert other.target == targets[2]


def test_one_step_leaves_nothing_to_reuse(pipe: TinyPipeline) -> None:
    with pytest.warns(ProfileWarning, match="1 steps leave nothing to reuse"):
        assert tune(pipe, target_psnr=30, force=True, **FREE | {"num_inference_steps": 1}).is_off


def test_distilled_samplers_are_off() -> None:
    with pytest.warns(ProfileWarning, match="LCMScheduler"):
        assert tune(TinyPipeline(scheduler=LCMScheduler()), target_psnr=30, **FREE).is_off


# ---- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_climbing_finds_the_last_good_one_with_few_tries(count: int) -> None:
    for first in range(0, count, 3):
        for last in range(first - 1, count):
            for start in (-1, 0, count // 2, count + 3):
                tried: list[int] = []

                def good(at: int, last: int = last, tried: list[int] = tried) -> bool:
                    tried.append(at)
                    return at <= last

                found = last_good(count, start, good, first)
                assert found == (last if last >= first else None)
                assert len(tried) == len(set(tried)) <= 11 and all(first <= at < count for at in tried)


def video(values: torch.Tensor) -> Generation:
    return Generation(values, values * 2, 1.0)


def test_metrics_of_a_pair_are_those_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    dense, noise = torch.rand(3, 3, 8, 8, generator=rng), torch.randn(3, 3, 8, 8, generator=rng)
    cached = (dense + 0.05 * noise).clamp(0, 1)
    pair = compare("x", video(dense), video(cached))
    assert pair.psnr == pytest.approx(-10 * float((dense - cached).double().square().mean().log10()), rel=1e-6)
    assert pair.rel_error == pytest.approx(float((cached - dense).norm() / dense.norm()), rel=1e-5)
    moved = [float((v[1:] - v[:-1]).abs().mean()) for v in (cached, dense)]
    assert pair.motion == pytest.approx(moved[0] / moved[1], rel=1e-5)
    still = compare("x", video(dense), video(dense[:1].expand(3, 3, 8, 8).contiguous()))
    assert still.motion == 0 and "0% of its motion" in alarms([still])[0] and not alarms([pair])
    image = compare("x", video(dense[:1]), video(cached[:1]))
    assert image.motion is None and image.flicker is None and alarms([image]) == ()
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0 and relative_error(torch.ones(3), torch.zeros(3)) > 1


def test_summaries_take_the_harmful_side_and_the_median() -> None:
    pairs = [
        Pair("a", 30, 0.9, 0.1, seconds=1.0, dense_seconds=2.0),
        Pair("b", 40, 0.8, 0.2, seconds=2.0, dense_seconds=3.0),
        Pair("c", 35, 0.7, 0.3, seconds=1.0),
    ]
    found = summary(pairs)
    assert found["psnr"] == {"worst": 30, "median": 35} and found["rel_error"] == {"worst": 0.3, "median": 0.2}
    assert found["speed_up"] == speed_up(pairs) == 1.75 and speed_up(pairs[2:]) is None and "motion" not in found


def test_the_floor_joins_runs_and_refuses_what_lies_beyond() -> None:
    floor = NoiseFloor().joined(Pair("a", 50, 0.99, 0.01)).joined(Pair("a", 60, 0.98, 0.001))
    assert (floor.psnr, floor.ssim, floor.rel_error, floor.runs) == (50, 0.98, 0.01, 2)
    floor.check(Target("psnr", 49))
    floor.check(Target("time", 3))
    for target in (Target("psnr", 51), Target("ssim", 0.99), Target("rel_error", 0.005)):
        with pytest.raises(ValueError, match=f"{target.keyword}.*noise floor"):
            floor.check(target)
