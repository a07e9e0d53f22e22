"""What a review of caching found: reports of several caches, anchors by site, audits by step, and what was left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.caching import Anchor, Audit, Cache
from dit_accel.caching.policies import Moment, Sight, Spectral, Static
from dit_accel.caching.policies.broadcast import Broadcast
from dit_accel.caching.report import cache_report, reused_places
from dit_accel.caching.scopes.base import Scope
from dit_accel.caching.scopes.blocks import EachBlock, Runs, Whole
from dit_accel.caching.scopes.guidance import Guidance
from dit_accel.caching.scopes.modules import Attention, FeedForward
from dit_accel.caching.scopes.output import Output
from dit_accel.timing import TimeReport

from ..seams.conftest import Subject, build_subject
from .sequences import UNIT
from .test_engine import Scripted, ScriptedJudge
from .test_record import decision, record_of, time_of
from .test_together import computed_steps, routing

COMPUTED = (0, 1, 5, 6, 7)  # of eight steps: three in a row are skipped


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Text to video, eight steps, 288 tokens."""
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs |= {"num_inference_steps": 8, "height": 192, "width": 128}
    return subject


def test_calls_that_another_cache_shortened_do_not_count_as_computed() -> None:
    times = TimeReport([time_of(0, 10), time_of(1, 1), time_of(2, 1)], False)
    outer = record_of(decision(0, True), decision(1, False), decision(2, False))
    inner = record_of(decision(0, True))  # not asked where the other one skips the call
    reused = reused_places(outer) | reused_places(inner)
    for record in (outer, inner):
        speed = cache_report(record, times, None, reused).speed
        assert speed.seconds_computed == 10
        assert speed.measured == pytest.approx(30 / 12)


def test_the_reports_of_all_caches_measure_against_the_same_calls(wan: Subject) -> None:
    caches = [Cache(Attention(("self",)), Static(compute_steps=(0,))), Cache(Output(), Static(compute_steps=(0, 4)))]
    with dit_accel.accelerate(wan.pipe, cache=caches, timed=True) as handle:
        wan.run()
        inner, outer = (report.speed for report in handle.report().caches)
    assert outer.seconds_computed is not None
    assert (inner.seconds_computed, inner.measured) == (outer.seconds_computed, outer.measured)


def watch(site: Any, found: dict[tuple[str, int], float]) -> None:
    """Notes the density of every sparse call of a site on the conditional branch, by site and step."""
    settle = site.settle

    def watched(state: Any) -> Any:
        density = settle(state)
        if density is not None and state.branch == "cond":
            found[site.info.path, state.step] = float(density)
        return density

    site.settle = watched


def densities(subject: Subject, cache: Cache, anchor: Anchor | None) -> dict[tuple[str, int], float]:
    """What each self-attention keeps at each step at which it runs."""
    found: dict[tuple[str, int], float] = {}
    with dit_accel.accelerate(subject.pipe, routing(), cache=cache, anchor=anchor) as handle:
        for site in handle._installed[0].sites.values():
            watch(site, found)
        subject.run()
    return found


@pytest.mark.parametrize(
    ("scope", "skipped"),
    [(Runs((0,)), {0}), (Output(), {0, 1}), (Attention(("self",)), {0, 1}), (FeedForward(), set())],
)
def test_an_anchor_acts_on_attention_that_was_skipped_and_behind_it_only(
    wan: Subject, scope: Scope, skipped: set[int]
) -> None:
    found = densities(wan, Cache(scope, Static(compute_steps=COMPUTED)), Anchor(factor=2.0, after=2))
    for block in (0, 1):
        kept = {step: density for (path, step), density in found.items() if path == f"blocks.{block}.attn1"}
        assert sorted(kept) == (list(COMPUTED) if block in skipped else list(range(8)))
        # Twice as many of five blocks; the last one is short, so that the pairs are not exactly twice as many.
        assert [step for step in kept if kept[step] > 1.5 * kept[0]] == ([5] if block in skipped else [])


