"""What a cache must not leak, and must not take for something else, over the life of a pipeline."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.caching import Audit, Cache, Limits
from dit_accel.caching.policies.base import Moment
from dit_accel.caching.policies.static import Interval, Static
from dit_accel.caching.policies.transform import Transform
from dit_accel.caching.scopes.blocks import Range, Whole
from dit_accel.caching.scopes.guidance import Guidance
from dit_accel.caching.scopes.modules import Attention, FeedForward
from dit_accel.caching.scopes.output import Output
from dit_accel.controls import AttentionMassRecorder
from dit_accel.processors import RadialAttnProcessor

from ..seams.conftest import Subject, build_subject
from .test_engine import Scripted, ScriptedJudge, decisions

STEPS = 6


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Text to video with two calls a step."""
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs["num_inference_steps"] = STEPS
    return subject


@pytest.fixture
def bare(make_tiny_wan: Callable[[int], Any]) -> Callable[..., torch.Tensor]:
    """One call of a bare transformer, in a loop of one's own."""
    root = build_subject(make_tiny_wan, "t2v").root
    prompt = torch.randn(1, 16, 64)

    def call(handle: Any, step: int, latents: torch.Tensor, branch: str | None = None) -> torch.Tensor:
        handle.clock.set_step(step, STEPS, branch)
        output: torch.Tensor = root(latents, torch.tensor([900 - step]), prompt, return_dict=False)[0]
        return output

    call.root = root  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("scope", [Whole(), Output(), Attention(("self",))])
@pytest.mark.parametrize("policy", [Static(compute_steps=(0, 2)), Transform(1e-9)])
def test_no_graph_of_an_earlier_step_is_kept(bare: Any, scope: Any, policy: Any) -> None:
    """With gradients enabled each call's graph ends at its own inputs."""
    with dit_accel.accelerate(bare.root, cache=Cache(scope, policy)) as handle:
        for step in range(4):
            latents = torch.randn(1, 16, 3, 4, 4, requires_grad=True)
            output = bare(handle, step, latents)
            output.sum().backward()  # fails if a graph that was freed belongs to it
            assert step in (1, 3) or latents.grad is not None
            given = weakref.ref(latents)
            del output, latents
            gc.collect()
            assert given() is None  # what a graph, or the engine, would hold


def test_probes_keep_no_graph(bare: Any) -> None:
    from dit_accel.caching.predictors.linear import AdaptiveLinear
    from dit_accel.caching.scopes.blocks import Tail

    policy = Scripted(Moment.PROBE, computes=(0, 1), probe_blocks=1)
    with dit_accel.accelerate(bare.root, cache=Cache(Tail(1), policy, AdaptiveLinear())) as handle:
        for step in range(4):
            latents = torch.randn(1, 16, 3, 4, 4, requires_grad=True)
            bare(handle, step, latents).sum().backward()
            assert latents.grad is not None


def test_gradient_checkpointing_is_refused(bare: Any) -> None:
    """Skipped blocks would be computed again, and for real, in the backward pass."""
    bare.root.enable_gradient_checkpointing()
    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle:
        with pytest.raises(NotImplementedError, match="disable_gradient_checkpointing"):
            bare(handle, 0, latents)
        with torch.no_grad():
            bare(handle, 0, latents)


def test_a_copied_pipeline_runs_its_own_weights(wan: Subject) -> None:
    with dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Static(compute_steps=(0,)))):
        wan.run()
        twin = copy.deepcopy(wan.pipe)
        with torch.no_grad():
            for parameter in twin.transformer.blocks.parameters():
                parameter.mul_(0.5)
        found = Subject(twin, wan.inputs).run()
    with torch.no_grad():
        kept = {name: value.clone() for name, value in wan.root.blocks.named_parameters()}
        for parameter in wan.root.blocks.parameters():
            parameter.mul_(0.5)
        expected = wan.run()
        for name, value in wan.root.blocks.named_parameters():
            value.copy_(kept[name])
    assert torch.equal(found, expected)


