"""Training of the video model: it learns what the pipeline will ask, survives being killed, and ends as a folder."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.shapes.info import read_info
from dit_accel.shapes.recipes import wan as recipe
from dit_accel.shapes.recipes.text import build_t5_tokenizer
from dit_accel.shapes.train import devices, latents, loop, video_vae, wan
from dit_accel.shapes.train.__main__ import main
from dit_accel.shapes.train.counted_padding import CountedPadding
from dit_accel.shapes.world import is_held_out, parse_prompt, render

PROMPT = "a small striped red circle circling and a blue square moving up on a gradient black background"
SMALL = latents.ClipSize(frames=5, side=32, parts=(latents.Part(latent_frames=2, batch=2, shift=8.0),))
FULL = latents.ClipSize(frames=9, side=32, parts=(latents.Part(latent_frames=3, batch=1, shift=12.0),))


@pytest.fixture
def small(monkeypatch):
    """A narrow model, tiny clips and few of them."""
    monkeypatch.setattr(recipe, "LAYERS", 1)
    monkeypatch.setattr(recipe, "HEADS", 1)
    tiny = {"vae_windows": ((5, 1),), "vae_pool": 2, "small_clips": 3, "full_clips": 2, "encode_batch": 2}
    monkeypatch.setattr(devices, "CPU", replace(devices.CPU, **tiny))
    monkeypatch.setattr(latents, "SHARD", 2)
    monkeypatch.setattr(wan, "SMALL", SMALL)
    monkeypatch.setattr(wan, "FULL", FULL)
    for name, value in {"FRAMES": 5, "SIDE": 48, "SIDES": (48,), "CROP": 32, "STATISTICS_CLIPS": 2}.items():
        monkeypatch.setattr(video_vae, name, value)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """An untrained autoencoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    recipe.build_video_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(vae_folder):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(vae_folder)


def test_a_close_up_shows_what_the_clip_shows_there():
    rng = random.Random(5)
    seen = set()
    for _ in range(12):
        scene = latents.training_scene(rng)
        seen |= {f"gradient {scene.gradient}", len(scene.objects), *(item.words.motion for item in scene.objects)}
        left, top = rng.randrange(64), rng.randrange(64)
        whole = render(scene, video_vae.FRAMES, 128, 128).video
        part = whole[:, :, top : top + video_vae.CROP, left : left + video_vae.CROP]
        assert torch.allclose(video_vae.window(scene, 128, left, top), part, atol=2e-3)
    assert {"gradient True", "gradient False", 1, 2, "circling", "diagonally"} <= seen


def test_close_ups_have_objects_in_view():
    rng, moving = random.Random(0), 0
    for _ in range(20):
        video = video_vae.close_up(latents.training_scene(rng), rng).float()
        assert video.shape == (3, 33, 64, 64)
        moving += bool((video.flatten(2).std(2) > 10).any())
    assert moving >= 18


def test_batches_of_close_ups_depend_on_the_step_alone(small, monkeypatch):
    monkeypatch.setattr(video_vae, "POOL_STEPS", 3)

    def batch(close_ups, step):
        torch.manual_seed(step)
        return close_ups.at(step)

    ahead, later = video_vae.CloseUps("cpu"), video_vae.CloseUps("cpu")
    seen = {step: batch(ahead, step) for step in range(7)}
    assert torch.equal(batch(later, 5), seen[5]) and torch.equal(batch(later, 6), seen[6])
    assert not torch.equal(seen[5], seen[6])
    assert seen[0].shape == (1, 3, 5, 32, 32) and seen[0].min() >= -1 and seen[0].max() <= 1


def test_the_decoder_learns_beyond_the_range_of_colors(vae):
    decoder = recipe.build_video_vae()
    nn.init.constant_(decoder.decoder.conv_out.bias, 5.0)
    latent = torch.zeros(1, recipe.LATENT_CHANNELS, 1, 2, 2)
    assert decoder.decode(latent).sample.max() == 1
    decoded = video_vae.decode_unclamped(decoder, latent)
    assert decoded.max() > 2
    decoded.sum().backward()
    assert decoder.decoder.conv_out.bias.grad.abs().min() > 0
    assert torch.clamp(torch.tensor(3.0), max=1.0) == 1


