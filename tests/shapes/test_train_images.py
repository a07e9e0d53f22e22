"""Training of the image models: it learns what the pipelines will ask, survives being killed, and ends as a folder."""

from __future__ import annotations

import functools
import inspect
import random
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from dit_accel.shapes.info import read_info
from dit_accel.shapes.recipes import sd3 as sd3_recipe
from dit_accel.shapes.recipes import sd15 as sd15_recipe
from dit_accel.shapes.recipes.image_vae import build_image_vae
from dit_accel.shapes.train import export_images, image_vae, images, sd3, sd15
from dit_accel.shapes.train.loop import LoopConfig
from dit_accel.shapes.world import is_held_out, parse_prompt, render, sample_scene

PROMPT = "a small striped red circle and a blue square on a gradient black background"
SMALL, FULL = images.ImageSet(32, 6), images.ImageSet(48, 4)
STAGES = {"sd3": (sd3, sd3.train_sd3), "sd15": (sd15, sd15.train_sd15)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Narrow models and tiny images; every checkpoint is kept."""
    monkeypatch.setattr(sd3_recipe, "HEADS", 1)
    monkeypatch.setattr(sd15_recipe, "WIDTHS", (32, 32, 32))
    for module in (images, sd3):
        monkeypatch.setattr(module, "SMALL", SMALL)
        monkeypatch.setattr(module, "FULL", FULL)
    monkeypatch.setattr(sd3, "SHIFTS", {SMALL: 3.0, FULL: 6.0})
    monkeypatch.setattr(image_vae, "IMAGE_SIDE", 48)
    monkeypatch.setattr(image_vae, "BATCHES", ((32, 2), (40, 2), (48, 1)))
    for module in (image_vae, sd3, sd15):
        monkeypatch.setattr(module, "LoopConfig", functools.partial(LoopConfig, save_every=1))
    for module in (sd3, sd15):
        monkeypatch.setattr(module, "CURRICULUM", images.Curriculum(3, 0.5, 1.0, small_batch=3, full_batch=2))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    vae = build_image_vae()
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    vae.save_pretrained(folder)
    return folder


def model_of(name):
    torch.manual_seed(0)
    if name == "sd15":
        return sd15.Sd15Model(sd15_recipe.build_pipeline())
    return sd3.Sd3Model(sd3_recipe.build_pipeline())


def loss_of(name, model, clean, prompts):
    torch.manual_seed(5)
    if name == "sd15":
        return sd15.velocity_loss(model, clean, prompts)
    return sd3.flow_loss(model, clean, prompts, shift=1.0, t5_length=32)


def average(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["average"]


def heard(model, call):
    """What the denoiser is given during a call."""
    denoiser, seen = model.transformer if isinstance(model, sd3.Sd3Model) else model.unet, []
    names = inspect.signature(denoiser.forward)

    def note(_module, arguments, keywords):
        seen.append(names.bind(*arguments, **keywords).arguments)

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        call()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", STAGES)
def test_training_sees_the_text_and_time_that_the_pipeline_feeds(name, monkeypatch):
    model = model_of(name).eval()
    model.pipe.set_progress_bar_config(disable=True)
    asked = heard(model, lambda: model.pipe(PROMPT, height=32, width=32, num_inference_steps=1, guidance_scale=1.0))
    if name == "sd3":
        monkeypatch.setattr(sd3, "shifted_sigmas", lambda batch, shift, device: torch.ones(batch))
        length = sd3.t5_length(FULL, random.Random(0))
        learned = heard(model, lambda: sd3.flow_loss(model, torch.zeros(1, 4, 8, 8), [PROMPT], 6.0, length))
        assert torch.equal(learned["pooled_projections"], asked["pooled_projections"])
        assert learned["encoder_hidden_states"].shape[1] == 32 + 256
    else:
        monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.full(shape, high - 1))
        learned = heard(model, lambda: sd15.velocity_loss(model, torch.zeros(1, 4, 8, 8), [PROMPT]))
    assert torch.equal(learned["encoder_hidden_states"], asked["encoder_hidden_states"])
    assert float(learned["timestep"]) == float(asked["timestep"])


def test_the_targets_are_velocities():
    class Knowing(nn.Module):
        """Knows the clean latents."""

        def __init__(self, velocity, scheduler):
            super().__init__()
            self.velocity, self.pipe = velocity, SimpleNamespace(scheduler=scheduler)

        def forward(self, noisy, time, *_):
            return self.velocity(noisy, time.view(-1, 1, 1, 1))

    torch.manual_seed(0)
    clean, scheduler = torch.randn(4, 4, 8, 8), sd15_recipe.build_scheduler()
    flow = Knowing(lambda noisy, sigma: (noisy - clean) / sigma, None)
    assert float(sd3.flow_loss(flow, clean, [""] * 4, 6.0, 32)) < 1e-6

    def velocity(noisy, time):
        kept = scheduler.alphas_cumprod[time]
        noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
        return kept.sqrt() * noise - (1 - kept).sqrt() * clean

    assert float(sd15.velocity_loss(Knowing(velocity, scheduler), clean, [""] * 4)) < 1e-6


@pytest.mark.parametrize("name", STAGES)
def test_a_few_steps_teach_every_part(name):
    model = model_of(name).train()
    if name == "sd3":
        sd3.close_gates(model.transformer)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    clean, prompts = torch.ones(3, 4, 8, 8), [PROMPT, "", "a red circle on a gray background"]
    first = float(loss_of(name, model, clean, prompts).detach())
    chosen = images.optimizers(model, 1e-3, 1e-3)
    for _ in range(4):
        loss_of(name, model, clean, prompts).backward()
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert float(loss_of(name, model, clean, prompts).detach()) < 0.9 * first
    parts = {key.split(".")[0] for key in before}
    moved = {key.split(".")[0] for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == parts and len(parts) == (4 if name == "sd3" else 2)


def test_closed_gates_make_every_block_the_identity():
    model = model_of("sd3").eval()
    sd3.close_gates(model.transformer)
    block = model.transformer.transformer_blocks[0]
    hidden, text, time = torch.randn(1, 16, 64), torch.randn(1, 5, 64), torch.randn(1, 64)
    with torch.no_grad():
        left, right = block(hidden, text, time)
    assert torch.equal(left, text) and torch.equal(right, hidden)
    assert float(model.transformer.proj_out.weight.detach().abs().max()) == 0


@pytest.mark.parametrize("name", STAGES)
def test_optimizers_share_the_parameters_out(name):
    model = model_of(name)
    muon, adamw = images.optimizers(model, 1e-3, 2e-3)
    names = {id(value): key for key, value in model.named_parameters()}
    matrices = [names[id(value)] for value in muon.param_groups[0]["params"]]
    others = [names[id(value)] for value in adamw.param_groups[0]["params"]]
    assert sorted(matrices + others) == sorted(names.values())
    assert any(".to_q." in key for key in matrices) and any(".ff." in key for key in matrices)
    assert not [key for key in matrices if ".norm" in key or "transformer_blocks" not in key]


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_ends_where_an_uninterrupted_one_does(name, vae_folder, tmp_path, monkeypatch):
    module, train = STAGES[name]
    train(tmp_path / "whole", vae_folder)
    objective = "flow_loss" if name == "sd3" else "velocity_loss"
    original, calls = getattr(module, objective), []

    def killed(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(module, objective, killed)
        train(tmp_path / "killed", vae_folder, 3)
    train(tmp_path / "killed", vae_folder, 3)
    whole, resumed = average(tmp_path / "whole"), average(tmp_path / "killed")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", STAGES)
def test_the_exported_folder_is_a_pipeline_with_the_trained_weights(name, vae_folder, tmp_path):
    _, train = STAGES[name]
    export = getattr(export_images, f"export_{name}")
    with pytest.raises(FileNotFoundError, match=f"train first: .* {name}"):
        export(vae_folder, tmp_path / "run", tmp_path / "out")
    train(tmp_path / "run", vae_folder, 1)
    export(vae_folder, tmp_path / "run", tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert (info.subset, info.motion, info.frames, info.height) == ("all", False, 1, 256)
    assert str(vae_folder) not in "".join(file.read_text() for file in (tmp_path / "out").rglob("*.json"))

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    part = "transformer" if name == "sd3" else "unet"
    trained = average(tmp_path / "run")
    for key, value in pipe.components[part].state_dict().items():
        assert torch.equal(value, trained[f"{part}.{key}"].half().float())
    for key, value in pipe.text_encoder.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, trained[f"text_encoder.{key}"])
    assert pipe.vae.config.scaling_factor == 2 and pipe.vae.config.shift_factor == (0.25 if name == "sd3" else None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, height=32, width=32, num_inference_steps=2, output_type="pt").images.isfinite().all()
    with pytest.raises(ValueError, match=r"init was none, is .*; delete it or choose another folder"):
        train(tmp_path / "run", vae_folder, 1, init=tmp_path / "out")
    train(tmp_path / "more", vae_folder, 1, init=tmp_path / "out")
    assert (tmp_path / "more" / "checkpoint.pt").exists()
    assert list((tmp_path / "more").glob("images-48-*.pt"))  # a trained model meets full images at once


def test_the_trained_autoencoder_normalises_its_latents(tmp_path):
    image_vae.train_image_vae(tmp_path, 2)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    whole = image_vae._images("latent statistics", 128, vae)
    with torch.no_grad():
        latents = torch.cat([vae.encode(image).latent_dist.mode() for image in whole])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(latents.mean())) < 1e-3 and abs(float(latents.std()) - 1) < 1e-3
    values = image_vae.image_psnr(vae, 3)
    assert len(values) == 3 and all(0 < value < 60 for value in values)


def test_psnr_of_a_perfect_autoencoder_is_high_and_of_a_gray_one_is_known(monkeypatch):
    class Fake:
        device = torch.device("cpu")

        def __init__(self, decode):
            self.decode_to = decode

        def encode(self, image):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: image))

        def decode(self, image):
            return SimpleNamespace(sample=self.decode_to(image))

    off_by_a_tenth = Fake(lambda image: image + torch.where(image > 0, -0.2, 0.2))  # 0.2 in [-1, 1] is 0.1 in [0, 1]
    said = []
    monkeypatch.setattr(image_vae, "sample_scene", lambda rng, words: said.append(words) or sample_scene(rng, words))
    assert image_vae.image_psnr(off_by_a_tenth, 3) == pytest.approx([20.0] * 3, abs=1e-3)
    assert [len(words.objects) for words in said] == [1, 2, 1] and len({*said}) == 3
    assert all(is_held_out(words) for words in said)  # none of them is of training


def test_the_autoencoder_learns_colors_early(monkeypatch):
    """Of unseen images; from stock random weights nothing of them comes through after as many steps."""
    monkeypatch.setattr(image_vae, "BATCHES", ((32, 4),) * 3)
    torch.manual_seed(0)
    vae = image_vae.start_as_scaling(build_image_vae())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for step in range(30):
        torch.manual_seed(step)
        image_vae.reconstruction_loss(vae, image_vae.image_batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    unseen = torch.cat([image_vae.image_batch(step) for step in range(1000, 1004)])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(unseen).latent_dist.mode()).sample
    lost, color = (image - image.mean(1, keepdim=True) for image in (decoded - unseen, unseen))
    assert float(lost.square().mean() / color.square().mean()) < 0.75


def test_the_autoencoder_starts_by_averaging_and_repeating_pixels():
    torch.manual_seed(0)
    vae, pixels = image_vae.start_as_scaling(build_image_vae()), torch.rand(1, 16, 8, 8)
    down, up = vae.encoder.down_blocks[0], vae.decoder.up_blocks[0]
    with torch.no_grad():
        assert torch.allclose(down(pixels), torch.nn.functional.avg_pool2d(pixels, 2), atol=1e-6)
        wide = torch.rand(1, 64, 4, 4)
        repeated = wide.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.allclose(up(wide), repeated, atol=1e-6)
        assert float(vae.encode(torch.rand(1, 3, 8, 8)).latent_dist.std.max()) < 0.2


def test_autoencoder_batches_depend_on_the_step_alone_and_show_every_size():
    batches = [image_vae.image_batch(step) for step in range(12)]
    assert {tuple(batch.shape) for batch in batches} == {(2, 3, 32, 32), (2, 3, 40, 40), (1, 3, 48, 48)}
    assert all(float(batch.min()) >= -1 and float(batch.max()) <= 1 for batch in batches)
    assert torch.equal(image_vae.image_batch(3), batches[3])
    assert not torch.equal(batches[3][0, :, :16, :16], batches[4][0, :, :16, :16])


def test_prompts_are_about_images_and_never_held_out():
    rng = random.Random(0)
    words = [images.training_words(rng) for _ in range(1500)]
    assert not any(is_held_out(item) for item in words)
    assert all(item.motion is None for scene in words for item in scene.objects)
    shares = [sum(len(scene.objects) == count for scene in words) / len(words) for count in (1, 2, 3)]
    assert shares == pytest.approx([0.60, 0.35, 0.05], abs=0.04)


def test_sets_are_encoded_once_for_each_autoencoder(vae_folder, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder)
    drawn, prompts = images.EncodedImages(vae, tmp_path, "cpu").draw(SMALL, 200, random.Random(0))
    assert drawn.shape == (200, 4, 8, 8) and drawn.dtype == torch.float32
    emptied = sum(not prompt for prompt in prompts) / len(prompts)
    assert 0.03 < emptied < 0.2
    for prompt in filter(None, prompts):
        assert parse_prompt(prompt).prompt == prompt

    asked = []
    monkeypatch.setattr(images, "render", lambda *a, **k: asked.append(1) or render(*a, **k))
    again, same = images.EncodedImages(vae, tmp_path, "cpu").draw(SMALL, 200, random.Random(0))
    assert torch.equal(again, drawn) and same == prompts and not asked
    with torch.no_grad():
        vae.encoder.conv_out.bias += 1
    other, _ = images.EncodedImages(vae, tmp_path, "cpu").draw(SMALL, 200, random.Random(0))
    assert len(asked) == SMALL.images and torch.allclose(other, drawn + 1, atol=0.02)


def test_small_images_come_first():
    curriculum, rng = images.Curriculum(1000, 0.5, 0.75, small_batch=8, full_batch=2), random.Random(0)
    plan = [curriculum.at(step / 1000, "cpu", rng) for step in range(1000)]
    assert set(plan[:500]) == {(SMALL, 8)} and set(plan[500:]) == {(SMALL, 8), (FULL, 2)}
    assert 0.7 < sum(size == FULL for size, _ in plan[500:]) / 500 < 0.8
    assert curriculum.steps_on("cpu") == 1000 and curriculum.steps_on("cuda:0") == 500
    assert curriculum.at(0.0, "cuda:0", rng)[1] > 8


def test_full_images_always_see_the_padding_of_the_pipeline():
    rng = random.Random(0)
    lengths = [sd3.t5_length(SMALL, rng) for _ in range(200)]
    assert set(lengths) == {sd3.SHORT_T5, sd3.T5_LENGTH} and {sd3.t5_length(FULL, rng) for _ in range(50)} == {256}