def test_model_offloading_leaves_the_cache_on_and_outlives_it(make_tiny_wan: Callable[[int], Any]) -> None:
    """Diffusers takes the hooks of accelerate off and puts them on again behind every generation."""
    hooks = pytest.importorskip("accelerate.hooks")
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs["num_inference_steps"] = STEPS
    stock = subject.run()
    hooks.add_hook_to_module(subject.root, hooks.ModelHook())
    with dit_accel.accelerate(subject.pipe, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle:
        for _ in range(2):
            subject.run()
            assert sum(not computed for _, _, computed, _ in decisions(handle)) == 2 * (STEPS - 1)
            hooks.remove_hook_from_module(subject.root)
            hooks.add_hook_to_module(subject.root, hooks.ModelHook())
    assert hasattr(subject.root, "_hf_hook")
    record = handle.caches.engines[0].record
    before = (record.generations, record.computed.total(), record.reused.total())
    assert torch.equal(subject.run(), stock)
    assert (record.generations, record.computed.total(), record.reused.total()) == before


def test_a_unit_that_was_not_asked_loses_its_value(bare: Any) -> None:
    """Within skipped blocks attention is not entered; later its value would be older than any limit allows."""
    inner = Cache(Attention(("self",)), Static(compute_steps=(0,)), limits=Limits(max_consecutive=1))
    outer = Cache(Range(1, 2), Static(compute_steps=(0, 3)))
    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=[inner, outer]) as handle, torch.no_grad():
        ran: list[int] = []
        step = -1
        hook = bare.root.blocks[1].attn1.to_q.register_forward_hook(lambda *args: ran.append(step))
        for step in range(4):
            bare(handle, step, latents)
        hook.remove()
    assert ran == [0, 3]


def test_a_branch_left_out_is_not_taken_for_a_skipped_one(wan: Subject) -> None:
    """The report of attention counts its calls."""
    controls = [AttentionMassRecorder(64)]
    cache = Cache(Whole(), Static(compute_steps=(0,)), branches=("cond",))
    with dit_accel.accelerate(wan.pipe, cache=cache, controls=controls) as handle:
        seen: list[bool] = []
        after = handle._installed[0]._after_call

        def watch(installed: Any) -> None:
            site = next(iter(installed.sites.values()))
            seen.append(handle.caches.skipped(site.info))
            after(installed)

        handle._installed[0]._after_call = watch
        wan.run()
    assert seen == [False, False] + [True, False] * (STEPS - 1)


def test_branches_that_guidance_left_early_are_let_go_at_the_end(bare: Any) -> None:
    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        for step in range(STEPS):
            bare(handle, step, latents, "cond")
            if step < 3:
                bare(handle, step, latents, "uncond")
        assert handle.caches.engines[0].record.bytes_now == 0


def test_a_branch_that_comes_back_is_computed(bare: Any) -> None:
    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        for step in range(5):
            bare(handle, step, latents, "cond")
            if step != 2:
                bare(handle, step, latents, "uncond")
    found = [(step, computed) for step, branch, computed, _ in decisions(handle) if branch == "uncond"]
    assert found == [(0, True), (1, False), (3, True), (4, False)]


def test_equal_generations_are_audited_at_equal_steps(wan: Subject) -> None:
    cache = Cache(Whole(), Scripted(), audit=Audit(every=3, limit=1e-9))
    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        first, steps = wan.run(), [audit.step for audit in handle.caches.engines[0].record.audits]
        second, again = wan.run(), [audit.step for audit in handle.caches.engines[0].record.audits]
    assert steps == again and steps
    assert torch.equal(first, second)
    assert ScriptedJudge.factors == [0.5] * 2  # once in each generation, not for each branch


def test_an_audit_of_a_rule_without_threshold_is_refused_before_it_runs(wan: Subject) -> None:
    with pytest.raises(ValueError, match="no threshold"):
        dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Interval(2), audit=Audit(every=2, limit=0.1)))
    assert dit_accel.acceleration_of(wan.pipe) is None


def test_the_precision_of_autocast_belongs_to_a_value(bare: Any) -> None:
    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        bare(handle, 0, latents)
        bare(handle, 1, latents)
        with torch.autocast("cpu", torch.bfloat16):
            bare(handle, 2, latents)
            bare(handle, 3, latents)
    assert [computed for _, _, computed, _ in decisions(handle)] == [True, False, True, False]


def test_inference_mode_and_plain_runs_may_alternate(wan: Subject) -> None:
    cache = Cache(Whole(), Static(compute_steps=(0, 3)))
    with dit_accel.accelerate(wan.pipe, cache=cache):
        plain = wan.run()
        with torch.inference_mode():
            found = wan.run()
        again = wan.run()
    assert torch.equal(plain, found) and torch.equal(plain, again)


def test_nothing_is_left_of_a_generation_that_a_callback_broke_off(wan: Subject) -> None:
    cache = Cache(Whole(), Static(compute_steps=(0, 3)))

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        expected = wan.run()
        with pytest.raises(KeyboardInterrupt):
            wan.run(callback_on_step_end=stop)
        assert torch.equal(wan.run(), expected)
        assert decisions(handle)[0][3] == "first"


