"""Radial attention on whole pipelines: equal to masked dense attention, repeatable, per sample, honest."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel.plan.radial import radial_plan
from dit_accel.processors import RadialAttnProcessor

ODD = {"height": 240, "width": 208, "num_frames": 25, "num_inference_steps": 2}  # 7 x 15 x 13 tokens


class MaskedDense(dit_accel.AttentionControl):
    """The oracle: replaces the output of self-attention by dense softmax under the plan's expanded mask."""

    def __init__(self, mask, first_layer):
        super().__init__(layers=range(first_layer, 2))
        self.mask = mask

    def before(self, call, query, key, value):
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~self.mask, -torch.inf)
        self.output = scores.softmax(-1) @ value
        return query, key, value

    def after(self, call, output):
        return self.output


@pytest.mark.parametrize("rule", ["authors", "paper"])
@pytest.mark.parametrize("mask", ["block", "element"])
def test_odd_grid_equals_masked_dense_attention(t2v, rule, mask):
    settings = {"rule": rule, "block": 64, "mask": mask}
    plan = radial_plan((7, 15, 13), **settings)
    assert plan.stats.density < 1
    with dit_accel.accelerate(t2v.pipe, controls=[MaskedDense(plan.element_mask(), first_layer=1)]):
        expected = t2v.run(**ODD)
    with dit_accel.accelerate(t2v.pipe, "radial", dense_steps=0, dense_layers=1, **settings) as handle:
        assert torch.allclose(t2v.run(**ODD), expected, atol=1e-4)
        report = handle.report()
    assert report.plan_density == pytest.approx(plan.stats.density)
    assert report.density == pytest.approx((1 + plan.stats.density) / 2)  # one of two layers is dense


def test_second_run_equals_a_fresh_run(make_tiny_wan, t2v):
    changes = ODD | {"num_inference_steps": 3}
    t2v.pipe.set_attn_processor(RadialAttnProcessor(block=64, dense_steps=1, dense_layers=0))
    t2v.run(seed=5, height=32, width=32, num_frames=9)
    second = t2v.run(**changes)
    t2v.pipe.set_attn_processor(RadialAttnProcessor(block=64, dense_steps=1, dense_layers=0))
    assert torch.equal(t2v.run(**changes), second)


def test_a_batch_equals_its_samples(t2v):
    prompts = {name: torch.randn(2, 16, 64) for name in ("prompt_embeds", "negative_prompt_embeds")}
    noise = torch.randn(2, 16, 7, 30, 26)
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0) as handle:
        together = t2v.run(**ODD, latents=noise, **prompts)
        for i in range(2):
            one = {name: value[i : i + 1] for name, value in prompts.items()}
            assert torch.allclose(t2v.run(**ODD, latents=noise[i : i + 1], **one)[0], together[i], atol=1e-5)
        assert handle.report().plan_density < 0.9


def test_warm_up_steps_are_bit_equal_to_dense(t2v):
    """Dense steps run the very attention of the baseline; the first difference comes with the first sparse step."""
    latents = {}

    def keep(name):
        def callback(pipe, step, timestep, tensors):
            latents[name, step] = tensors["latents"].clone()
            return tensors

        return callback

    changes = ODD | {"num_inference_steps": 4}
    t2v.run(**changes, callback_on_step_end=keep("dense"))
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0.5, dense_layers=0):
        t2v.run(**changes, callback_on_step_end=keep("radial"))
    assert [torch.equal(latents["dense", step], latents["radial", step]) for step in range(4)] == [
        True,
        True,
        False,
        False,
    ]


def test_report_counts_and_speaks(t2v):
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=1, dense_layers=1) as handle:
        t2v.run(**ODD | {"num_inference_steps": 4})
        report = handle.report()
        handle.reset_report()
        assert sum(site.sparse_calls for site in handle.report().sites) == 0
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(0, 8), (6, 2)]
    assert report.steps == 4 and report.backend == "gather" and report.backend_reason
    assert "6 sparse, 10 dense" in report.summary()
    assert report.to_dict()["density"] == pytest.approx(report.density)


def test_the_density_in_the_plan_is_of_the_calls_that_are_counted(t2v):
    """Plans of earlier sizes are kept, but say nothing of the run that is reported."""
    densities = {frames: radial_plan((frames, 15, 13), block=64).density for frames in (3, 7)}
    assert densities[7] < densities[3]
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0) as handle:
        t2v.run(**ODD | {"num_frames": 9})
        assert handle.report().plan_density == pytest.approx(densities[3])
        handle.reset_report()
        t2v.run(**ODD)
        assert handle.report().plan_density == pytest.approx(densities[7])


def test_a_mask_from_the_model_means_dense_and_is_said_aloud(t2v, monkeypatch):
    block = t2v.pipe.transformer.blocks[1].attn1
    stock = type(block).forward

    def masked(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
        mask = torch.zeros(1, 1, 1, hidden_states.shape[1]) if self is block else attention_mask
        return stock(self, hidden_states, encoder_hidden_states, mask, rotary_emb, **kwargs)

    monkeypatch.setattr(type(block), "forward", masked)
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0) as handle:
        with pytest.warns(UserWarning, match=r"blocks\.1\.attn1 runs dense"):
            t2v.run()
        report = handle.report()
    assert list(report.fallbacks) == ["transformer:blocks.1.attn1"]
    assert "FALLBACK" in report.summary()
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(8, 0), (0, 8)]


def test_an_explicit_backend_never_falls_back(t2v):
    with pytest.raises(ValueError, match=r"triton backend cannot run here: .*GPU"):
        dit_accel.accelerate(t2v.pipe, "radial", backend="triton")
    with dit_accel.accelerate(t2v.pipe, "radial", backend="reference", dense_steps=0) as handle:
        t2v.run()
        assert handle.report().backend == "reference"
