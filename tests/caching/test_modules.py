"""FORA, PAB, TaylorSeer and FasterCache's attention on tiny Wan pipelines, against plain loops over steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel import accelerate
from dit_accel.caching.policies.base import Sight
from dit_accel.caching.policies.broadcast import Broadcast
from dit_accel.caching.predictors.base import Kept, Place
from dit_accel.caching.predictors.dynamic_reuse import DynamicReuse
from dit_accel.caching.presets.modules import fastercache, fora, pab, taylorseer
from dit_accel.caching.scopes.base import RootView
from dit_accel.caching.scopes.modules import Attention, FeedForward, Modules
from dit_accel.caching.unit import Unit

from ..seams.conftest import Subject, build_subject

STEPS = 8
Rule = Callable[[str, int, float], bool]  # kind, step and timestep: computed?
Predict = Callable[[list[tuple[int, torch.Tensor]], int], torch.Tensor]  # step and value of the computed ones; step


class PlainLoop:
    """Runs every module always, notes what it gives, and swaps outputs by hand where the rule says so.

    Kept apart by branch: the pipeline calls the conditional branch first and the other one after it.
    """

    def __init__(self, subject: Subject, kinds: dict[str, str], rule: Rule, predict: Predict) -> None:
        self.subject, self.rule, self.predict = subject, rule, predict
        self.calls = -1
        self.kept: dict[tuple[str, int], list[tuple[int, torch.Tensor]]] = {}
        self.reused: list[tuple[int, str, str]] = []
        self.handles = [subject.root.register_forward_pre_hook(self._count)]
        for path, module in subject.root.named_modules():
            kind = kinds.get(path.rpartition(".")[2])
            if kind is not None and path.startswith("blocks."):
                self.handles.append(module.register_forward_hook(self._hook(path, kind)))

    def _count(self, module: Any, args: Any) -> None:
        self.calls += 1

    def _hook(self, path: str, kind: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            step, branch = divmod(self.calls, 2)
            timestep = float(self.subject.pipe.scheduler.timesteps[step])
            past = self.kept.setdefault((path, branch), [])
            if not past or self.rule(kind, step, timestep):
                past.insert(0, (step, output.clone()))
                return None
            self.reused.append((step, ("cond", "uncond")[branch], path))
            return self.predict(past, step)

        return hook

    def run(self) -> torch.Tensor:
        """Latents of one generation."""
        try:
            return self.subject.run(num_inference_steps=STEPS)
        finally:
            for handle in self.handles:
                handle.remove()


def latest(past: list[tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
    """What was computed last."""
    return past[0][1]


def taylor(past: list[tuple[int, torch.Tensor]], step: int, order: int = 2) -> torch.Tensor:
    """TaylorSeer: differences over the gap, each order divided by its factorial."""
    derivatives: list[torch.Tensor] = []
    for place, (at, value) in reversed(list(enumerate(past[: order + 1]))):
        if not derivatives:
            derivatives = [value]
            continue
        gap, new = at - past[place + 1][0], [value]
        for before in derivatives[:order]:
            new.append((new[-1] - before) / gap)
        derivatives = new
    result, factor = torch.zeros_like(past[0][1]), 1.0
    for power, derivative in enumerate(derivatives):
        factor *= max(power, 1)
        result = result + derivative * (step - past[0][0]) ** power / factor
    return result


def growing(past: list[tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
    """FasterCache: moved on by a share of the latest change that grows from 0 to 1."""
    if len(past) < 2:
        return past[0][1]
    return past[0][1] + step / (STEPS - 1) * (past[0][1] - past[1][1])


def in_window(timestep: float, low: float, high: float) -> bool:
    return low < timestep < high


CASES: dict[str, tuple[Any, dict[str, str], Rule, Predict]] = {
    "fora": (fora(interval=3), {"attn1": "self", "attn2": "cross", "ffn": "mlp"}, lambda k, s, t: s % 3 == 0, latest),
    "pab": (
        pab(cross=3, window=(300, 980)),
        {"attn1": "self", "attn2": "cross"},
        lambda k, s, t: s % (2 if k == "self" else 3) == 0 or not in_window(t, 300, 980),
        latest,
    ),
    "taylorseer": (
        taylorseer(interval=2, order=2),
        {"attn1": "self", "attn2": "cross", "ffn": "mlp"},
        lambda k, s, t: s < 3 or (s - 2) % 2 == 0,
        taylor,
    ),
    "fastercache": (
        fastercache(window=(-1, 980))[1],
        {"attn1": "self"},
        lambda k, s, t: s % 2 == 0 or not in_window(t, -1, 980),
        growing,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_preset_matches_the_plain_loop(name: str, make_tiny_wan: Callable[[int], Any]) -> None:
    recipe, kinds, rule, predict = CASES[name]
    subject = build_subject(make_tiny_wan, "t2v")
    stock = subject.run(num_inference_steps=STEPS)
    oracle = PlainLoop(subject, kinds, rule, predict)
    wanted = oracle.run()
    with accelerate(subject.pipe, cache=recipe) as acceleration:
        found = subject.run(num_inference_steps=STEPS)
        decisions = acceleration.caches.engines[0].record.decisions
        reused = {(each.step, each.branch, each.unit) for each in decisions if not each.computed and each.unit}
        again = subject.run(num_inference_steps=STEPS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, stock) and oracle.reused
    if recipe.policy.moment.value == "unit":
        assert reused == set(oracle.reused)
    assert torch.equal(again, found)
    assert torch.equal(subject.run(num_inference_steps=STEPS), stock)


def outputs(subject: Subject) -> list[torch.Tensor]:
    """What the model gives, call by call; both branches in turn."""
    found: list[torch.Tensor] = []
    handle = subject.root.register_forward_hook(lambda _, __, output: found.append(output[0].clone()))
    subject.run(num_inference_steps=3)
    handle.remove()
    return found


def test_pab_keeps_branches_apart_where_the_peer_does_not(make_tiny_wan: Callable[[int], Any]) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    subject = build_subject(make_tiny_wan, "t2v")
    stock = outputs(subject)
    everywhere = (-1.0, 1001.0)
    with accelerate(subject.pipe, cache=pab(window=everywhere)):
        ours = outputs(subject)
    assert torch.equal(ours[0], stock[0]) and torch.equal(
        ours[1], stock[1]
    )  # the first step is whole on both branches
    assert not torch.equal(ours[2], stock[2]) and not torch.equal(ours[3], stock[3])  # the second one on none
    subject.root.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=everywhere,
            current_timestep_callback=lambda: subject.pipe.current_timestep,
        )
    )
    theirs = outputs(subject)
    subject.root.disable_cache()
    assert torch.equal(theirs[0], stock[0]) and not torch.equal(theirs[1], stock[1])


VIEW = RootView(None, "Model", ("blocks.0",), (("blocks.0.attn1", "self"), ("blocks.0.ffn", "mlp")), is_unet=False)


def test_scopes() -> None:
    keys = [unit.key for unit in Modules().units(VIEW)]
    assert keys == ["blocks.0.attn1", "blocks.0.ffn"]
    assert Attention().units(VIEW) == (Unit("blocks.0.attn1", "self", path="blocks.0.attn1"),)
    assert [unit.kind for unit in FeedForward().units(VIEW)] == ["mlp"]
    assert Attention(kinds=("self", "cross")).units(VIEW) == Attention(kinds=("self",)).units(VIEW)
    with pytest.raises(ValueError, match="no module of kind temporal in its blocks; it has mlp, self"):
        Attention(kinds=("temporal",)).units(VIEW)
    for wrong in ((), ("mlp",), ("spatial",)):
        with pytest.raises(ValueError, match="kinds are one or more of self, cross, joint, temporal; got"):
            Attention(kinds=wrong)


def sight(step: int, timestep: float | None, kind: str = "self") -> Sight:
    unit = Unit("u", kind, path="u")
    return Sight(step, 8, "cond", "transformer", unit, None, timestep, torch.zeros(1), None, None)


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_broadcast_counts_timesteps_as_the_model_does(scale: float) -> None:
    judge = Broadcast({"self": 2}, window=(100, 800)).judge(Unit("u", "self"), 8)
    times, found = [1000, 900, 700, 500, 300, 101, 99, 0.5], []
    for step, timestep in enumerate(times):
        found.append(judge.wants_compute(sight(step, timestep * scale)) if step else True)
        judge.note(sight(step, timestep * scale), found[-1], None)
    assert found == [True, True, True, False, True, False, True, True]


def test_broadcast_settings() -> None:
    policy = Broadcast({"self": 4, "cross": 1})
    judge = policy.judge(Unit("u", "self"), None)
    assert [judge.wants_compute(sight(step, None)) for step in range(5)] == [True, False, False, False, True]
    judge.tighten(0.5)
    assert [judge.wants_compute(sight(step, None)) for step in range(5)] == [True, False, True, False, True]
    assert policy.judge(Unit("u", "mlp"), None).wants_compute(sight(1, None))
    with pytest.raises(ValueError, match="told its timestep"):
        Broadcast({"self": 2}, (0, 1)).judge(Unit("u", "self"), 8).wants_compute(sight(1, None))
    cases: tuple[dict[str, Any], ...] = (
        {"ranges": {}},
        {"ranges": {"self": 0}},
        {"ranges": {"self": 2}, "window": (5, 5)},
    )
    for bad in cases:
        with pytest.raises(ValueError, match=r"at least one kind|range of 'self'|low < high"):
            Broadcast(**bad)


def test_dynamic_reuse() -> None:
    rule = DynamicReuse(0.0, 1.0)
    kept = [Kept(Place(4, None), torch.tensor([[3.0], [5.0]])), Kept(Place(2, None), torch.tensor([[1.0], [2.0]]))]
    assert rule.predict(kept, Place(5, None, 11)).tolist() == [[4.0], [6.5]]
    assert rule.predict(kept, Place(10, None, 11)).tolist() == [[5.0], [8.0]]
    assert rule.predict(kept[:1], Place(10, None, 11)) is kept[0].value
    assert DynamicReuse(0.3, 0.3).predict(kept, Place(5, None)).tolist() == [
        [pytest.approx(3.6)],
        [pytest.approx(5.9)],
    ]
    only_conditional = [kept[0], Kept(Place(2, None), torch.tensor([[2.0]]))]
    assert rule.predict(only_conditional, Place(10, None, 11)).tolist() == [[3.0], [8.0]]
    with pytest.raises(ValueError, match="how many there are"):
        rule.predict(kept, Place(5, None))


def test_presets_refuse() -> None:
    with pytest.raises(ValueError, match="first_enhance counts"):
        taylorseer(first_enhance=0)
    with pytest.raises(ValueError, match="every is a whole number"):
        fora(interval=0)
    with pytest.raises(ValueError, match="range of 'cross'"):
        pab(cross=0)