def test_a_second_thread_is_refused_and_the_first_one_goes_on(bare: Any) -> None:
    """Their blocks could not be told apart: one would be given what belongs to the other."""
    latents, others = torch.randn(2, 1, 16, 3, 4, 4)
    entered, go = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        entered.set()
        assert go.wait(60)

    def first_call(handle: Any) -> torch.Tensor:
        with torch.no_grad():
            return bare(handle, 0, latents)

    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        with dit_accel.accelerate(bare.root) as handle:
            stock = bare(handle, 0, latents)
        caches = [Cache(Attention(("self",)), Static(compute_steps=(0,))), Cache(Whole(), Static(compute_steps=(0,)))]
        radial = RadialAttnProcessor(block=64, dense_steps=0, dense_layers=0)
        with dit_accel.accelerate(bare.root, radial, cache=caches) as handle:
            hook = bare.root.blocks[0].register_forward_pre_hook(wait)
            running = pool.submit(first_call, handle)
            assert entered.wait(60)
            with pytest.raises(RuntimeError, match="one call at a time"):
                bare(handle, 0, others)
            hook.remove()
            go.set()
            torch.testing.assert_close(running.result(), stock)
            assert {(site.sparse_calls, site.dense_calls) for site in handle.report().sites} == {(1, 0)}
            before = handle.clock.state
            bare(handle, 1, latents)
            after = handle.clock.state
            assert before is not None and after is not None and after.generation == before.generation
            assert not handle.caches.engines[-1].record.decisions[-1].computed


def test_a_call_that_fails_lets_the_next_one_in(bare: Any) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        hook = bare.root.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            bare(handle, 0, latents)
        hook.remove()
        bare(handle, 1, latents)
        bare(handle, 2, latents)
    found = [(step, computed) for step, _, computed, _ in decisions(handle)]
    assert found[-2:] == [(1, True), (2, False)]


def test_both_warm_up_where_the_generation_begins(bare: Any) -> None:
    """Image to image leaves the first steps out."""
    latents, dense = torch.randn(1, 16, 3, 4, 4), []
    cache = Cache(Whole(), Static(compute_steps=(0,)), limits=Limits(warmup=2))
    with dit_accel.accelerate(bare.root, cache=cache) as handle, torch.no_grad():
        before = handle._installed[0]._before_call

        def watch(installed: Any, state: Any) -> None:
            site = next(iter(installed.sites.values()))
            dense.append(handle.caches.keeps_dense(site.info, state))
            before(installed, state)

        handle._installed[0]._before_call = watch
        for step in range(2, STEPS):
            bare(handle, step, latents)
        reasons = [reason for _, _, _, reason in decisions(handle)]
    assert dense == [True, True, False, False] and reasons == ["first", "warm-up", "policy", "policy"]