def test_an_untrained_autoencoder_passes_colors_on(vae):
    """The shortcuts do: without them the latents of two plain colors point anywhere."""
    with torch.no_grad():
        reds, blues = (torch.zeros(1, 3, 5, 32, 32).index_fill_(1, torch.tensor([channel]), 1.0) for channel in (0, 2))
        kept = vae.encode(reds).latent_dist.mode() - vae.encode(blues).latent_dist.mode()
    assert kept.abs().mean() > 0.01


def test_psnr_is_that_of_the_truth(monkeypatch):
    monkeypatch.setattr(video_vae, "FRAMES", 3)
    monkeypatch.setattr(video_vae, "SIDE", 16)
    seen = []

    def encode(video):
        seen.append(video)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: video))

    off = SimpleNamespace(device="cpu", encode=encode, decode=lambda video: SimpleNamespace(sample=video + 0.02))
    assert video_vae.video_psnr(off, clips=3) == pytest.approx([40.0] * 3, abs=1e-3)
    assert [video.shape for video in seen] == [(1, 3, 3, 16, 16)] * 3
    assert min(float(video.min()) for video in seen) >= -1 and max(float(video.max()) for video in seen) > 0.5


def test_latents_are_measured_to_unit_variance(small, vae_folder):
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(vae_folder)
    video_vae.measure_latents(vae)
    rng = random.Random("latent statistics")
    scenes = [latents.training_scene(rng) for _ in range(2)]
    size = latents.ClipSize(frames=5, side=48, parts=())
    values = torch.cat([latents._encode(vae, [scene], size, "cpu") for scene in scenes]).float()
    values = values.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.02 and (values.std(1) - 1).abs().max() < 0.02


def test_the_encoded_set_is_always_the_same_and_grows(small, vae, tmp_path):
    first, prompts = latents.encoded_clips(vae, SMALL, 3, tmp_path / "one")
    again, _ = latents.encoded_clips(vae, SMALL, 3, tmp_path / "two")
    assert first.shape == (3, 16, 2, 4, 4) and first.dtype is torch.float16
    assert torch.equal(first, again) and len(prompts) == 3
    (folder,) = (tmp_path / "one").iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 2
    files[1].unlink()  # as if it had been interrupted
    more, longer = latents.encoded_clips(vae, SMALL, 4, tmp_path / "one")
    assert torch.equal(more[:3], first) and longer[:3] == prompts
    assert not any(is_held_out(parse_prompt(prompt)) for prompt in longer)


def test_another_autoencoder_encodes_anew(small, vae, tmp_path):
    first, _ = latents.encoded_clips(vae, SMALL, 1, tmp_path)
    other = recipe.build_video_vae()
    second, _ = latents.encoded_clips(other, SMALL, 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(first, second)


def test_most_training_scenes_have_one_object():
    rng = random.Random(0)
    counts = [len(latents.training_scene(rng).objects) for _ in range(300)]
    shares = [counts.count(number) / len(counts) for number in (1, 2, 3)]
    assert shares == pytest.approx([0.6, 0.35, 0.05], abs=0.07) and min(shares) > 0


def test_drawn_prompts_belong_to_their_clips_or_are_empty():
    prompts = [f"a {color} circle circling on a gray background" for color in ("red", "blue")]
    tokenizer = build_t5_tokenizer(recipe.TEXT_LENGTH)
    clips = latents.EncodedClips(
        torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, 3, 1, 1), prompts, tokenizer, "cpu"
    )
    torch.manual_seed(0)
    clean, tokens, mask = clips.draw(2, 600)
    assert clean.shape == (600, 1, 2, 1, 1)
    empty = mask.sum(1) == 1
    assert 0.06 < float(empty.float().mean()) < 0.14
    expected = tokenizer(prompts, return_tensors="pt").input_ids[clean.flatten(1)[:, 0].long()]
    assert torch.equal(tokens[~empty], expected[~empty])


