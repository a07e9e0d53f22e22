"""Controls see and change q, k, v and the output; block hooks see and replace blocks."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel.controls import block_mass


@pytest.mark.parametrize(("queries", "keys", "block"), [(12, 12, 4), (13, 7, 4), (5, 5, 8)])
def test_block_mass_equals_the_softmax_summed_by_hand(queries, keys, block):
    query, key = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    mass = block_mass(query, key, block)
    for i in range(mass.shape[2]):
        for j in range(mass.shape[3]):
            part = weights[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block]
            assert torch.allclose(mass[:, :, i, j], part.sum(-1).mean(-1), atol=1e-6)
    assert torch.allclose(mass.sum(-1), torch.ones(2, 3, mass.shape[2]), atol=1e-5)


def test_recorder_sees_self_and_cross_attention(t2v):
    recorder = dit_accel.AttentionMassRecorder(4, kinds=("self", "cross"))
    with dit_accel.accelerate(t2v.pipe, controls=[recorder]):
        t2v.run(num_inference_steps=2)
    shapes = {path: tuple(mass.shape) for (_, path, _, _), mass in recorder.masses.items()}
    assert shapes["blocks.0.attn1"] == (2, 3, 3) and shapes["blocks.0.attn2"] == (2, 3, 4)
    assert len(recorder.masses) == 2 * 2 * 4  # steps x branches x sites


class Edit(dit_accel.AttentionControl):
    """Applies one function before, one after."""

    def __init__(self, before=None, after=None, **selection):
        super().__init__(**selection)
        self._before, self._after = before, after

    def before(self, call, query, key, value):
        return self._before(query, key, value) if self._before else (query, key, value)

    def after(self, call, output):
        return self._after(output) if self._after else output


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_before_and_after_reach_the_model(t2v, kind):
    """Doubling v and halving the output cancel; either alone changes the result."""
    stock = t2v.run()
    double = Edit(before=lambda q, k, v: (q, k, v * 2), kinds=[kind])
    halve = Edit(after=lambda out: out / 2, kinds=[kind])
    for controls, same in (([double, halve], True), ([double], False), ([halve], False)):
        with dit_accel.accelerate(t2v.pipe, controls=controls):
            assert torch.allclose(t2v.run(), stock, atol=1e-6) is same


def test_controls_work_on_sparse_calls_too(t2v):
    stock = t2v.run()
    double = Edit(before=lambda q, k, v: (q, k, v * 2))
    halve = Edit(after=lambda out: out / 2)
    recorder = dit_accel.AttentionMassRecorder(4)
    settings = {"block": 64, "dense_steps": 0, "dense_layers": 0}
    with dit_accel.accelerate(t2v.pipe, "radial", controls=[double, halve, recorder], **settings) as handle:
        assert torch.allclose(t2v.run(), stock, atol=1e-5)
        assert all(site.dense_calls == 0 for site in handle.report().sites)
    assert len(recorder.masses) == 4 * 2 * 2


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"kinds": ["selv"]}, "unknown site kind .*'selv'.*choose among self"),
        ({"steps": (3, 3)}, r"a step window is .*got \(3, 3\)"),
        ({"steps": (-1, 2)}, r"a step window is .*got \(-1, 2\)"),
    ],
)
def test_bad_selections_are_refused(selection, message):
    with pytest.raises(ValueError, match=message):
        dit_accel.AttentionControl(**selection)


def test_block_recorder_lists_every_block_in_order(two_experts):
    recorder = dit_accel.BlockRecorder()
    with dit_accel.accelerate(two_experts.pipe, block_hooks=[recorder]) as handle:
        two_experts.run()
        assert handle.clock.state.step == 3
    expected = [(step, branch, index) for step in range(4) for branch in ("cond", "uncond") for index in (0, 1)]
    assert [(step, branch, index) for step, branch, _, index in recorder.ran] == expected
    assert {expert for *_, expert, _ in recorder.ran} == {"transformer", "transformer_2"}


def test_a_block_hook_can_stand_in_for_a_block(t2v):
    class SkipSecond(dit_accel.BlockHook):
        def around(self, block, state, run, arguments):
            return arguments["args"][0] if block.index == 1 else run()

    recorder = dit_accel.BlockRecorder()
    with dit_accel.accelerate(t2v.pipe, block_hooks=[SkipSecond(), recorder]):
        skipped = t2v.run()
    assert {index for *_, index in recorder.ran} == {0}
    t2v.pipe.transformer.blocks = t2v.pipe.transformer.blocks[:1]
    assert torch.equal(t2v.run(), skipped)