def test_a_model_that_is_told_classes_instead_of_prompts() -> None:
    """Another class is another branch, whatever its place in the loop."""
    subject = build_unet_with_classes()
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    with dit_accel.accelerate(subject, cache=Cache(Output(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        for step, label in enumerate((1, 1, 2, 2)):
            handle.clock.set_step(step, 6)
            subject(latents, 900 - step, text, class_labels=torch.tensor([label]))
        found = [(computed, reason) for _, _, computed, reason in decisions(handle)]
    assert found == [(True, "first"), (False, "policy"), (True, "prompt"), (False, "policy")]


def build_unet_with_classes() -> Any:
    """Tiny, untrained."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        num_class_embeds=5,
    ).eval()


def test_chunks_of_a_feed_forward_are_computed() -> None:
    """A module that is called several times in one call has no single value."""
    unet, latents, text = build_unet_with_classes(), torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, dim=0)
    both, labels = torch.cat([latents, 2 * latents]), torch.tensor([1, 2])
    with torch.no_grad():
        stock = unet(both, 500, text.repeat(2, 1, 1), class_labels=labels).sample
        with dit_accel.accelerate(unet, cache=Cache(FeedForward(), Static(compute_steps=(0,)))) as handle:
            for step in range(3):
                handle.clock.set_step(step, 4)
                found = unet(both, 500, text.repeat(2, 1, 1), class_labels=labels).sample
                assert torch.equal(found, stock)


def test_nothing_is_held_behind_a_generation_that_ends_early(wan: Subject) -> None:
    """As that of a base model ends before its refiner begins; its pipeline says that it is done."""
    stock = wan.run()

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3  # the pipeline passes over all steps to come
        return {}

    with dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Static(compute_steps=(0, 1, 3)))) as handle:
        engine = handle.caches.engines[0]
        wan.run(callback_on_step_end=stop)
        assert {each.step for each in engine.record.decisions} == {0, 1, 2, 3}
        assert engine.record.bytes_now == 0 < engine.record.bytes_most and not engine._tracks
        before = handle.clock.state
        wan.run()
        after = handle.clock.state
        assert before is not None and after is not None and after.generation == before.generation + 1
        assert len({each.step for each in engine.record.decisions}) == STEPS
    assert "_reset_stateful_cache" not in vars(wan.root) and torch.equal(wan.run(), stock)


def test_judges_do_not_outlive_their_generation(wan: Subject) -> None:
    judges: list[Any] = []

    class Noting(Scripted):
        def judge(self, unit: Any, steps: int | None) -> Any:
            judge = super().judge(unit, steps)
            judges.append(weakref.ref(judge))
            return judge

    with dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Noting())):
        wan.run()
        gc.collect()
        assert judges and all(judge() is None for judge in judges)


def test_a_model_wrapped_by_the_compiler_gives_the_same_pictures(wan: Subject) -> None:
    from torch._dynamo import reset

    cache = Cache(Whole(), Static(compute_steps=(0, 3)))
    stock = wan.root
    with dit_accel.accelerate(wan.pipe, cache=cache) as handle:
        expected, told = wan.run(), [computed for _, _, computed, _ in decisions(handle)]
        wan.pipe.transformer = torch.compile(stock, backend="eager")
        try:
            found = wan.run()
        finally:
            wan.pipe.transformer = stock
            reset()
        assert [computed for _, _, computed, _ in decisions(handle)] == told
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_cache_of_diffusers_on_the_model_is_refused(wan: Subject) -> None:
    from diffusers import FirstBlockCacheConfig

    wan.root.enable_cache(FirstBlockCacheConfig())
    try:
        with pytest.raises(ValueError, match="disable_cache"):
            dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Static(compute_steps=(0,))))
    finally:
        wan.root.disable_cache()
    assert dit_accel.acceleration_of(wan.pipe) is None


def test_a_second_order_scheduler_has_its_steps_one_by_one(wan: Subject) -> None:
    """Heun's two evaluations of a step are steps of their own; a swapped scheduler begins anew."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    before = wan.pipe.scheduler
    with dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Interval(2))) as handle:
        expected = wan.run()
        wan.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
        try:
            wan.run(num_inference_steps=3)
        finally:
            wan.pipe.scheduler = before
        found = [(step, computed) for step, branch, computed, _ in decisions(handle) if branch == "cond"]
        assert found == [(step, step % 2 == 0) for step in range(5)]
        assert torch.equal(wan.run(), expected)


def test_half_a_batch_is_run_inside_offloading_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    unet, latents, text = build_unet_with_classes(), torch.randn(1, 4, 8, 8), torch.randn(2, 3, 16)
    given: dict[str, Any] = {"class_labels": torch.tensor([1, 1])}
    with torch.no_grad():
        stock = unet(latents.repeat(2, 1, 1, 1), 500, text, **given).sample
        hooks.add_hook_to_module(unet, hooks.ModelHook())
        cache = Cache(Guidance(copies=True), Static(compute_steps=(0,)), decide="each")
        with dit_accel.accelerate(unet, cache=cache) as handle:
            found = []
            for step in range(2):
                handle.clock.set_step(step, 4)
                found.append(unet(latents.repeat(2, 1, 1, 1), 500, text, **given).sample)
    assert [(step, computed) for step, _, computed, _ in decisions(handle)] == [(0, True), (1, False)]
    assert torch.equal(found[0], stock)
    torch.testing.assert_close(found[1], stock[1:].repeat(2, 1, 1, 1), rtol=0, atol=1e-5)


def test_a_cache_inside_another_begins_anew_behind_calls_that_it_did_not_see(bare: Any) -> None:
    """The last of a list is outermost: what it skips, the others are not asked."""
    inner, outer = Cache(Whole(), Static(compute_steps=(0,))), Cache(Output(), Static(compute_steps=(0, 3, 4)))
    latents = torch.randn(1, 16, 3, 4, 4)
    with dit_accel.accelerate(bare.root, cache=[inner, outer]) as handle, torch.no_grad():
        for step in range(STEPS - 1):
            bare(handle, step, latents)
        found = [(step, computed, reason) for step, _, computed, reason in decisions(handle)]
    assert found == [(0, True, "first"), (3, True, "jump"), (4, False, "policy")]
