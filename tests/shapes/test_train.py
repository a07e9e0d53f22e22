"""The training loop, its optimizer and its command line: a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_accel.shapes.train import devices, loop, muon
from dit_accel.shapes.train.__main__ import main

CONFIG = loop.LoopConfig(steps=8, warmup=2, log_every=2, save_every=4)


def fit_line(
    folder: Path,
    stop_at: int | None = None,
    outputs: int = 1,
    steps: int = CONFIG.steps,
    run: dict[str, str] | None = None,
) -> loop.Trainer:
    """Fits a line; ``stop_at`` kills the run in the middle of that step."""
    torch.manual_seed(0)
    model = nn.Linear(3, outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trainer = loop.Trainer(model, [optimizer], replace(CONFIG, steps=steps), folder, run)

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 3)
        return (model(inputs) - inputs.sum(-1, keepdim=True)).square().mean()

    trainer.fit(loss_at)
    return trainer


def log(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "killed", stop_at=6)
    with (tmp_path / "killed" / "log.jsonl").open("a") as lines:
        lines.write('{"step": 6, "lo')
    resumed = fit_line(tmp_path / "killed")
    assert resumed.step == whole.step == 8
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert [step for step, _ in log(tmp_path / "killed")] == [2, 4, 6, 8]
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_the_average_lags_behind_the_weights(tmp_path):
    trainer = fit_line(tmp_path)
    before, weight = trainer.average["weight"].clone(), trainer.model.weight.detach().clone()
    trainer.step = 10_000
    trainer._update()  # no gradients: the weights stay
    assert torch.allclose(trainer.average["weight"], 0.995 * before + 0.005 * weight)
    assert not torch.equal(before, weight)
    trainer.load_average()
    assert torch.equal(trainer.model.weight, trainer.average["weight"])


def test_the_log_tells_every_second_step(tmp_path):
    fit_line(tmp_path)
    assert [step for step, _ in log(tmp_path)] == [2, 4, 6, 8]
    assert log(tmp_path)[-1][1] < log(tmp_path)[0][1]


def test_learning_rate_rises_holds_and_falls(tmp_path):
    trainer = fit_line(tmp_path)
    rates = []
    for trainer.step in range(8):
        rates.append(trainer._schedule())
    assert rates[:2] == [0.5, 1.0] and rates[4] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.3


def test_finished_weights_go_on_at_a_small_learning_rate_that_falls_from_the_start(tmp_path):
    trainer = fit_line(tmp_path)
    trainer.config = loop.going_on(loop.LoopConfig(steps=100))
    rates = []
    for trainer.step in (0, 29, 30, 65, 99):
        rates.append(trainer._schedule())
    assert max(rates) == rates[1] == 0.15 and rates[0] < 0.01
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.01


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit_line(tmp_path)
    with pytest.raises(ValueError, match="another version of this model; delete it or choose another folder"):
        fit_line(tmp_path, outputs=2)


def test_steps_before_the_first_checkpoint_are_logged_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, stop_at=3)
    fit_line(tmp_path)
    assert [step for step, _ in log(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 12}, "steps was 8, is 12"),
        ({"run": {"init": "abc", "device": "cpu"}}, "init was none, is abc"),
        ({"run": {"init": "none", "device": "cuda"}, "steps": 4}, "steps was 8, is 4; device was cpu, is cuda"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    given = {"steps": 8, "run": {"init": "none", "device": "cpu"}}
    fit_line(tmp_path, **given)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"cannot resume .*checkpoint\.pt: {message}; delete it or choose another"):
        fit_line(tmp_path, **given | change)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert fit_line(tmp_path, **given).step == 8


def test_a_checkpoint_that_does_not_say_its_run_is_resumed(tmp_path):
    fit_line(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["run"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert fit_line(tmp_path, steps=12, run={"init": "abc"}).step == 12
    assert [step for step, _ in log(tmp_path)] == [2, 4, 6, 8, 10, 12]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")
@pytest.mark.parametrize("shapes", [[(6, 6), (6, 6)], [(4, 9)], [(9, 4), (4, 4)]])
def test_muon_steps_like_that_of_torch(shapes, monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.bfloat16)  # as torch does on every device
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    stock = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for optimizer, parameters in ((muon.Muon(ours, lr=0.01), ours), (stock, theirs)):
        torch.manual_seed(1)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape)
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (other - first).norm()


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 8, 20), (2, 20, 8)])
def test_muon_makes_matrices_orthogonal_each_by_itself(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e4])[: shape[0], None, None]
    found = muon.orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert found.dtype is torch.float32 or devices.fast_dtype("cpu") is torch.bfloat16
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    one_by_one = torch.cat([muon.orthogonal(matrix[None]) for matrix in matrices])
    assert torch.allclose(found, one_by_one, atol=0.02)


def test_half_precision_only_where_it_is_fast(monkeypatch):
    known: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert devices.fast_dtype("cpu") is torch.float32 and devices.fast_dtype("cuda") is torch.bfloat16
    with devices.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    known["amx_bf16"] = True
    with devices.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert devices.settings_for("cuda:0").batch_factor > devices.settings_for("cpu").batch_factor


@pytest.mark.parametrize("stage", ["image-vae", "sd3", "sd15", "export sd3", "export sd15", "psnr sd3"])
def test_stages_of_the_image_models_are_wired(stage, tmp_path, monkeypatch, capsys):
    from diffusers import AutoencoderKL

    from dit_accel.shapes.recipes.image_vae import build_image_vae
    from dit_accel.shapes.train import export_images, image_vae, sd3, sd15

    calls = []
    names = {image_vae: "train_image_vae", sd3: "train_sd3", sd15: "train_sd15"}
    for module, name in names.items():
        monkeypatch.setattr(module, name, lambda *values, name=name, **named: calls.append((name, values, named)))
    for name in ("export_sd3", "export_sd15"):
        monkeypatch.setattr(export_images, name, lambda *values, name=name: calls.append((name, values, {})))
    monkeypatch.setattr(
        image_vae, "image_psnr", lambda vae, count: [30.0, 34.0] if isinstance(vae, AutoencoderKL) else []
    )
    vae = tmp_path / "image-vae-run" / "vae"
    if stage != "image-vae":
        build_image_vae().save_pretrained(vae)
    name, _, model = stage.partition(" ")
    extra = ["--model", model, "--out", str(tmp_path / "out")] if model else ["--steps", "7"]
    assert main([name, "--folder", str(tmp_path), "--device", "cpu", *extra]) == 0
    if name == "psnr":
        assert "2 held-out images: 30.0 to 34.0 dB, mean 32.0 dB" in capsys.readouterr().out
        return
    (call,) = calls
    folder = tmp_path / f"{model or name}-run"
    chosen = {"steps": 7, "device": "cpu"}
    if name == "export":
        assert call == (f"export_{model}", (vae, folder, tmp_path / "out"), {})
    elif name == "image-vae":
        assert call == ("train_image_vae", (folder,), chosen)
    else:
        assert call == (f"train_{name}", (folder, vae), {"init": None, **chosen})
