"""Delta-DiT and the light TaylorSeer: whole generations of a toy stack of blocks, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import dit_accel
from dit_accel.caching import Cache
from dit_accel.caching.presets import PRESETS
from dit_accel.caching.presets.delta import delta_dit
from dit_accel.caching.presets.taylor_lite import taylorseer_lite
from dit_accel.caching.scopes.base import RootView
from dit_accel.caching.scopes.delta import Delta
from dit_accel.families import registry
from dit_accel.families.streams import BlockStreams
from dit_accel.layout import TokenLayout

BLOCKS, STEPS, WIDTH = 6, 12, 8


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention(WIDTH, heads=1, dim_head=WIDTH)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.attn1(hidden_states) * (1 + temb) + temb)


class ToyStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(BLOCKS))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        state = hidden_states
        for block in self.blocks:
            state = block(state, timestep)
        return state.mean(-1, keepdim=True) * hidden_states


@pytest.fixture
def toy(monkeypatch) -> ToyStack:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    dit_accel.register_family(
        dit_accel.Family(
            "ToyStack",
            lambda root, arguments: TokenLayout.video_only((1, 2, 3)),
            lambda path, module: "self",
            block_lists=("blocks",),
            block_streams={"blocks": BlockStreams(("hidden_states",), bare=True)},
        )
    )
    torch.manual_seed(0)
    return ToyStack().eval()


def sample(root, clock=None) -> list[Tensor]:
    """Outputs of all steps, each of which shapes what the next is given."""
    x, outputs = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1)), []
    for step in range(STEPS):
        if clock is not None:
            clock.set_step(step, STEPS)
        outputs.append(root(x, torch.tensor(1 - step / STEPS)))
        x = x - outputs[-1] / STEPS
    return outputs


@torch.no_grad()
def cached(root: nn.Module, cache: Cache) -> list[Tensor]:
    with dit_accel.accelerate(root, cache=cache) as handle:
        return sample(root, handle.clock)


class PlainDelta:
    """What every block added is written down; skipped blocks add what they added last."""

    def __init__(self, root: ToyStack, front: int, rear: int, switch: int, interval: int) -> None:
        self.root, self.front, self.rear, self.switch, self.interval = root, front, rear, switch, interval
        self.added: dict[int, Tensor] = {}
        self.step = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        skipped: set[int] = set()
        if self.step % self.interval:
            early = self.step < self.switch
            skipped = set(range(BLOCKS - self.rear, BLOCKS) if early else range(self.front))
        state = x
        for index, block in enumerate(self.root.blocks):
            if index not in skipped:
                self.added[index] = block(state, t) - state
            state = state + self.added[index]
        self.step += 1
        return state.mean(-1, keepdim=True) * x


@pytest.mark.parametrize(
    ("front", "rear", "switch", "interval"),
    [(2, 2, 6, 2), (4, 5, 5, 2), (6, 6, 7, 3), (0.5, 0.75, 0.5, 4), (3, 0, 0, 2), (0, 3, 1.0, 3), (1, 6, 5, 3)],
)
@torch.no_grad()
def test_delta_dit_is_the_plain_loop(toy, front, rear, switch, interval):
    counts = [round(part * BLOCKS) if isinstance(part, float) else part for part in (front, rear)]
    at = round(switch * STEPS) if isinstance(switch, float) else switch
    wanted = sample(PlainDelta(toy, *counts, at, interval))
    found = cached(toy, delta_dit(front=front, rear=rear, switch=switch, interval=interval))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    dense = sample(toy)
    assert torch.equal(found[0], dense[0]) and not torch.allclose(found[-1], dense[-1], atol=1e-4)


def test_overlapping_ranges_are_split():
    view = RootView(None, "Toy", tuple(map(str, range(28))), (), False)
    scope = Delta(0.75, 0.75, 0.5)
    units = scope.units(view)
    assert [(unit.first, unit.last) for unit in units] == [(0, 6), (7, 20), (21, 27)]
    assert [scope.is_active(unit, 9, 20) for unit in units] == [False, True, True]
    assert [scope.is_active(unit, 10, 20) for unit in units] == [True, True, False]
    assert [(unit.first, unit.last) for unit in Delta(3, 4).units(view)] == [(0, 2), (24, 27)]


def test_delta_refuses_what_it_cannot_do():
    view = RootView(None, "Toy", tuple("012345"), (), False)
    with pytest.raises(ValueError, match="numbers up to 6"):
        Delta(7, 2).units(view)
    with pytest.raises(ValueError, match="both 0"):
        Delta(0, 0)
    with pytest.raises(ValueError, match=r"a part of all in \[0.0, 1.0\]"):
        Delta(1.5, 2)
    with pytest.raises(ValueError, match="number of steps"):
        Delta(2, 2, -1)
    with pytest.raises(ValueError, match="set_step"):
        Delta(2, 2).is_active(Delta(2, 2).units(view)[0], 3, None)


class PlainTaylor:
    """The counters of the paper's code and its recursion, on what all blocks add or on the output."""

    def __init__(self, root: ToyStack, keep: str, interval: int, order: int, first_enhance: int) -> None:
        self.root, self.keep, self.settings = root, keep, (interval, order, first_enhance)
        self.step = self.counter = self.last = 0
        self.ladder: list[Tensor] = []
        self.computed: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        interval, order, first_enhance = self.settings
        step, self.step = self.step, self.step + 1
        if step < first_enhance or self.counter == interval - 1:
            self.counter = 0
            self.computed.append(step)
            value = self._value(x, t)
            fresh = [value]
            for i, before in enumerate(self.ladder[:order]):
                fresh.append((fresh[i] - before) / (step - self.last))
            self.ladder, self.last = fresh, step
        else:
            self.counter += 1
            value = sum(d * (step - self.last) ** i / math.factorial(i) for i, d in enumerate(self.ladder))
        return value if self.keep == "output" else (x + value).mean(-1, keepdim=True) * x

    def _value(self, x: Tensor, t: Tensor) -> Tensor:
        state = x
        for block in self.root.blocks:
            state = block(state, t)
        return state - x if self.keep == "residual" else state.mean(-1, keepdim=True) * x