def test_an_anchor_asks_for_nothing_where_units_decide_by_themselves(wan: Subject) -> None:
    cache = Cache(EachBlock(), Scripted(Moment.UNIT, computes=COMPUTED))
    plain = densities(wan, cache, None)
    assert plain and densities(wan, cache, Anchor(factor=2.0, after=2)) == plain


@pytest.mark.parametrize("scope", [EachBlock(), Attention(("self",))])
def test_an_audit_counts_steps_where_units_decide_by_themselves(
    wan: Subject, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedJudge, "factors", [])
    cache = Cache(scope, Scripted(Moment.UNIT), audit=Audit(every=2, limit=1e-9, factor=0.25))
    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        wan.run()
        record = handle.caches.engines[0].record
    units = list(record.units["transformer"])
    assert len(units) == 2
    audited = [(each.step, each.unit) for each in record.decisions if each.reason == "audit"]
    assert audited == [(step, unit) for step in (3, 5, 7) for unit in units]
    assert [(each.step, each.branch) for each in record.audits] == [(step, "cond") for step, _ in audited]
    assert ScriptedJudge.factors == [0.25] * 2 * 3  # both judges, once for each step


def measured(policy: Spectral, given: Sequence[Tensor], outputs: Sequence[Tensor], grid: Any) -> list[float]:
    """What a judge measures from the second step on, while all is reused."""
    judge = policy.judge(UNIT, len(given))
    found: list[float] = []
    for step, latents in enumerate(given):
        sigma = 0.9 - 0.2 * step
        sight = Sight(
            step,
            len(given),
            "cond",
            "transformer",
            UNIT,
            sigma,
            None,
            latents,
            signal=None,
            computed_step=None,
            grid=grid,
        )
        if step > 0:
            judge.wants_compute(sight)
            assert judge.value is not None
            found.append(judge.value)
        judge.note(sight, step == 0, outputs[step])
    return found


@pytest.mark.parametrize(
    ("shape", "channels", "axes", "grid"),
    [
        ((1, 4, 3, 4, 6), 1, None, None),  # Wan, HunyuanVideo
        ((1, 3, 4, 4, 6), 2, (1, 3, 4), None),  # CogVideoX
        ((1, 24, 4), 2, None, (1, 4, 6)),  # Flux
    ],
)
def test_seacache_does_not_measure_a_picture_beside_the_latents(
    shape: tuple[int, ...], channels: int, axes: tuple[int, ...] | None, grid: tuple[int, int, int] | None
) -> None:
    draw = torch.Generator().manual_seed(0)
    noisy = [torch.randn(shape, generator=draw) for _ in range(4)]
    picture = torch.randn(shape, generator=draw)
    beside = [torch.cat([latents, picture], dim=channels) for latents in noisy]
    policy = Spectral(9.0, axes=axes)
    assert measured(policy, beside, noisy, grid) == pytest.approx(measured(policy, noisy, noisy, grid), rel=1e-5)


def test_the_report_of_a_run_without_guidance_has_nothing_of_the_run_before(wan: Subject) -> None:
    cache = Cache(Guidance(copies=True), Broadcast({"guidance": 2}), decide="each")
    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        wan.run()
        assert handle.report().caches[0].gained
        wan.run(guidance_scale=1.0)
        report = handle.report().caches[0]
        assert report.rows == [] and report.generations == 1
        assert "had nothing to skip" in report.summary()
        wan.run()
        assert handle.report().caches[0].generations == 2


def test_a_cache_does_not_warm_up_with_a_method_that_is_not_used_any_more(
    wan: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ``attention="auto"`` chooses dense attention for the next generation."""
    cache = Cache(Whole(), Static(compute_steps=(0,)))
    with dit_accel.accelerate(wan.pipe, routing(dense_steps=4), cache=cache) as handle:
        wan.run()
        assert computed_steps(handle) == [0, 1, 2, 3]
        monkeypatch.setattr(handle, "_recipe", lambda installed, state: None)
        wan.run()
        assert computed_steps(handle) == [0]
