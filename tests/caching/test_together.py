"""Caches and sparse attention on one clock: common warm-up, probes, owed searches, anchors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_accel
from dit_accel.caching import Anchor, Cache, Limits
from dit_accel.caching.policies.base import Moment
from dit_accel.caching.policies.static import Static
from dit_accel.caching.scopes.blocks import Tail, Whole
from dit_accel.caching.scopes.output import Output
from dit_accel.processors import BlockRoutingAttnProcessor, RadialAttnProcessor

from ..seams.conftest import Subject, build_subject
from .test_engine import Scripted

STEPS = 8


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Text to video, eight steps."""
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs |= {"num_inference_steps": STEPS, "height": 192, "width": 128}
    return subject


def computed_steps(handle: Any) -> list[int]:
    """Steps at which the conditional branch was computed."""
    return [d.step for d in handle.caches.engines[0].record.decisions if d.computed and d.branch == "cond"]


def sparse_calls(handle: Any) -> dict[str, tuple[int, int]]:
    """Sparse and dense calls by site."""
    return {site.path: (site.sparse_calls, site.dense_calls) for site in handle.report().sites}


def routing(**settings: Any) -> BlockRoutingAttnProcessor:
    """A dynamic method that searches every other step."""
    usual: dict[str, Any] = {"block": 64, "select": "top_k", "amount": 0.4, "dense_steps": 0, "dense_layers": 0}
    return BlockRoutingAttnProcessor(**usual | settings)


def test_nothing_is_reused_while_attention_warms_up(wan: Subject) -> None:
    cache = Cache(Whole(), Static(compute_steps=(0,)))
    with dit_accel.accelerate(wan.pipe, routing(dense_steps=4), cache=cache) as handle:
        wan.run()
    assert computed_steps(handle) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("start", "computed", "calls"), [(4, [4], (1, 0)), (1, [1, 2], (0, 2)), (0, [0, 1, 2], (0, 3))]
)
def test_the_dense_steps_are_those_of_the_whole_schedule(
    wan: Subject, start: int, computed: list[int], calls: tuple[int, int]
) -> None:
    """Video to video leaves the first steps out, and with them the dense ones: the cache makes up for none."""
    cache = Cache(Whole(), Static(compute_steps=(0,)))
    latents, prompt = torch.randn(1, 16, 3, 24, 16), wan.inputs["prompt_embeds"]
    with dit_accel.accelerate(wan.root, routing(dense_steps=3), cache=cache) as handle, torch.no_grad():
        for step in range(start, STEPS):
            handle.clock.set_step(step, STEPS, "cond")
            wan.root(latents, torch.tensor([900 - step]), prompt, return_dict=False)
    assert computed_steps(handle) == computed
    assert set(sparse_calls(handle).values()) == {calls}


def test_attention_stays_dense_while_the_cache_warms_up(wan: Subject) -> None:
    cache = Cache(Whole(), Static(compute_steps=(0, 6)), limits=Limits(warmup=3))
    with dit_accel.accelerate(wan.pipe, routing(), cache=cache) as handle:
        wan.run()
    assert computed_steps(handle) == [0, 1, 2, 6]
    assert set(sparse_calls(handle).values()) == {(2, 6)}  # by two branches


def test_skipped_calls_are_no_calls_of_attention(wan: Subject) -> None:
    cache = Cache(Output(), Static(compute_steps=(0, 5)))
    radial = RadialAttnProcessor(dense_steps=0, dense_layers=0)
    with dit_accel.accelerate(wan.pipe, radial, cache=cache) as handle:
        wan.run()
    assert set(sparse_calls(handle).values()) == {(4, 0)}


def test_probed_blocks_attend_densely(wan: Subject) -> None:
    cache = Cache(Tail(1), Scripted(Moment.PROBE, computes=tuple(range(STEPS)), probe_blocks=1))
    with dit_accel.accelerate(wan.pipe, routing(), cache=cache) as handle:
        wan.run()
    calls = sparse_calls(handle)
    assert calls["transformer:blocks.0.attn1"] == (0, 2 * STEPS)
    assert calls["transformer:blocks.1.attn1"] == (2 * STEPS, 0)


def searches_at(subject: Subject, cache: Cache | None) -> list[int]:
    """Steps at which the first site searched for the conditional branch."""
    found: list[int] = []
    with dit_accel.accelerate(subject.pipe, routing(search_every=4), cache=cache) as handle:
        site = next(iter(handle._installed[0].sites.values()))
        settle = site.settle

        def watch(state: Any) -> Any:
            if state.branch == "cond" and site.found is not None:
                found.append(state.step)
            return settle(state)

        site.settle = watch  # type: ignore[method-assign]
        subject.run()
    return found


def test_a_search_that_was_skipped_is_made_up_for(wan: Subject) -> None:
    assert searches_at(wan, None) == [0, 4]
    assert searches_at(wan, Cache(Whole(), Static(compute_steps=(0, 1, 2, 6, 7)))) == [0, 6]