@pytest.mark.parametrize("keep", ["residual", "output"])
@pytest.mark.parametrize(("interval", "order", "first_enhance"), [(6, 1, 3), (3, 2, 2), (2, 3, 4), (4, 1, 1)])
@torch.no_grad()
def test_taylorseer_lite_is_the_plain_loop(toy, keep, interval, order, first_enhance):
    plain = PlainTaylor(toy, keep, interval, order, first_enhance)
    wanted = sample(plain)
    cache = taylorseer_lite(keep=keep, interval=interval, order=order, first_enhance=first_enhance)
    with dit_accel.accelerate(toy, cache=cache) as handle:
        found = sample(toy, handle.clock)
        computed = [d.step for d in handle.caches.engines[0].record.decisions if d.computed]
    assert computed == plain.computed and len(computed) < STEPS
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def in_memory_for(root: nn.Module, values: float, order: int) -> tuple[list[Tensor], list[str]]:
    """Outputs and downgrades of a run that may keep some values of 6 tokens x 8 channels in float32."""
    made = taylorseer_lite(interval=3, order=order)
    cache = Cache(made.scope, made.policy, made.predictor, made.limits, max_bytes=int(values * 6 * WIDTH * 4))
    with dit_accel.accelerate(root, cache=cache) as handle:
        outputs = sample(root, handle.clock)
        return outputs, list(handle.caches.engines[0].record.downgrades)


@torch.no_grad()
def test_a_bound_on_memory_gives_the_run_of_the_order_that_fits(toy):
    for values, order in ((4, 3), (3, 2), (2, 1)):
        found, notes = in_memory_for(toy, values, 3)
        wanted, none = in_memory_for(toy, values, order)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert (len(notes), none) == (3 - order, [])


@torch.no_grad()
def test_too_little_memory_says_how_much_would_do(toy):
    with pytest.raises(ValueError, match=f"max_bytes={6 * (WIDTH + 4)} would do"):
        in_memory_for(toy, 0.1, 1)
    assert not any("forward" in vars(block) for block in toy.blocks)  # nothing is left on the model


@torch.no_grad()
def test_taylor_beats_plain_reuse_on_a_smooth_path(toy):
    dense = sample(toy)
    line, same = (
        sum(float((a - b).abs().mean()) for a, b in zip(cached(toy, cache), dense, strict=True))
        for cache in (taylorseer_lite(interval=3), Cache(taylorseer_lite().scope, taylorseer_lite(interval=3).policy))
    )
    assert line < 0.7 * same


def test_both_are_found_by_name():
    assert PRESETS["delta_dit"] is delta_dit and PRESETS["taylorseer_lite"] is taylorseer_lite
    assert all(make().name == name for name, make in PRESETS.items() if make in (delta_dit, taylorseer_lite))


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"first_enhance": 0}, "from 1"), ({"keep": "all"}, '"residual" or "output"'), ({"order": 5}, "1, 2, 3 or 4")],
)
def test_taylorseer_lite_refuses_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        taylorseer_lite(**settings)
