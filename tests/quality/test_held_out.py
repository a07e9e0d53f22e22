"""What happens when held-out prompts fail: the next candidate is tried before more margin is asked of all."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dit_accel.quality.candidates import Rung
from dit_accel.quality.key import Key
from dit_accel.quality.margin import lower_bound
from dit_accel.quality.pairs import Bench, Pair
from dit_accel.quality.request import Margins
from dit_accel.quality.spec import CacheSpec
from dit_accel.quality.target import Target
from dit_accel.quality.tuner import Tuner

TIMES = {"fast": 1.0, "medium": 1.5, "slow": 2.0, "safe": 3.0}


class Scripted(Tuner):
    """A search whose finds and held-out results are given: by round the finds, fastest first, and by find the gap."""

    rounds: Sequence[Sequence[str]] = ()
    gaps: dict[str, float]
    asked: list[float]

    def _search(self, ladders: Any, offset: float, extra: float) -> list[Rung]:
        self.asked.append(extra)
        names = self.rounds[len(self.asked) - 1] if len(self.asked) <= len(self.rounds) else ()
        return [cast(Rung, SimpleNamespace(spec=name)) for name in names]

    def _promising(self, extra: float) -> list[Rung]:
        return []

    def _shortfall(self, rung: Rung) -> float:
        return self.gaps[str(rung.spec)]

    def _expected_time(self, rung: Rung) -> float:
        return TIMES[str(rung.spec)]

    def _nearest(self) -> str:
        return "near"

    def _finish(self, spec: Any) -> Any:
        return spec

    def off(self, reason: str) -> Any:
        return f"off: {reason}"


def tuned(rounds: Sequence[Sequence[str]], gaps: dict[str, float]) -> tuple[Any, list[float]]:
    """What is chosen, and the margin asked for in every round."""
    bench = cast(Bench, SimpleNamespace(sampler=None, prompts=[]))
    tuner = Scripted(Target("psnr", 28), Margins(), bench, 4, cast(Key, None), lambda text: None)
    tuner.rounds, tuner.gaps, tuner.asked = rounds, gaps, []
    return tuner._at_quality([], 0.0), tuner.asked


def test_a_slower_cache_that_keeps_the_target_is_taken_if_nothing_faster_does() -> None:
    chosen, asked = tuned([["fast", "slow"], ["safe"]], {"fast": 13.8, "slow": -1.0, "safe": -2.0})
    assert chosen == "slow" and asked == pytest.approx([0.0, 13.8])


def test_something_faster_is_looked_for_with_more_margin() -> None:
    chosen, asked = tuned([["fast", "slow"], ["medium", "slow"]], {"fast": 0.3, "slow": -1.0, "medium": -0.1})
    assert chosen == "medium" and asked == pytest.approx([0.0, 0.3])


def test_the_margin_grows_by_the_smallest_gap() -> None:
    chosen, asked = tuned([["fast", "slow"], ["safe"]], {"fast": 13.8, "slow": 0.7, "safe": -0.1})
    assert chosen == "safe" and asked == pytest.approx([0.0, 0.7])


def test_where_nothing_has_the_margin_what_has_less_is_asked() -> None:
    chosen, asked = tuned([["fast"], [], ["slow"]], {"fast": 1.5, "slow": -0.5})
    assert chosen == "slow" and asked == pytest.approx([0.0, 1.5, 0.0])


@pytest.mark.parametrize(("passed", "short"), [(1, -0.30), (2, 0.59), (10, 2.98)])
def test_the_more_caches_passed_the_surer_the_chosen_one_must_be(passed: int, short: float) -> None:
    """Six prompts of 34 dB in the mean: 30.3 dB is to be expected of a new one, less for the best of several."""
    scores = [32.0, 33.0, 34.0, 34.0, 35.0, 36.0]
    specs = [CacheSpec(10, "output", "reuse", (0, step)) for step in range(1, 11)][:passed]
    pairs = [Pair("a", psnr, 1.0, 0.0) for psnr in scores]
    bench = cast(Bench, SimpleNamespace(sampler=None, prompts=["a"] * 6, pair=lambda _, n, timed: pairs[n]))
    tuner = Tuner(Target("psnr", 30.0), Margins(), bench, 4, cast(Key, None), lambda text: None)
    tuner._passed = {*specs}
    found = tuner._shortfall(cast(Rung, SimpleNamespace(spec=specs[0])))
    assert found == pytest.approx(30.0 - lower_bound(scores, 1 - 0.03 / passed)) == pytest.approx(short, abs=0.01)


def test_where_nothing_is_left_it_says_by_how_much_the_last_ones_missed() -> None:
    chosen, _ = tuned([["fast", "slow"]], {"fast": 13.8, "slow": 0.75})
    assert chosen.startswith("off: ") and "0.75 dB" in chosen
