"""Training can be killed at any step and goes on as if nothing had happened; every stage runs end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_accel.shapes.train.loop import LoopConfig, Trainer

CONFIG = LoopConfig(steps=8, warmup=2, log_every=2, save_every=4)


def train(folder: Path, stop_at: int | None = None) -> Trainer:
    """Fits a line; ``stop_at`` kills the run in the middle of that step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    trainer = Trainer(model, [torch.optim.AdamW(model.parameters(), lr=0.1)], CONFIG, folder)

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 3)
        return (model(inputs) - inputs.sum(-1, keepdim=True)).square().mean()

    trainer.fit(loss_at)
    return trainer


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", stop_at=6)
    resumed = train(tmp_path / "killed")
    assert resumed.step == whole.step == 8
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_the_log_tells_every_second_step(tmp_path):
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_learning_rate_rises_holds_and_falls(tmp_path):
    trainer = train(tmp_path)
    rates = []
    for trainer.step in range(8):
        rates.append(trainer._schedule())
    assert rates[:2] == [0.5, 1.0] and rates[4] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.3


def test_every_stage_in_miniature(tmp_path, monkeypatch, capsys):
    from diffusers import WanPipeline

    from dit_accel.shapes.train import latents, vae, wan
    from dit_accel.shapes.train.__main__ import main

    small = latents.ClipSize(frames=5, side=32, clips=3, parts=(latents.Part(latent_frames=2, batch=2, shift=8.0),))
    for module in (latents, wan):
        monkeypatch.setattr(module, "SMALL", small)
        monkeypatch.setattr(module, "FULL", small)
    monkeypatch.setattr(vae, "CROP", 32)
    run = ["--folder", str(tmp_path), "--device", "cpu", "--steps", "2"]
    main(["vae", *run])
    main(["psnr", "--folder", str(tmp_path), "--clips", "1"])
    assert "reconstruction of 1 held-out clips" in capsys.readouterr().out
    main(["wan", *run])
    main(["export", *run, "--out", str(tmp_path / "pipeline")])
    pipe = WanPipeline.from_pretrained(tmp_path / "pipeline")
    video = pipe("a red circle moving up on a black background", height=32, width=32, num_frames=5).frames
    assert video.shape == (1, 5, 32, 32, 3)
    main(["wan", *run[:-1], "1", "--init", str(tmp_path / "pipeline"), "--folder", str(tmp_path / "more")])
    assert (tmp_path / "more" / "wan-run" / "checkpoint.pt").exists()


def test_counting_the_padding_equals_padding():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    from dit_accel.shapes.recipe import TEXT_LENGTH, build_tokenizer
    from dit_accel.shapes.train.wan import CountedPadding, TextConditioned

    torch.manual_seed(0)
    model, tokenizer = TextConditioned().eval(), build_tokenizer()
    prompts = ["a red circle moving left on a gray background", ""]
    latents, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.3, 0.8])
    CountedPadding.install(model.transformer)
    short = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        counted = model(latents, sigma, short.input_ids, short.attention_mask)
        for block in model.transformer.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        long = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        text = model.text_encoder(long.input_ids, long.attention_mask).last_hidden_state
        text = text * long.attention_mask[..., None]
        padded = model.transformer(latents, timestep=sigma * 1000, encoder_hidden_states=text).sample
    assert torch.allclose(counted, padded, atol=1e-5)
