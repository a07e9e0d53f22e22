"""The engine: which calls are computed, what stands in for the others, and what is never mixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import dit_accel
from dit_accel.caching import Audit, Cache, Limits
from dit_accel.caching.policies.base import Judge, Moment, Policy, Sight
from dit_accel.caching.policies.probe import ProbeDiff
from dit_accel.caching.policies.prune import UnitDiff
from dit_accel.caching.policies.static import Static
from dit_accel.caching.policies.transform import Transform
from dit_accel.caching.scopes.base import Scope
from dit_accel.caching.scopes.blocks import EachBlock, Range, Runs, Tail, Whole
from dit_accel.caching.scopes.output import Output

from ..seams.conftest import Subject, build_image_subject, build_subject

STEPS = 6
MASK = (1, 1, 0, 1, 0, 0)


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    """Text to video with two calls a step."""
    subject = build_subject(make_tiny_wan, "t2v")
    subject.inputs["num_inference_steps"] = STEPS
    return subject


def decisions(handle: Any) -> list[tuple[int, str, bool, str]]:
    """Step, branch, whether computed and why, of the latest generation."""
    return [(d.step, d.branch, d.computed, d.reason) for d in handle.caches.engines[0].record.decisions]


def hooked_run(subject: Subject, cache: Cache) -> tuple[torch.Tensor, Any]:
    """One generation with a cache, and its handle."""
    with dit_accel.accelerate(subject.pipe, cache=cache) as handle:
        return subject.run(), handle


@pytest.mark.parametrize("scope", [Whole(), Range(0, 1), Tail(1), Runs((0,)), EachBlock(), Output(), Output(False)])
def test_computing_every_step_changes_no_bit(wan: Subject, scope: Scope) -> None:
    stock = wan.run()
    found, handle = hooked_run(wan, Cache(scope, Static(mask=(1,) * STEPS)))
    assert torch.equal(found, stock)
    assert len(decisions(handle)) == 2 * STEPS and all(computed for _, _, computed, _ in decisions(handle))
    assert torch.equal(wan.run(), stock)
    assert "forward" not in vars(wan.root) and all("forward" not in vars(block) for block in wan.root.blocks)


def test_branches_share_the_verdict_of_the_first_one_and_no_values(wan: Subject) -> None:
    _, handle = hooked_run(wan, Cache(Whole(), Static(mask=MASK)))
    found = decisions(handle)
    assert [computed for _, branch, computed, _ in found if branch == "cond"] == [bool(part) for part in MASK]
    assert [computed for _, branch, computed, _ in found if branch == "uncond"] == [bool(part) for part in MASK]
    assert {reason for step, branch, _, reason in found if branch == "uncond" and step} == {"shared"}


def outputs_of_blocks(subject: Subject, cache: Cache) -> list[list[torch.Tensor]]:
    """By branch: what entered the norm behind the blocks, step by step."""
    seen: list[torch.Tensor] = []
    hook = subject.root.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        hooked_run(subject, cache)
    finally:
        hook.remove()
    return [seen[0::2], seen[1::2]]


def test_a_skipped_step_adds_the_residual_of_the_latest_computed_one(wan: Subject) -> None:
    entered: list[torch.Tensor] = []
    hook = wan.root.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    left = outputs_of_blocks(wan, Cache(Whole(), Static(mask=MASK)))
    hook.remove()
    for branch, outputs in enumerate(left):
        inputs = entered[branch::2]
        for step, source in ((2, 1), (4, 3), (5, 3)):
            expected = inputs[step] + (outputs[source] - inputs[source])
            torch.testing.assert_close(outputs[step], expected, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Scripted(Policy):
    """Computes listed steps, and records what it was shown."""

    at: Moment = Moment.CALL
    computes: tuple[int, ...] = (0, 1)
    probe_blocks: int = 0

    @property
    def moment(self) -> Moment:  # type: ignore[override]
        return self.at

    def judge(self, unit: Any, steps: int | None) -> Judge:
        return ScriptedJudge(self.computes)


class ScriptedJudge(Judge):
    seen: ClassVar[list[Sight]] = []
    noted: ClassVar[list[tuple[int, bool]]] = []
    factors: ClassVar[list[float]] = []

    def __init__(self, computes: tuple[int, ...]) -> None:
        self.computes = computes

    def wants_compute(self, sight: Sight) -> bool:
        self.seen.append(sight)
        return sight.step in self.computes

    def note(self, sight: Sight, computed: bool, output: torch.Tensor | None) -> None:
        self.noted.append((sight.step, computed))

    def tighten(self, factor: float) -> None:
        self.factors.append(factor)


@pytest.fixture(autouse=True)
def _fresh_script() -> None:
    ScriptedJudge.seen, ScriptedJudge.noted, ScriptedJudge.factors = [], [], []


@pytest.mark.parametrize("moment", [Moment.CALL, Moment.INPUT, Moment.PROBE])
def test_a_policy_is_asked_by_the_leading_branch_only_and_told_of_every_step(wan: Subject, moment: Moment) -> None:
    policy = Scripted(moment, computes=(0, 1, 4), probe_blocks=1 if moment is Moment.PROBE else 0)
    limits = Limits(warmup=2, cooldown=1)
    scope = Tail(1) if moment is Moment.PROBE else Whole()
    _, handle = hooked_run(wan, Cache(scope, policy, limits=limits))
    assert [sight.step for sight in ScriptedJudge.seen] == [2, 3, 4]
    assert {sight.branch for sight in ScriptedJudge.seen} == {"cond"}
    assert ScriptedJudge.noted == [(0, True), (1, True), (2, False), (3, False), (4, True), (5, True)]
    reasons = [reason for _, branch, _, reason in decisions(handle) if branch == "cond"]
    assert reasons == ["first", "warm-up", "policy", "policy", "policy", "cool-down"]
    assert all((sight.signal is None) == (moment is Moment.CALL) for sight in ScriptedJudge.seen)


def test_a_probe_is_what_the_first_blocks_added(wan: Subject) -> None:
    inputs, outputs = [], []
    first = wan.root.blocks[0]
    hooks = [
        first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone())),
        first.register_forward_hook(lambda module, args, output: outputs.append(output.clone())),
    ]
    hooked_run(wan, Cache(Tail(1), Scripted(Moment.PROBE, computes=tuple(range(STEPS)), probe_blocks=1)))
    for hook in hooks:
        hook.remove()
    assert [sight.step for sight in ScriptedJudge.seen] == list(range(1, STEPS))
    for sight in ScriptedJudge.seen:
        assert sight.signal is not None
        assert torch.equal(sight.signal, outputs[2 * sight.step] - inputs[2 * sight.step])


def test_deciding_each_for_itself_asks_every_branch(wan: Subject) -> None:
    hooked_run(wan, Cache(Whole(), Scripted(), decide="each"))
    assert {sight.branch for sight in ScriptedJudge.seen} == {"cond", "uncond"}


def test_units_have_judges_of_their_own_that_see_what_enters_them(
    wan: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Judge]] = []
    stock = ScriptedJudge.wants_compute

    def wants_compute(judge: ScriptedJudge, sight: Sight) -> bool:
        asked.append((sight.unit.key, judge))
        return stock(judge, sight)

    monkeypatch.setattr(ScriptedJudge, "wants_compute", wants_compute)
    entered: dict[str, list[torch.Tensor]] = {"block 0": [], "block 1": []}
    hooks = [
        block.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].clone()))
        for block, inputs in zip(wan.root.blocks, entered.values(), strict=True)
    ]
    hooked_run(wan, Cache(EachBlock(), Scripted(Moment.UNIT, computes=tuple(range(STEPS)))))
    for hook in hooks:
        hook.remove()
    places = [(sight.step, sight.unit.key) for sight in ScriptedJudge.seen]
    assert places == [(step, key) for step in range(1, STEPS) for key in entered]
    for sight in ScriptedJudge.seen:
        assert sight.signal is not None
        assert torch.equal(sight.signal, entered[sight.unit.key][2 * sight.step])  # of the branch that decides
    assert len(set(asked)) == len({judge for _, judge in asked}) == len(entered)


def test_an_audit_computes_compares_and_tightens(wan: Subject) -> None:
    cache = Cache(Whole(), Scripted(), audit=Audit(every=2, limit=1e-9, factor=0.25))
    _, handle = hooked_run(wan, cache)
    record = handle.caches.engines[0].record
    assert [(result.step, result.tightened) for result in record.audits if result.branch == "cond"] == [
        (3, True),
        (5, True),
    ]
    assert all(0 < result.error < 10 for result in record.audits)
    assert set(ScriptedJudge.factors) == {0.25}
    computed = [step for step, branch, computed, _ in decisions(handle) if branch == "cond" and computed]
    assert computed == [0, 1, 3, 5]


@pytest.mark.parametrize(("name", "scope"), [("flux", Whole()), ("sd3", Range(0, 1))])
def test_an_audit_looks_at_the_stream_of_the_image(name: str, scope: Scope) -> None:
    """Not at that of the text, which these blocks give first."""
    subject, changes = build_image_subject(name), list[torch.Tensor]()
    blocks = subject.root.transformer_blocks
    last = subject.root.single_transformer_blocks[-1] if name == "flux" else blocks[0]

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        changes.append(-kwargs["hidden_states"])

    def leave(module: Any, args: Any, output: Any) -> None:
        changes[-1] = changes[-1] + output[1]

    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    last.register_forward_hook(leave)
    subject.inputs |= {"num_inference_steps": 4, "guidance_scale": 1.0, "true_cfg_scale": 1.0}
    subject.inputs.pop("guidance_scale" if name == "flux" else "true_cfg_scale")
    _, handle = hooked_run(subject, Cache(scope, Scripted(), audit=Audit(every=1, limit=1e-9)))
    errors = [result.error for result in handle.caches.engines[0].record.audits]
    wanted = [float((a - b).abs().mean() / b.abs().mean()) for a, b in itertools.pairwise(changes[1:])]
    assert len(changes) == 4 and errors == pytest.approx(wanted, rel=1e-3)


def test_a_cache_for_one_branch_leaves_the_other_alone(wan: Subject) -> None:
    _, handle = hooked_run(wan, Cache(Whole(), Static(mask=MASK), branches=("uncond",)))
    assert {reason for _, branch, _, reason in decisions(handle) if branch == "cond"} == {"branch"}
    reused = [(step, branch) for step, branch, computed, _ in decisions(handle) if not computed]
    assert reused == [(step, "uncond") for step, computed in enumerate(MASK) if not computed]


def test_the_estimate_of_memory_is_what_is_kept(wan: Subject) -> None:
    _, handle = hooked_run(wan, Cache(Whole(), Static(mask=MASK)))
    record = handle.caches.engines[0].record
    tokens = 3 * 2 * 2  # frames, height and width of the grid
    assert record.bytes_most == 2 * tokens * 32 * 4
    assert (
        record.estimate
        == f"about {record.bytes_most / 1024:.3g} KiB: 2 branches x 1 value of {record.bytes_most / 2048:.3g} KiB"
    )


TOKENS, LATENTS = 3 * 2 * 2 * 32 * 4, 16 * 3 * 4 * 4 * 4  # bytes of one stream, and of what goes in and out


@pytest.mark.parametrize(
    ("scope", "policy", "by_judges"),
    [
        (EachBlock(), UnitDiff(0.0), 2 * TOKENS),
        (Tail(1), ProbeDiff(0.0, of="excess"), 2 * TOKENS),
        (Whole(), Transform(0.0), 2 * LATENTS + 4),  # latents, output and the rate between them
        (Whole(), Transform(0.0) | Static(mask=MASK) | Transform(0.0), 2 * (2 * LATENTS + 4)),
    ],
)
def test_what_policies_keep_to_compare_with_is_counted(
    wan: Subject, scope: Scope, policy: Policy, by_judges: int
) -> None:
    with dit_accel.accelerate(wan.pipe, cache=Cache(scope, policy)) as handle:
        wan.run()
        record = handle.caches.engines[0].record
        stored = 2 * TOKENS * len(record.units["transformer"])  # of two branches
        assert record.bytes_most == stored + by_judges and record.bytes_now == 0


def test_nothing_is_kept_once_a_generation_has_ended(wan: Subject) -> None:
    with dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Static(mask=(1, 1, 1, 0, 1, 0)))) as handle:
        wan.run()
        record = handle.caches.engines[0].record
        assert record.bytes_now == 0 and record.bytes_most > 0


def test_the_second_expert_begins_anew(make_tiny_wan: Callable[[int], Any]) -> None:
    subject = build_subject(make_tiny_wan, "two-experts")
    subject.inputs["num_inference_steps"] = STEPS
    _, handle = hooked_run(subject, Cache(Whole(), Static(compute_steps=(0,))))
    record = handle.caches.engines[0].record
    second = [d for d in record.decisions if d.expert == "transformer_2" and d.branch == "cond"]
    assert second and second[0].computed and second[0].reason == "first" and second[0].step > 0
    assert not any(d.computed for d in second[1:])


def test_both_experts_warm_up_once_and_share_what_may_be_reused(make_tiny_wan: Callable[[int], Any]) -> None:
    subject = build_subject(make_tiny_wan, "two-experts")
    subject.inputs["num_inference_steps"] = STEPS
    with dit_accel.accelerate(subject.pipe, cache=Cache(Whole(), Static(mask=(1,) * STEPS))) as handle:
        subject.run()
        experts = [d.expert for d in handle.caches.engines[0].record.decisions if d.branch == "cond"]
    switch = experts.index("transformer_2")
    assert 0 < switch < STEPS - 2
    _, handle = hooked_run(subject, Cache(Whole(), Static(compute_steps=()), limits=Limits(warmup=switch)))
    reasons = [reason for _, branch, _, reason in decisions(handle) if branch == "cond"]
    assert reasons[switch:] == ["first"] + ["policy"] * (STEPS - switch - 1)  # the warm-up is over
    most = STEPS - switch - 2
    cache = Cache(Whole(), Static(compute_steps=(0,)), limits=Limits(warmup=switch, max_total=most))
    _, handle = hooked_run(subject, cache)
    assert sum(not computed for _, branch, computed, _ in decisions(handle) if branch == "cond") == most


def test_another_prompt_on_a_bare_model_is_computed(wan: Subject) -> None:
    """Unnamed branches are told apart by their prompt, never by the parity of calls."""
    root, latents = wan.root, torch.randn(1, 16, 3, 4, 4)
    prompts = [torch.randn(1, 16, 64) for _ in range(3)]
    with dit_accel.accelerate(root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        for step, order in enumerate([(0, 1), (0, 1), (1, 2), (1,)]):
            for which in order:
                handle.clock.set_step(step, 4)
                root(latents, torch.tensor([900 - step]), prompts[which])
    found = [(step, branch, computed, reason) for step, branch, computed, reason in decisions(handle)]
    assert found[2:4] == [(1, "call0", False, "policy"), (1, "call1", False, "shared")]
    assert found[4:6] == [(2, "call0", True, "prompt"), (2, "call1", True, "prompt")]


def test_what_a_controlnet_adds_between_blocks_counts_once() -> None:
    subject = build_image_subject("sd3")
    root = subject.root
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 8, 6),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([500.0]),
    }
    control = [torch.randn(1, 12, 16), torch.randn(1, 12, 16)]
    with dit_accel.accelerate(root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle, torch.no_grad():
        for step in range(2):
            handle.clock.set_step(step, 2)
            found = root(**inputs, block_controlnet_hidden_states=control, return_dict=False)[0]
            if step == 0:
                stock = found
    assert [computed for _, _, computed, _ in decisions(handle)] == [True, False]
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-5)  # same inputs, so the same residual


def test_a_model_that_leaves_out_the_last_block_of_a_unit_is_computed() -> None:
    root = build_image_subject("sd3").root
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 8, 6),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        stock = root(**inputs, skip_layers=[1], return_dict=False)[0]
        with dit_accel.accelerate(root, cache=Cache(Whole(), Static(compute_steps=(0,)))) as handle:
            handle.clock.set_step(0, 2)
            root(**inputs, return_dict=False)
            handle.clock.set_step(1, 2)
            with pytest.warns(UserWarning, match="left out blocks"):
                found = root(**inputs, skip_layers=[1], return_dict=False)[0]
    assert torch.equal(found, stock)


def test_compiled_blocks_stay_inside_the_cache(wan: Subject) -> None:
    with dit_accel.accelerate(wan.pipe, cache=Cache(Whole(), Static(mask=MASK))) as handle:
        expected = wan.run()
        with pytest.raises(ValueError, match="compile_repeated_blocks"):
            wan.root.compile()
        wan.root.compile_repeated_blocks(backend="eager", fullgraph=True)
        found = wan.run()
        assert sum(computed for _, _, computed, _ in decisions(handle)) == 6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all("compile" not in vars(block) for block in wan.root.blocks)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Cache(Range(0, 3), Static(mask=MASK)), "has 2 blocks"),
        (Cache(Tail(2), Static(mask=MASK)), "at most 1"),
        (Cache(Runs((0, 5)), Static(mask=MASK)), "from 0 to 1"),
        (Cache(Whole(), Scripted(Moment.PROBE, probe_blocks=1)), "probe with"),
        (Cache(Output(), Scripted(Moment.INPUT)), "must have decided already"),
    ],
)
def test_what_a_model_has_not_is_refused_and_leaves_no_trace(wan: Subject, cache: Cache, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.accelerate(wan.pipe, cache=cache)
    assert "forward" not in vars(wan.root) and dit_accel.acceleration_of(wan.pipe) is None
