"""The command that makes the table of caches: what it renders, in which order, what it measures, keeps and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from diffusers import WanPipeline

from dit_accel import quality
from dit_accel.quality.key import key_of
from dit_accel.quality.spec import CacheSpec
from dit_accel.shapes.caches.__main__ import main
from dit_accel.shapes.caches.contender import PEERS, PRESETS, TOGETHER, Contender, Options
from dit_accel.shapes.caches.contenders import contenders
from dit_accel.shapes.caches.peers import Peer
from dit_accel.shapes.caches.runs import CacheSampler
from dit_accel.shapes.caches.targets import TARGETS
from dit_accel.shapes.caches.work import Work
from dit_accel.shapes.report.sampling import Sample
from dit_accel.shapes.world import is_held_out, parse_prompt

from .conftest import Calls, Stop, only
from .test_report import rendered

DEVICE = ["--device", "cpu"]
SOME = ("fbcache, threshold 0.05", "diffusers FirstBlockCache 0.05", "radial+dicache, threshold 0.08")


@pytest.fixture
def truthful(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Truth in place of every sample, darker by caches; dense takes 2 seconds and 1000 products, others half of it."""
    calls = Calls()

    def sample(self: CacheSampler, prompt: str, index: int, attention: str) -> Sample:
        if len(calls) == calls.last:
            raise Stop
        calls.append((index, attention))
        video = rendered(parse_prompt(prompt), index, self.settings.frames)
        self.work, dense = Work(()), attention == "dense"
        self.work.products = 1000 if dense else 500
        self.work.grown = (7000 if dense else 9000) if index == 0 else None
        self.report = None
        seconds = 2.0 + 0.5 * sum(way == (index, "dense") for way in calls[:-1]) if dense else 1.25
        return Sample(video if dense else video * 0.98, 5.0, seconds, None)

    monkeypatch.setattr(CacheSampler, "sample", sample)
    return calls


def run(model: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["--model", str(model), *DEVICE, "--steps", "20", "--out", str(out), *more]) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_dense_runs_alternate_with_contenders_whose_places_rotate(
    basic_wan: Path, tmp_path: Path, truthful: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run(basic_wan, tmp_path / "c.json", "--prompts", "2", "--every", "2", *only(*SOME))
    first, second, third = (each.name for each in contenders(SOME))
    warm_up, *timed = truthful
    assert warm_up == (0, "dense")
    assert timed[:5] == [(0, name) for name in ("dense", first, second, "dense", third)]
    assert timed[5:7] == [(0, "dense"), (1, "dense")]
    assert timed[7:] == [(1, name) for name in (second, third, "dense", first, "dense")]
    rows = {row["name"]: row for row in table["contenders"]}
    assert {name: row["group"] for name, row in rows.items()} == dict(
        zip((first, second, third), (PRESETS, PEERS, TOGETHER), strict=True)
    )
    row = rows[first]
    assert (row["runs"], row["computed_share"], row["kept_bytes"]) == (2, 0.5, 2000)
    # The dense runs around it took 2.5 and 3 s for prompt 0, where one was the warm-up, and 2.5 and 3 s for prompt 1.
    assert row["speedup"]["median"] == pytest.approx(2.75 / 1.25)
    assert row["motion_ratio"]["median"] == pytest.approx(0.98, abs=1e-3)
    clips = [rendered(parse_prompt(each["prompt"]), index, 5) for index, each in enumerate(table["prompts"])]
    values = [float(-10 * torch.log10((0.02 * clip).double().square().mean())) for clip in clips]
    assert row["psnr_db"]["mean"] == pytest.approx(sum(values) / 2, abs=0.01)
    assert table["best"]["prompts"] == 2
    assert table["best"]["faster"] == pytest.approx(
        rows[first]["speedup"]["median"] / rows[second]["speedup"]["median"], abs=1e-3
    )
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "c.md").read_text()
    assert "Ours is" in printed
    truthful.clear()
    assert main(["--table", str(tmp_path / "c.json")]) == 0
    assert capsys.readouterr().out == printed
    assert truthful == []


