"""What a cache decided, from single decisions to the report."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.caching.record import CacheRecord, Decision, share_of
from dit_accel.caching.report import cache_report, combined_fraction, predicted_speedup
from dit_accel.caching.unit import Unit
from dit_accel.clock import StepState
from dit_accel.densities import StepDensities, by_expert
from dit_accel.layout import TokenLayout
from dit_accel.report import Report
from dit_accel.timing import CallTime, TimeReport


def decision(
    step: int,
    computed: bool,
    reason: str = "policy",
    *,
    branch: str = "cond",
    unit: str | None = None,
    expert: str = "transformer",
    generation: int = 0,
    value: float | None = None,
    threshold: float | None = None,
) -> Decision:
    return Decision(generation, step, branch, expert, "mine", unit, computed, reason, value, threshold)


def record_of(*decisions: Decision) -> CacheRecord:
    record = CacheRecord("mine")
    for each in decisions:
        record.append(each)
    return record


def state(step: int, generation: int = 0) -> StepState:
    return StepState(generation, step, 4, "cond", "transformer", 0, TokenLayout.video_only((1, 2, 2)), None)


def time_of(step: int, total: float, attention: float = 0.0, cache: float = 0.0, branch: str = "cond") -> CallTime:
    return CallTime(0, step, branch, "transformer", total, attention, cache)


def test_a_new_generation_drops_the_decisions_of_the_last_and_keeps_its_counts() -> None:
    record = record_of(decision(0, True, "warm-up"), decision(1, False), decision(0, True, "warm-up", generation=1))
    assert [each.generation for each in record.decisions] == [1]
    assert (record.computed, record.reused, record.generations) == ({"warm-up": 2}, {"policy": 1}, 2)
    assert cache_report(record).totals == {"computed": 2, "reused": 1}


def test_memory_is_bounded_within_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.caching.record.MOST_DECISIONS", 3)
    record = record_of(*[decision(step, True) for step in range(10)])
    assert [each.step for each in record.decisions] == [7, 8, 9]
    assert record.computed.total() == 10


def test_reset_keeps_only_what_describes_the_cache() -> None:
    record = record_of(decision(0, True))
    record.declare("transformer", {"blocks 0-3": 1.0})
    record.add_audit(state(0), 0.5, True)
    record.keep(100)
    record.keep(40)
    record.reset()
    report = cache_report(record)
    assert (report.rows, report.audits, report.totals) == ([], [], {"computed": 0, "reused": 0})
    assert (report.bytes_now, report.bytes_most, record.units) == (40, 40, {"transformer": {"blocks 0-3": 1.0}})
    record.append(decision(0, True))  # of the same generation as before
    assert record.generations == 1 and len(record.decisions) == 1


def test_bytes_of_now_and_at_most() -> None:
    record = CacheRecord()
    for count in (10, 5 << 19, 7):
        record.keep(count)
    assert (record.bytes_now, record.bytes_most) == (7, 5 << 19)
    assert "kept: 7 bytes now, 2.5 MiB at most" in cache_report(record).summary()


def test_steps_by_expert_and_branch() -> None:
    calls = [
        decision(s, s != 2, branch=b, expert=e) for s, b, e in product(range(4), ("cond", "uncond"), ("one", "two"))
    ]
    report = cache_report(record_of(*calls, decision(4, False, branch="uncond", expert="two")))
    assert report.computed_steps == {e: {b: [0, 1, 3] for b in ("cond", "uncond")} for e in ("one", "two")}
    assert report.reused_steps["one"] == {"cond": [2], "uncond": [2]}
    assert report.reused_steps["two"] == {"cond": [2], "uncond": [2, 4]}


def test_units_that_go_the_same_way_are_one_row_and_others_another() -> None:
    ways = {"a": [True, False], "b": [True, False], "c": [True, True]}
    calls = [decision(s, way[s], unit=unit, value=ord(unit)) for s in (0, 1) for unit, way in ways.items()]
    report = cache_report(record_of(*calls))
    assert [row.units for row in report.rows] == [("a", "b"), ("c",)]
    assert report.rows[0].cells[0].value == (ord("a") + ord("b")) / 2
    assert report.unit_counts == {"transformer": {"a": (1, 1), "b": (1, 1), "c": (2, 0)}}
    assert report.computed_steps["transformer"]["cond"] == [0] and report.reused_steps["transformer"]["cond"] == [1]


def test_a_unit_may_differ_from_its_call() -> None:
    record = record_of(decision(0, True, "first"), decision(1, False), decision(1, True, "inactive", unit="b"))
    record.declare("transformer", {"a": 0.25, "b": 0.5})
    report = cache_report(record)
    assert {row.units: row.reused for row in report.rows} == {("a",): [1], ("b",): []}
    assert report.speed.computed_fraction == 1 - 0.25 / 2


def test_a_shared_decision_shows_the_reason_of_the_first_branch() -> None:
    report = cache_report(record_of(decision(0, True, "warm-up"), decision(0, True, "shared", branch="uncond")))
    assert [row.cells[0].reason for row in report.rows] == ["warm-up", "warm-up"]
    assert report.rows[1].cells[0].is_forced
    assert report.reasons == {"computed: warm-up": 2}


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 0.25), min_size=1),
    st.lists(st.dictionaries(st.sampled_from("abcd"), st.booleans()), min_size=1, max_size=6),
    st.booleans(),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_computed_fraction_is_what_counting_gives(
    shares: dict[str, float], overrides: list[dict[str, bool]], whole: bool
) -> None:
    record = CacheRecord()
    record.declare("transformer", shares)
    done = 0.0
    for step, own in enumerate(overrides):
        record.append(decision(step, whole))
        for unit, computed in own.items():
            record.append(decision(step, computed, unit=unit))
        done += 1 - sum(share for unit, share in shares.items() if not own.get(unit, whole))
    found = cache_report(record).speed.computed_fraction
    assert found == pytest.approx(done / len(overrides), abs=1e-12)


def test_nothing_is_predicted_where_the_work_of_a_unit_is_unknown() -> None:
    calls = [decision(0, True), decision(1, False)]
    undeclared = record_of(*calls)
    module = record_of(*calls)
    module.declare("transformer", {"blocks.0.attn1": None})
    for record in (undeclared, module):
        speed = cache_report(record).speed
        assert (speed.computed_fraction, speed.predicted, speed.measured) == (None, None, None)


def test_predicted_speedup_is_the_formula() -> None:
    assert predicted_speedup(0.5) == 2
    assert predicted_speedup(0.4, 0.6, 0.25) == pytest.approx(1 / (0.4 * (0.4 + 0.6 * 0.25)))
    assert predicted_speedup(0) == math.inf
    for bad in ((1.1, 1, 1), (0.5, -0.1, 1), (0.5, 0.5, -1)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            predicted_speedup(*bad)


def test_several_caches_skip_different_units() -> None:
    assert combined_fraction([(0.75, 8), (0.5, 8)]) == 0.25  # of each call a quarter, and a half
    assert combined_fraction([(0.5, 8), (0.75, 4)]) == 0.375  # 4 whole calls, and a quarter of each of the other 4
    assert combined_fraction([(0.75, 8), (None, 8)]) is None
    assert combined_fraction([]) is None
    first, second = record_of(decision(0, True), decision(1, False)), record_of(decision(0, True), decision(1, False))
    first.declare("transformer", {"blocks 0-1": 0.5})
    second.declare("transformer", {"blocks 2-3": 0.5})
    report = Report(None, None, "", None, 2, caches=[cache_report(first), cache_report(second)])
    assert report.predicted_speedup == 2.0
    assert "all caches together: predicted speed-up 2.00x" in report.summary()


def test_speed_from_times_and_densities() -> None:
    """Steps 0 and 1 dense, 2 sparse, 3 reused: a = 6/10, rho = (6 + 6 + 3) / 3 / 6, f = 3/4."""
    record = record_of(decision(0, True), decision(1, True), decision(2, True), decision(3, False))
    record.declare("transformer", {"blocks 0-9": 1.0})
    times = TimeReport([time_of(0, 10.5, 6, 0.5), time_of(1, 10, 6), time_of(2, 7, 3), time_of(3, 1, 0, 0.5)], True)
    densities = {("transformer", "cond", 0): 1.0, ("transformer", "cond", 1): 1.0, ("transformer", "cond", 2): 0.4}
    speed = cache_report(record, times, densities).speed
    assert speed.attention_share == pytest.approx(0.6)
    assert speed.sparse_cost == pytest.approx(5 / 6)
    assert speed.predicted == pytest.approx(1 / (0.75 * (0.4 + 0.6 * 5 / 6)))
    assert speed.measured == pytest.approx(10 * 4 / 28.5)
    assert (speed.seconds_computed, speed.seconds_reused) == (10, 1)
    assert speed.overhead == pytest.approx(1 / 27.5)
    # without a dense call nothing tells what sparse attention saves
    never_dense = cache_report(record, times, dict.fromkeys(densities, 0.4)).speed
    assert (never_dense.predicted, never_dense.measured, never_dense.sparse_cost) == (None, None, None)
    # in compiled code the share of attention is not known
    untold = cache_report(record, TimeReport(times.calls, False), densities).speed
    assert (untold.attention_share, untold.predicted) == (None, None) and untold.measured is not None


def test_no_gain_is_said_with_its_cost() -> None:
    record = record_of(decision(0, True, "first"), decision(1, True))
    assert "NO GAIN: nothing was reused; overhead of the cache not timed" in cache_report(record).summary()
    times = TimeReport([time_of(0, 1.0, cache=0.02), time_of(1, 1.06, cache=0.04)], False)
    assert "NO GAIN: nothing was reused; overhead of the cache 3.0%" in cache_report(record, times).summary()
    assert "has not been called" in cache_report(CacheRecord()).summary()
    record.append(decision(2, False))
    assert "NO GAIN" not in cache_report(record, times).summary()


def test_the_report_is_plain_json() -> None:
    record = record_of(decision(0, True, "first"), decision(1, False, value=0.1, threshold=0.2))
    record.add_audit(state(1), 0.25, True)
    record.downgrade("order 1 in place of 2")
    record.estimate = "3 MB"
    report = cache_report(record, None, {("transformer", "cond", 0): 0.5})
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    cell = {"step": 1, "computed": False, "reason": "policy", "value": 0.1, "threshold": 0.2, "density": None}
    assert read["rows"][0]["cells"][1] == cell
    assert read["rows"][0]["cells"][0]["density"] == 0.5
    assert read["audits"][0] | {"error": 0.25, "tightened": True} == read["audits"][0]
    assert (read["downgrades"], read["estimate"], read["gained"]) == (["order 1 in place of 2"], "3 MB", True)
    assert "largest relative error 0.25, tightened: 1" in report.summary()


def test_shares_of_units() -> None:
    assert share_of(Unit("output", "output"), 30) == 1
    assert share_of(Unit("blocks 3-27", "blocks", 3, 27), 30) == 25 / 30
    assert share_of(Unit("blocks.1.attn1", "self", path="blocks.1.attn1"), 30) is None
    with pytest.raises(ValueError, match="0 to 9"):
        share_of(Unit("blocks 3-27", "blocks", 3, 27), 10)


def test_calls_that_a_cache_leaves_alone_count_as_computed() -> None:
    calls = [decision(step, step == 0) for step in range(4)]
    calls += [decision(step, True, "branch", branch="uncond") for step in range(4)]
    record = record_of(*calls)
    record.declare("transformer", {"output": 1.0})
    report = cache_report(record)
    assert report.speed.computed_fraction == 5 / 8
    assert all(cell.is_forced for cell in report.rows[1].cells)


def test_densities_of_the_latest_generation_by_call() -> None:
    densities = StepDensities()
    densities.count(state(0), 0.125)
    densities.count(state(0, generation=1), 1.0)
    densities.count(state(0, generation=1), torch.tensor(0.5))
    densities.count(state(1, generation=1), torch.tensor(0.25))
    read = densities.read()
    assert read == {("transformer", "cond", 0): 0.75, ("transformer", "cond", 1): 0.25}
    assert by_expert(read) == {"transformer": {"cond": {0: 0.75, 1: 0.25}}}
    densities.reset()
    assert densities.read() == {}