def test_counting_the_padding_equals_padding(small):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    torch.manual_seed(0)
    model, tokenizer = wan.TextConditioned().eval(), build_t5_tokenizer(recipe.TEXT_LENGTH)
    prompts = [PROMPT, ""]
    noisy, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.3, 0.8])
    CountedPadding.install(model.transformer)
    short = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        counted = model(noisy, sigma, short.input_ids, short.attention_mask)
        for block in model.transformer.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        long = tokenizer(prompts, padding="max_length", max_length=recipe.TEXT_LENGTH, return_tensors="pt")
        text = model.text_encoder(long.input_ids, long.attention_mask).last_hidden_state
        text = text * long.attention_mask[..., None]
        padded = model.transformer(noisy, timestep=sigma * 1000, encoder_hidden_states=text).sample
    assert torch.allclose(counted, padded, atol=1e-5)


class Reads(TorchDispatchMode):
    """Counts values that Python reads from tensors; on a GPU each makes it wait for all work before."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_a_step_reads_no_value_from_the_device(small):
    model = wan.TextConditioned()
    CountedPadding.install(model.transformer)
    clips = latents.EncodedClips(torch.randn(3, 16, 2, 4, 4), [PROMPT] * 3, build_t5_tokenizer(512), "cpu")
    with Reads() as reads:
        bool(torch.ones(2).all())
    assert reads.count == 1
    with Reads() as reads:
        clean, tokens, mask = clips.draw(2, 2)
        wan.flow_loss(model, clean, tokens, mask, 8.0).backward()
    assert reads.count == 0


def test_small_clips_come_first_and_full_ones_later():
    rng = random.Random(0)
    early = {wan.clip_size(0.5, rng) for _ in range(50)}
    late = [wan.clip_size(0.7, rng) for _ in range(200)]
    assert early == {latents.SMALL} and 0.8 < late.count(latents.FULL) / 200 < 1
    assert (latents.FULL.frames, latents.FULL.side) == (33, 256)
    parts = sorted(latents.FULL.parts, key=lambda part: part.latent_frames)
    assert [part.shift for part in parts] == sorted(part.shift for part in parts)  # more to see needs more noise
    assert parts[-1].shift == recipe.SHIFT and sum(part.share for part in parts) == pytest.approx(1)


def test_muon_takes_the_matrices_of_the_blocks(small):
    model = wan.TextConditioned()
    matrices, others = (optimizer.param_groups[0]["params"] for optimizer in wan.optimizers(model))
    assert all(p.ndim == 2 for p in matrices) and len(matrices) == 10
    assert len(matrices) + len(others) == len(list(model.parameters()))


def test_one_step_changes_every_weight_of_the_transformer(small, vae_folder, tmp_path):
    torch.manual_seed(0)
    before = wan.TextConditioned().state_dict()
    wan.train_wan(tmp_path, vae_folder, steps=1)
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    # the keys' bias cancels in the softmax
    assert not [name for name in still if not name.endswith("to_k.bias")]


def test_one_step_changes_every_convolution_of_the_autoencoder(small, tmp_path):
    torch.manual_seed(0)
    before = recipe.build_video_vae().state_dict()
    video_vae.train_video_vae(tmp_path, steps=1)
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(
        not torch.equal(value, after[name]) for name, value in before.items() if "conv" in name and value.ndim > 3
    )


@pytest.mark.parametrize("init", [False, True])
def test_a_killed_training_ends_where_an_uninterrupted_one_does(small, vae_folder, tmp_path, monkeypatch, init):
    source = None
    if init:
        source = tmp_path / "source"
        recipe.build_pipeline().save_pretrained(source)
    monkeypatch.setattr(wan, "LoopConfig", lambda **settings: loop.LoopConfig(**settings, save_every=2))
    wan.train_wan(tmp_path / "whole", vae_folder, steps=4, init=source)
    real, calls = wan.flow_loss, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(wan, "flow_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        wan.train_wan(tmp_path / "killed", vae_folder, steps=4, init=source)
    monkeypatch.setattr(wan, "flow_loss", real)
    wan.train_wan(tmp_path / "killed", vae_folder, steps=4, init=source)
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["average"] for name in ("whole", "killed")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_init_goes_on_from_a_pipeline_with_full_clips_at_once(small, vae_folder, tmp_path, monkeypatch):
    torch.manual_seed(7)
    pipe = recipe.build_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    seen = []
    peaks = []
    monkeypatch.setattr(loop.Trainer, "_update", lambda self: peaks.append(self.config.peak))
    real = wan.flow_loss
    monkeypatch.setattr(
        wan, "flow_loss", lambda model, clean, *rest: (seen.append(clean.shape), real(model, clean, *rest))[1]
    )
    wan.train_wan(tmp_path / "run", vae_folder, steps=2, init=tmp_path / "pipe")
    assert seen == [(1, 16, 3, 4, 4)] * 2 and peaks == [0.15] * 2
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["average"]
    assert torch.equal(kept["transformer.proj_out.weight"], pipe.transformer.proj_out.weight)
    assert torch.equal(kept["text_encoder.shared.weight"], pipe.text_encoder.shared.weight)


def test_every_stage_of_the_video_model_in_miniature(small, tmp_path, monkeypatch, capsys):
    from diffusers import WanPipeline

    run = ["--folder", str(tmp_path), "--device", "cpu", "--steps", "1"]
    assert main(["wan", *run]) == 2
    assert "train first: python -m dit_accel.shapes.train video-vae" in capsys.readouterr().err
    assert main(["video-vae", *run]) == 0
    assert main(["psnr", *run, "--clips", "1"]) == 0
    assert "reconstruction of 1 held-out clips" in capsys.readouterr().out
    assert main(["export", *run, "--out", str(tmp_path / "early")]) == 2
    assert main(["wan", *run]) == 0
    assert main(["export", *run, "--out", str(tmp_path / "pipeline")]) == 0
    info = read_info(tmp_path / "pipeline")
    assert (info.subset, info.frames, info.height, info.width, info.motion) == ("all", 33, 256, 256, True)
    pipe = WanPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, height=32, width=32, num_frames=5, num_inference_steps=2).frames.shape == (1, 5, 32, 32, 3)
    average = torch.load(tmp_path / "wan-run" / "checkpoint.pt", weights_only=True)["average"]
    name = "blocks.0.attn1.to_q.weight"
    assert torch.equal(pipe.transformer.state_dict()[name].float(), average[f"transformer.{name}"].half().float())
    assert str(tmp_path) not in (tmp_path / "pipeline" / "vae" / "config.json").read_text()
    before = (tmp_path / "wan-run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    for other, message in (
        (["--steps", "2"], "steps was 1, is 2"),
        (["--init", str(tmp_path / "pipeline")], "init was none, is "),
    ):
        assert main(["wan", *run, *other]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and "delete it or choose another folder" in printed.err
        assert "step" not in printed.out  # nothing was trained
    assert (tmp_path / "wan-run" / "checkpoint.pt").read_bytes() == before
    more = [*run, "--init", str(tmp_path / "pipeline"), "--folder", str(tmp_path / "more")]
    assert main(["wan", *more]) == 0
    monkeypatch.setattr(recipe, "HEADS", 2)
    assert main(["wan", *more, "--folder", str(tmp_path / "other")]) == 2
    assert "train without --init" in capsys.readouterr().err


def test_the_pipeline_takes_at_most_14_megabytes():
    pipe, total = recipe.build_pipeline(), 0
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            width = 4 if name == "text_encoder" else 2  # bytes of a number, as exported
            total += width * sum(value.numel() for value in part.state_dict().values())
    assert 10e6 < total < 13.9e6