def kept_at(subject: Subject, anchor: Anchor | None) -> float:
    """Density over the sparse calls of steps 0, 1, 5, 6, 7."""
    cache = Cache(Whole(), Static(compute_steps=(0, 1, 5, 6, 7)))
    with dit_accel.accelerate(subject.pipe, routing(), cache=cache, anchor=anchor) as handle:
        subject.run()
        report = handle.report()
    assert report.plan_density is not None
    return report.plan_density


def test_the_first_call_after_skipped_ones_keeps_more(wan: Subject) -> None:
    plain = kept_at(wan, None)
    raised = kept_at(wan, Anchor(factor=2.0, after=2))
    assert raised == pytest.approx(plain * (4 + 2) / 5, rel=0.05)
    assert kept_at(wan, Anchor(factor=2.0, after=4)) == pytest.approx(plain, rel=1e-6)


def test_skipped_calls_of_a_run_that_broke_off_raise_nothing_in_the_next(wan: Subject) -> None:
    """The anchor counts within a generation, so the first call keeps what that of any run does."""

    def stop(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return values

    cache = Cache(Whole(), Static(compute_steps=(0, 1, 5, 6, 7)))
    with dit_accel.accelerate(wan.pipe, routing(), cache=cache, anchor=Anchor(factor=2.0, after=2)) as handle:
        wan.run()
        whole = handle.report().step_densities["transformer"]["cond"]
        with pytest.raises(KeyboardInterrupt):
            wan.run(callback_on_step_end=stop)
        wan.run()
        assert handle.report().step_densities["transformer"]["cond"] == whole


def test_sparse_and_cached_runs_repeat_bit_for_bit(wan: Subject) -> None:
    stock = wan.run()
    cache = Cache(Whole(), Static(compute_steps=(0, 1, 4, 7)))
    with dit_accel.accelerate(wan.pipe, routing(), cache=cache, anchor=Anchor()):
        first, second = wan.run(), wan.run()
    assert torch.equal(first, second) and not torch.equal(first, stock)
    assert torch.equal(wan.run(), stock)


def test_a_method_without_a_budget_cannot_be_anchored(wan: Subject) -> None:
    cache = Cache(Whole(), Static(compute_steps=(0,)))
    with pytest.raises(ValueError, match="anchor"):
        dit_accel.accelerate(wan.pipe, RadialAttnProcessor(rule="paper"), cache=cache, anchor=Anchor())
    with pytest.raises(ValueError, match="anchor"):
        dit_accel.accelerate(wan.pipe, cache=cache, anchor=Anchor())
    with pytest.raises(ValueError, match="a sparse method chosen by name or as a processor"):
        dit_accel.accelerate(wan.pipe, "auto", cache=cache, anchor=Anchor())


@pytest.mark.parametrize("settings", [{"factor": 0.5}, {"after": 0}, {"after": True}])
def test_bad_anchors_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"1 or more|from 1"):
        Anchor(**settings)


def test_a_cache_stays_when_the_attention_processor_is_replaced(wan: Subject) -> None:
    cache = Cache(Whole(), Static(compute_steps=(0, 4)))
    dit_accel.accelerate(wan.pipe, cache=cache, timed=True)
    wan.pipe.set_attn_processor(routing())
    handle = dit_accel.acceleration_of(wan.pipe)
    assert handle is not None and handle.timed
    with handle:
        wan.run()
        assert computed_steps(handle) == [0, 4] and handle.report().sites[0].sparse_calls == 4
    assert dit_accel.acceleration_of(wan.pipe) is None


def test_an_anchor_stays_when_the_method_is_replaced(wan: Subject) -> None:
    """Where the new method cannot keep more it is refused, and the old one stays."""
    cache = Cache(Whole(), Static(compute_steps=(0, 1, 5, 6, 7)))
    for anchor in (None, Anchor(factor=2.0, after=2)):
        with dit_accel.accelerate(wan.pipe, routing(), cache=cache, anchor=anchor) as handle:
            wan.run()
            wanted = handle.report().plan_density
        before = dit_accel.accelerate(wan.pipe, RadialAttnProcessor(dense_steps=0), cache=cache, anchor=anchor)
        if anchor is not None:
            with pytest.raises(ValueError, match="cannot keep more at an anchor"):
                wan.pipe.set_attn_processor(RadialAttnProcessor(rule="paper"))
            assert dit_accel.acceleration_of(wan.pipe) is before
        wan.pipe.set_attn_processor(routing())
        replaced = dit_accel.acceleration_of(wan.pipe)
        assert replaced is not None
        with replaced:
            wan.run()
            assert replaced.report().plan_density == wanted
    dit_accel.accelerate(wan.pipe, routing(), cache=cache, anchor=Anchor())
    wan.pipe.set_attn_processor(WanAttnProcessor())
    stock = dit_accel.acceleration_of(wan.pipe)
    assert stock is not None and stock.caches.anchor is None and len(stock.caches.engines) == 1
    stock.remove()