def test_a_cut_run_goes_on_where_it_stopped_and_one_can_be_measured_anew(
    basic_wan: Path, tmp_path: Path, truthful: Calls
) -> None:
    options = ["--prompts", "2", "--every", "1", *only(*SOME)]
    _, second, third = (each.name for each in contenders(SOME))
    truthful.last = 6  # warm-up, dense, first, dense, second, dense; the machine goes away at the third
    with pytest.raises(Stop):
        run(basic_wan, tmp_path / "c.json", *options)
    truthful.last = None
    truthful.clear()
    table = run(basic_wan, tmp_path / "c.json", *options)
    assert truthful[:4] == [(0, "dense"), (0, "dense"), (0, third), (0, "dense")]  # warm-up again, dense, and so on
    assert [row["runs"] for row in table["contenders"]] == [2, 2, 2]
    truthful.clear()
    assert run(basic_wan, tmp_path / "c.json", *options) == table
    assert truthful == []
    run(basic_wan, tmp_path / "c.json", *options[:4], *only(second), "--forget", second)
    assert {way for _, way in truthful} == {"dense", second}


def test_with_a_sparse_method_its_settings_count_too(
    basic_wan: Path, tmp_path: Path, truthful: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--prompts", "1", *only(SOME[0], SOME[2])]
    run(basic_wan, tmp_path / "c.json", *options)
    truthful.clear()
    changed = {"block": 64, "dense_steps": 0.24, "dense_layers": 1}
    monkeypatch.setattr("dit_accel.shapes.caches.contenders.SPARSE", {"radial": changed})
    table = run(basic_wan, tmp_path / "c.json", *options)
    assert {way for _, way in truthful} == {"dense", SOME[2]}  # the other one is what it was
    rows = {row["name"]: row for row in table["contenders"]}
    assert rows[SOME[0]]["settings"] == {"threshold": 0.05}
    assert rows[SOME[2]]["settings"] == {"threshold": 0.08, "attention": "radial", "options": changed}


@dataclass(frozen=True)
class Calibrated(Contender):
    """Looks at one generation."""

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        generate()
        return {"looked": True}

    def install(self, pipe: Any, steps: int, found: Options) -> None:
        return None

    def remove(self, pipe: Any) -> None:
        return None


def test_nobody_is_judged_on_what_calibration_saw(
    basic_wan: Path, tmp_path: Path, truthful: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def call(self: Any, prompt: str, num_frames: int, generator: torch.Generator, **_: Any) -> None:
        assert truthful == [(0, "dense")]  # the warm-up comes before
        asked.append((prompt, generator.initial_seed()))

    monkeypatch.setattr(WanPipeline, "__call__", call)
    it = Calibrated("it", PRESETS, "it")
    monkeypatch.setattr("dit_accel.shapes.caches.__main__.contenders", lambda only=(): [it])
    table = run(basic_wan, tmp_path / "c.json", "--prompts", "2", "--seed", "5")
    ((prompt, seed),) = asked
    assert not is_held_out(parse_prompt(prompt)) and seed == 4
    assert prompt not in {each["prompt"] for each in table["prompts"]}
    assert (table["contenders"][0]["runs"], table["contenders"][0]["settings"]) == (2, {"looked": True})


def test_results_beside_another_version_of_cache_dit_are_never_mixed_in(
    basic_wan: Path,
    tmp_path: Path,
    truthful: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, has = ModuleType("cache_dit"), "dit_accel.shapes.caches.peers.has_cache_dit"
    monkeypatch.setitem(sys.modules, "cache_dit", package)
    monkeypatch.setattr(has, lambda: True)
    options = ["--prompts", "1", *only(SOME[0])]
    vars(package)["__version__"] = "1.0"
    assert run(basic_wan, tmp_path / "c.json", *options)["settings"]["peers"] == {"cache-dit": "1.0"}
    vars(package)["__version__"] = "1.1"
    given = ["--model", str(basic_wan), *DEVICE, "--steps", "20", "--out", str(tmp_path / "c.json")]
    assert main([*given, *options]) == 2
    assert "peers was {'cache-dit': '1.0'}, is {'cache-dit': '1.1'}" in capsys.readouterr().err
    monkeypatch.setattr(has, lambda: False)
    assert "peers" not in run(basic_wan, tmp_path / "without.json", *options)["settings"]


def test_caches_are_calibrated_measured_and_judged_for_real(shapes_wan: Path, tmp_path: Path) -> None:
    names = (
        "static, start 5, every 2",
        "magcache 0.24, K 6",
        "profiling, uniform 0.5",
        "diffusers MagCache 0.24, K 6",
        "diffusers TaylorSeer lite 3",
        "radial+taylorseer_lite, keep output, interval 3",
        "radial alone",
        "deepcache, interval 2",
    )
    table = run(
        shapes_wan, tmp_path / "c.json", "--prompts", "1", "--subset", "single", "--steps", "12", *only(*names)
    )
    rows = {row["name"]: row for row in table["contenders"]}
    assert set(rows) == set(names)
    assert "UNet" in rows["deepcache, interval 2"]["note"] and rows["deepcache, interval 2"]["runs"] == 0
    # Twelve steps, of which 0 to 4 and then every other one is computed; embeddings, large here, run in all of them.
    assert 9 / 12 <= rows["static, start 5, every 2"]["computed_share"] < 0.9
    ours, theirs = rows["magcache 0.24, K 6"], rows["diffusers MagCache 0.24, K 6"]
    ratios = ours["settings"]["ratios"]
    assert len(ratios) == 12 and ratios[0] == 1
    assert ratios == pytest.approx(
        theirs["settings"]["mag_ratios"], rel=1e-3
    )  # one calibration finds what the other does
    assert len(rows["profiling, uniform 0.5"]["settings"]["background"]) == 1  # of two blocks
    assert rows["radial alone"]["computed_share"] == 1
    for name, row in rows.items():
        if row["runs"] and name != "radial alone":
            assert row["computed_share"] < 1, name
            assert row["kept_bytes"] > 0, name
            assert row["psnr_db"]["mean"] != "bit-equal", name
            assert {run["dense_again_db"] for run in row["prompts"]} == {"bit-equal"}, name
    assert 0 < rows["radial+taylorseer_lite, keep output, interval 3"]["sparse_density"] <= 1


def test_the_file_of_rows_names_those_of_the_committed_table(basic_wan: Path, tmp_path: Path, truthful: Calls) -> None:
    folder = Path(__file__).parents[2] / "docs" / "benchmarks"
    rows = [row["name"] for row in json.loads((folder / "caches.json").read_text())["contenders"] if row["runs"]]
    assert (folder / "caches.args").read_text().splitlines() == [f"--only={name}" for name in rows]
    (tmp_path / "some.args").write_text(f"--only={SOME[0]}\n--only={SOME[1]}\n")
    table = run(basic_wan, tmp_path / "c.json", "--prompts", "1", f"@{tmp_path / 'some.args'}")
    assert {row["name"] for row in table["contenders"]} == {*SOME[:2]}


@dataclass(frozen=True)
class Unwilling(Contender):
    """Refuses when it is put on, or only while it runs."""

    late: bool = False

    def install(self, pipe: Any, steps: int, found: Options) -> None:
        if not self.late:
            raise ValueError("does not fit")

    def remove(self, pipe: Any) -> None:
        return None


def test_who_cannot_act_says_why(
    basic_wan: Path, tmp_path: Path, truthful: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwilling = [Unwilling("early", PEERS, "early"), *contenders(SOME[:1])]
    monkeypatch.setattr("dit_accel.shapes.caches.__main__.contenders", lambda only=(): list(unwilling))
    table = run(basic_wan, tmp_path / "c.json", "--prompts", "1")
    rows = {row["name"]: row for row in table["contenders"]}
    assert rows["early"]["note"] == "cannot act: does not fit"
    assert rows[SOME[0]]["runs"] == 1


@dataclass(frozen=True)
class Breaking(Peer):
    """A cache of others that fails in its own way."""

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        if self.name == "in calibration":
            raise RuntimeError("printed nothing")
        return {}

    def _put_on(self, pipe: Any, steps: int, found: Options) -> None:
        vars(pipe.transformer)["half"] = True
        if self.name == "halfway":
            raise TypeError("no such block")

    def remove(self, pipe: Any) -> None:
        del vars(pipe.transformer)["half"]


def test_a_peer_that_breaks_is_a_row_that_says_so_and_the_rest_goes_on(
    basic_wan: Path, tmp_path: Path, truthful: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, left = CacheSampler.sample, []

    def sample(self: CacheSampler, prompt: str, index: int, attention: str) -> Sample:
        left.append("half" in vars(self.pipe.transformer))
        if attention == "while it runs":
            raise IndexError("shapes do not fit")
        return truth(self, prompt, index, attention)

    monkeypatch.setattr(CacheSampler, "sample", sample)
    names = ("in calibration", "halfway", "while it runs")
    everyone = [*(Breaking(name, PEERS, name) for name in names), *contenders(SOME[:1])]
    monkeypatch.setattr("dit_accel.shapes.caches.__main__.contenders", lambda only=(): list(everyone))
    for _ in range(2):  # the second goes on from the file of the first
        table = run(basic_wan, tmp_path / "c.json", "--prompts", "2")
        rows = {row["name"]: row for row in table["contenders"]}
        assert rows["in calibration"]["note"] == "cannot act: printed nothing"
        assert "no such block" in rows["halfway"]["note"]
        assert rows["while it runs"]["note"] == "cannot act: shapes do not fit" and rows["while it runs"]["runs"] == 0
        assert rows[SOME[0]]["runs"] == 2
    assert not any(left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "easycash"], "nobody is called 'easycash'"),
        (["--forget", "easycash"], "nobody is called 'easycash'"),
        (["--every", "0"], "--every counts contenders between dense runs, from 1; got 0"),
        (["--frames", "6"], "--frames must be a multiple of 4, plus 1"),
    ],
)
def test_bad_input_is_named(
    options: list[str], message: str, basic_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(basic_wan), *DEVICE, "--out", str(tmp_path / "c.json"), *options]) == 2
    assert message in capsys.readouterr().err


def test_targets_are_tuned_on_other_prompts_and_judged_on_those_held_out(
    basic_wan: Path,
    tmp_path: Path,
    truthful: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict[str, Any]] = []

    def tune_all(pipe: Any, targets: list[quality.Target], **given: Any) -> list[quality.Profile]:
        """A cache for each target but the highest."""
        asked.append(given | {"targets": [each.value for each in targets]})
        spec = CacheSpec(20, "output", "reuse", computed=tuple(range(0, 20, 2)))
        return [quality.Profile(each, key_of(pipe), None if each.value == 36 else spec, "because") for each in targets]

    monkeypatch.setattr(quality, "tune_all", tune_all)
    table = run(basic_wan, tmp_path / "t.json", "--targets", "--prompts", "3", "--tune-prompts", "5")
    assert [given["targets"] for given in asked] == [[22, 25, 28, 32, 36]]  # all at once, so they share runs
    judged_on = {each["prompt"] for each in table["prompts"]}
    for given in asked:
        assert (len(given["prompts"]), len(given["held_out"])) == (3, 2)
        assert not judged_on & {*given["prompts"], *given["held_out"]}
        assert given["seed"] == 3
        assert (given["num_inference_steps"], given["num_frames"], given["guidance_scale"]) == (20, 5, 3.0)
    found = table["verdicts"]
    levels = [run["psnr_db"] for run in table["contenders"][0]["prompts"]]
    assert [each["met"] for each in found["targets"]] == [sum(db >= target for db in levels) for target in TARGETS]
    assert found["targets"][2]["cache"] == "output, reuse, 10 of 20 steps"
    assert found["targets"][4]["cache"] is None
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "t.md").read_text()
    assert "36 dB: because" in printed
    dots = [each for each in ElementTree.parse(tmp_path / "t.svg").iter() if each.tag.endswith("circle")]
    assert len(dots) == 5 * 3  # a prompt each
    asked.clear()
    assert run(basic_wan, tmp_path / "t.json", "--targets", "--prompts", "3", "--tune-prompts", "5") == table
    assert asked == []  # tuning is kept, too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "--only", "easycache"], "--targets has contenders of its own"),
        (["--targets", "--tune-prompts", "3"], "--tune-prompts wants at least 4"),
    ],
)
def test_bad_input_for_targets_is_named(
    options: list[str], message: str, basic_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["--model", str(basic_wan), *DEVICE, "--prompts", "2", "--out", str(tmp_path / "t.json"), *options]) == 2
    )
    assert message in capsys.readouterr().err


def test_a_cache_that_does_not_come_off_is_told(
    basic_wan: Path, tmp_path: Path, truthful: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(basic_wan, tmp_path / "a.json", *only(SOME[0]), "--prompts", "1")
    assert "Dense runs differ" not in (tmp_path / "a.md").read_text()
    truth = CacheSampler.sample

    def sample(self: CacheSampler, prompt: str, index: int, attention: str) -> Sample:
        found = truth(self, prompt, index, attention)
        stays = attention == "dense" and any(way != "dense" for _, way in truthful)
        return found._replace(video=found.video * 0.9) if stays else found

    truthful.clear()
    monkeypatch.setattr(CacheSampler, "sample", sample)
    run(basic_wan, tmp_path / "b.json", *only(SOME[0]), "--prompts", "1")
    assert f"Dense runs differ before and after: {SOME[0]}." in (tmp_path / "b.md").read_text()


@pytest.mark.parametrize("text", ["3", "[]", '"x"', '{"a": 1}', "{"])
def test_other_files_are_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    for file in (tmp_path / "t.json", tmp_path):
        assert main(["--table", str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
