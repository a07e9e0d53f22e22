"""The method in a whole pipeline: what it attends to, what it refuses, and how it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.clock import StepState
from dit_accel.gates.files import Gates
from dit_accel.processors import LearnedGateAttnProcessor

from .conftest import random_weights, wan_gates

Save = Callable[[Gates], Path]
ODD = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens, 12.2 blocks of 64
PLAIN: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0}


class Wan:
    """The tiny pipeline, run to its latents."""

    def __init__(self, pipe: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.text = {"prompt_embeds": torch.randn(1, 16, 64), "negative_prompt_embeds": torch.randn(1, 16, 64)}

    def run(self, steps: int = 3, seed: Any = 1, **changes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        given = self.text | ODD | {"num_inference_steps": steps} | changes
        return self.pipe(**given, generator=generator, output_type="latent").frames


@pytest.fixture
def wan(tiny_wan: Any) -> Wan:
    return Wan(tiny_wan)


class Oracle(dit_accel.AttentionControl):
    """Wants the output of dense attention under the mask of the method."""

    def __init__(self, processor: LearnedGateAttnProcessor) -> None:
        super().__init__(kinds=("self", "joint"))
        self.processor, self.worst = processor, 0.0
        self.masks: list[torch.Tensor] = []

    def before(self, call, query, key, value):
        setup = self.processor.set_up(call.site, call.layout, query.device)
        setup = self.processor.at_step(setup, call.site, call.state)
        mask = self.processor.find_plan(query, key, setup, scale=None).element_mask()
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        self.output = scores.softmax(-1) @ value
        self.masks.append(mask)
        return query, key, value

    def after(self, call, output):
        self.worst = max(self.worst, float((output - self.output).abs().max()))
        return output


@pytest.mark.parametrize("options", [{}, {"density": 0.5}, {"threshold": 0.1}])
def test_output_is_attention_over_the_blocks_of_the_gate(wan: Wan, save: Save, options: dict[str, Any]) -> None:
    processor = LearnedGateAttnProcessor(gates=save(wan_gates()), **PLAIN, **options)
    with dit_accel.accelerate(wan.pipe, processor, controls=[oracle := Oracle(processor)]) as handle:
        wan.run()
        report = handle.report()
    assert oracle.worst < 1e-5
    kept = torch.stack([mask.float().mean() for mask in oracle.masks]).mean()
    assert report.plan_density == pytest.approx(float(kept), rel=1e-4) and kept < 0.7
    if options == {}:
        assert all(int(mask[0, 0].any(0).sum()) >= 4 for mask in oracle.masks)
        assert report.plan_density == pytest.approx(4 / 13, abs=0.04)  # 13 blocks, the last of 12 tokens


def test_text_is_kept_by_a_joint_model(save: Save, make_flux: Any) -> None:
    pipe, run = make_flux
    sites = {f"transformer:transformer_blocks.{i}.attn": random_weights(2, 16, seed=i) for i in range(1)}
    sites |= {f"transformer:single_transformer_blocks.{i}.attn": random_weights(2, 16, seed=9 + i) for i in range(2)}
    gates = Gates("FluxTransformer2DModel", {"joint": 3}, 64, 1.0, sites)
    processor = LearnedGateAttnProcessor(gates=save(gates), density=0.3, **PLAIN)
    with dit_accel.accelerate(pipe, processor, controls=[oracle := Oracle(processor)]):
        run()
    assert oracle.worst < 1e-5 and not all(mask.all() for mask in oracle.masks)
    for mask in oracle.masks:  # ten tokens of text stand first
        assert mask[..., :64, :].all() and mask[..., :, :64].all()
        assert (mask[..., 64:, 64:].sum(-1) <= 128).all()  # a third of four blocks


@pytest.fixture
def make_flux() -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(transformer=transformer.eval(), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 10, 32), "pooled_prompt_embeds": torch.randn(1, 24)}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 30, "width": 34, "num_inference_steps": 2}  # 15 x 17 tokens
        return pipe(**text, **size, generator=generator, output_type="latent").images

    return pipe, run


def test_steps_change_what_is_kept(wan: Wan, save: Save) -> None:
    """The same queries and keys, early and late."""
    processor = LearnedGateAttnProcessor(gates=save(wan_gates()))
    q, k = torch.randn(2, 1, 2, 780, 16)
    layout = dit_accel.layout.TokenLayout.video_only((4, 15, 13))
    site = dit_accel.controls.SiteInfo("blocks.0.attn1", "self", 0, 2, "transformer")
    setup = processor.set_up(site, layout, torch.device("cpu"))
    masks = []
    for timestep in (torch.tensor([999.0]), torch.tensor([300.0]), torch.tensor([[0.0, 300.0]])):
        state = StepState(0, 5, 10, "cond", "transformer", 0, layout, timestep)
        masks.append(processor.find_plan(q, k, processor.at_step(setup, site, state), scale=None).to_bool())
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])  # of timesteps by token the greatest counts
    assert setup.gate is None  # nothing of a step stays with the site


def test_a_batch_equals_its_samples_and_runs_repeat(wan: Wan, save: Save) -> None:
    settings = PLAIN | {"gates": save(wan_gates()), "search_every": 2}
    prompts: dict[str, Any] = {name: torch.randn(2, 16, 64) for name in wan.text}
    noise = torch.randn(2, *wan.run(steps=1).shape[1:])
    with dit_accel.accelerate(wan.pipe, "learned_gate", **settings):
        together = wan.run(latents=noise, **prompts)
        for i in range(2):
            one: dict[str, Any] = {name: part[i : i + 1] for name, part in prompts.items()}
            alone = wan.run(latents=noise[i : i + 1], **one)
            assert torch.allclose(alone[0], together[i], atol=1e-4)
        first, again = wan.run(), wan.run()
    assert torch.equal(first, again)
    with dit_accel.accelerate(wan.pipe, "learned_gate", **settings):
        assert torch.equal(wan.run(), first)


def test_bfloat16_and_a_bare_transformer(wan: Wan, save: Save) -> None:
    wan.pipe.transformer.to(torch.bfloat16)
    processor = LearnedGateAttnProcessor(gates=save(wan_gates()), **PLAIN)
    with dit_accel.accelerate(wan.pipe.transformer, processor) as handle, torch.no_grad():
        handle.clock.set_step(0, 9)
        latents, text = torch.randn(2, 16, 4, 30, 26).bfloat16(), torch.randn(2, 16, 64).bfloat16()
        output = wan.pipe.transformer(latents, torch.full((2,), 700), text, return_dict=False)[0]
        assert output.isfinite().all() and (handle.report().plan_density or 1) < 0.4


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("options", "graphs"), [({"search_every": 2, "dense_steps": 1}, 3), ({"threshold": 0.1, "dense_steps": 0}, 1)]
)
def test_compiled_is_eager(wan: Wan, save: Save, options: dict[str, Any], graphs: int) -> None:
    counter = CompileCounter()
    settings: dict[str, Any] = {"gates": save(wan_gates()), "dense_layers": 0} | options
    with dit_accel.accelerate(wan.pipe, "learned_gate", **settings) as handle:
        eager, report = wan.run(steps=5), handle.report()
        handle.reset_report()
        wan.pipe.transformer.compile(fullgraph=True, backend=counter)
        assert torch.equal(wan.run(steps=5), eager) and handle.report() == report
        assert counter.frame_count == graphs
        with torch._dynamo.config.patch(error_on_recompile=True):
            wan.run(steps=5, seed=3)


def test_a_schedule_scales_the_density(wan: Wan, save: Save) -> None:
    budgets = {"dense_steps": 0, "dense_layers": 0, "layer_budget": {1: 2.0}, "head_budget": {0: [1.0, 3.0]}}
    with dit_accel.accelerate(wan.pipe, "learned_gate", gates=save(wan_gates()), schedule=budgets) as handle:
        wan.run()
        densities = [site.kept / site.sparse_calls for site in handle.report().sites]
    assert densities == pytest.approx([(4 / 13 + 10 / 13) / 2, 7 / 13], abs=0.05)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (replace(wan_gates(), family="CogVideoXTransformer3DModel"), "CogVideoX.*not for a WanTransformer3DModel"),
        (wan_gates(layers=5), "5 of kind self.*this model has 2 sites"),
        (wan_gates(heads=4), "4 heads of 16 channels, this model has 2 of 16 there"),
        (wan_gates(head_dim=8), "2 heads of 8 channels, this model has 2 of 16 there"),
    ],
)
def test_gates_of_another_model_are_refused_at_installation(wan: Wan, save: Save, gates: Gates, message: str) -> None:
    stock = wan.run()
    with pytest.raises(ValueError, match=message):
        dit_accel.accelerate(wan.pipe, "learned_gate", gates=save(gates))
    assert torch.equal(wan.run(), stock)


def test_without_gates_it_says_how_to_train_them(wan: Wan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train-gate"):
        dit_accel.accelerate(wan.pipe, "learned_gate", gates=tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match="train-gate"):  # what ships is for another Wan
        dit_accel.accelerate(wan.pipe, "learned_gate")


def test_tokens_out_of_order_are_refused(wan: Wan, save: Save) -> None:
    from dit_accel.kernels.token_order import morton_order

    processor = LearnedGateAttnProcessor(gates=save(wan_gates()), **PLAIN)
    handle = dit_accel.accelerate(wan.pipe, processor, token_order=lambda layout: morton_order(layout.grid))
    with handle, pytest.raises(ValueError, match="raster order"):
        wan.run()
