"""Figures of attention equal those worked out by hand, and the command writes them for all three architectures."""

from __future__ import annotations

import json
import math

import pytest
import torch

import dit_accel
from dit_accel.clock import StepState
from dit_accel.inspect.recorder import decay, spread
from dit_accel.layout import TokenLayout
from dit_accel.shapes.attention import AttentionStatisticsRecorder, attention_tables, call_statistics
from dit_accel.shapes.attention.__main__ import main


def video(grid, text=0, before=0):
    """A layout of text, visual tokens, text."""
    start, stop = before, before + math.prod(grid)
    return TokenLayout(grid, (start, stop), text=(stop, stop + text) if text else None)


def by_hand(query, key, layout, block):
    """The same figures from the whole matrix, pair by pair."""
    frames, height, width = layout.grid
    start, stop = layout.visual
    full = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)[:, :, start:stop]
    weights = full[..., start:stop] / full[..., start:stop].sum(-1, keepdim=True)
    places = [(f, y, x) for f in range(frames) for y in range(height) for x in range(width)]
    batch, heads, tokens, _ = weights.shape
    found = {name: torch.zeros(heads) for name in ("first_frame", "same_frame", "same_position")}
    found |= {"text": 1 - full[..., start:stop].sum(-1).mean((0, 2))}
    profiles = {"frames": [[] for _ in range(frames)], "space": {}}
    later = sum(f > 0 for f, _, _ in places)
    for i, (f, y, x) in enumerate(places):
        for j, (g, v, u) in enumerate(places):
            mean = weights[:, :, i, j].mean(0)
            profiles["frames"][abs(f - g)].append(mean)
            if f == g:
                found["same_frame"] += mean / tokens
                profiles["space"].setdefault(round(math.hypot(y - v, x - u)), []).append(mean)
            if f != g and (y, x) == (v, u):
                found["same_position"] += mean / tokens
            if f > 0 and g == 0:
                found["first_frame"] += mean / max(later, 1)
    found["frames"] = torch.stack([torch.stack(part).mean(0) * tokens for part in profiles["frames"]], 1)
    space = [torch.stack(profiles["space"][d]).mean(0) * tokens for d in sorted(profiles["space"])]
    found["space"] = torch.stack(space, 1)
    count = math.ceil(tokens / block)
    for b in range(batch):
        for h in range(heads):
            for q in range(count):
                rows = weights[b, h, q * block : (q + 1) * block].mean(0)
                mass = sorted((float(rows[k * block : (k + 1) * block].sum()) for k in range(count)), reverse=True)
                for name, share in (("recall_10", 0.1), ("recall_20", 0.2)):
                    whole = int(share * count + 1e-9)
                    part = sum(mass[:whole]) + (share * count - whole) * mass[whole]
                    found.setdefault(name, torch.zeros(heads))[h] += part / (batch * count)
                need, kept = 0.0, 0.0
                for value in mass:
                    step = min(1.0, (0.95 - kept) / value)
                    need, kept = need + step, kept + step * value
                    if step < 1:
                        break
                found.setdefault("density_95", torch.zeros(heads))[h] += need / count / (batch * count)
    return found


@pytest.mark.parametrize(
    ("layout", "block"),
    [
        (video((3, 4, 5), text=7), 4),  # 15 whole blocks that straddle frames
        (video((3, 3, 5)), 4),  # the last block is short
        (video((2, 3, 4), text=3, before=5), 2),  # the visual tokens are in the middle
        (video((1, 6, 9), text=4), 5),
    ],
)
def test_figures_equal_those_worked_out_by_hand(layout, block):
    torch.manual_seed(0)
    query, key = 2 * torch.randn(2, 2, layout.length, 8), torch.randn(2, 2, layout.length, 8)
    found, expected = call_statistics(query, key, layout, block), by_hand(query, key, layout, block)
    absent = set() if layout.length > math.prod(layout.grid) else {"text"}
    absent |= {"frames", "first_frame", "same_frame", "same_position"} if layout.grid[0] == 1 else set()
    assert set(found) == set(expected) - absent
    for name, values in found.items():
        assert torch.allclose(values, expected[name], atol=1e-5), name


def test_uniform_attention_has_the_figures_of_no_structure():
    layout, nothing = video((4, 8, 10), text=16), torch.zeros(1, 3, 336, 8)
    found = call_statistics(nothing, nothing, layout, 16)
    expected = {"recall_10": 0.1, "recall_20": 0.2, "density_95": 0.95, "text": 16 / 336}
    expected |= {"first_frame": 0.25, "same_frame": 0.25, "same_position": 3 / 320, "frames": 1.0, "space": 1.0}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], torch.tensor(value), atol=1e-4), name


def positions(grid):
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).float()


def test_local_and_temporal_heads_are_told_apart():
    """One head looks at its own place in all frames, the other all over its own frame."""
    grid = (5, 8, 8)
    place = positions(grid)
    same_place = torch.nn.functional.one_hot((place[:, 1] * 8 + place[:, 2]).long(), 64).float()
    same_frame = torch.nn.functional.one_hot(place[:, 0].long(), 64).float()
    heads = torch.stack([same_place, same_frame])[None] * 20
    found = call_statistics(heads, heads, video(grid), 16)
    assert torch.allclose(found["same_position"], torch.tensor([0.8, 0.0]), atol=1e-4)
    assert torch.allclose(found["same_frame"], torch.tensor([0.2, 1.0]), atol=1e-4)
    assert torch.allclose(found["first_frame"], torch.tensor([0.2, 0.0]), atol=1e-4)
    assert torch.allclose(found["frames"][1], torch.tensor([5.0, 0, 0, 0, 0]), atol=1e-4)
    assert torch.allclose(found["recall_20"], torch.tensor([0.8, 1.0]), atol=1e-4)  # 4 of 20 blocks


def test_a_known_decay_is_found_again():
    assert decay([math.exp(-0.7 * distance) for distance in range(6)]) == pytest.approx((0.7, 1.0))
    assert decay([1.0, 1.0, 1.0, 1.0]) is None and decay([1.0, 0.5]) is None and decay([1.0, 0.0, 0.0]) is None
    wavy = decay([1.0, 2.0, 0.4, 0.9, 0.1])
    assert wavy is not None and 0 < wavy[1] < 0.9


def test_attention_to_fewer_than_ten_blocks_has_no_recall():
    few = torch.randn(1, 1, 72, 8)
    assert not {"recall_10", "recall_20", "density_95"} & set(call_statistics(few, few, video((1, 8, 9)), 8))


def test_a_call_that_does_not_fit_its_layout_is_refused():
    tokens = torch.randn(1, 1, 72, 8)
    with pytest.raises(ValueError, match="the layout says 72 tokens, the call has 72 queries and 10 keys"):
        call_statistics(tokens, tokens[:, :, :10], video((1, 8, 9)))


@pytest.mark.parametrize(
    ("steps", "samples", "chosen"),
    [(20, 4, [2, 7, 12, 17]), (3, 4, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (5, 2, [1, 3]), (50, 1, [25])],
)
def test_recorded_steps_are_spread_evenly(steps, samples, chosen):
    assert spread(steps, samples) == chosen


def test_bad_counts_are_refused():
    for settings, what in (({"block": 0}, "block"), ({"samples": 0}, "recorded steps")):
        with pytest.raises(ValueError, match=what):
            AttentionStatisticsRecorder(**settings)
    state = StepState(0, 0, None, "call0", "transformer", 0, video((1, 2, 2)), None)
    assert AttentionStatisticsRecorder().acts_at(state)
    with pytest.raises(ValueError, match="nobody says how many steps"):
        AttentionStatisticsRecorder(samples=2).acts_at(state)


def run(folder, tmp_path, *more):
    out = tmp_path / "attention.json"
    assert main(["--model", str(folder), "--prompts", "1", "--block", "16", "--out", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_the_command_measures_a_clip_model(shapes_wan, tmp_path, capsys):
    report = run(shapes_wan, tmp_path, "--samples", "1", "--subset", "single", "--frames", "9")
    assert report["recorded_steps"] == [1] and report["block"] == 16
    assert [layer["path"] for layer in report["layers"]] == [f"blocks.{i}.attn1" for i in range(2)]
    for layer in report["layers"]:
        assert layer["grid"] == [3, 4, 6] and layer["tokens"] == 72 and layer["heads"] == 2 and layer["text"] is None
        assert len(layer["frames"]["profile"]) == 3 and 0 < layer["same_frame"] < 1
        assert layer["recall_10"] is None and list(layer["by_step"]) == ["1"]  # 72 tokens are 5 blocks
    printed = capsys.readouterr().out
    assert printed == attention_tables(report)
    assert "| `blocks.1.attn1` | 3x4x6 | 2 | - |" in printed and "same place in other frames (heads)" in printed
    assert printed.startswith(
        f"{report['settings']['model']}, 1 held-out prompt, 9 x 64 x 96, steps 1 of 2, blocks of"
    )
    assert "mass on text" not in printed


def test_the_command_measures_joint_attention(shapes_sd3, tmp_path, capsys):
    (layer,) = run(shapes_sd3, tmp_path)["layers"]
    assert (layer["kind"], layer["grid"]) == ("joint", [1, layer["grid"][1], layer["grid"][2]])
    assert 0 < layer["text"] < 1 and 0.1 <= layer["recall_10"] < layer["recall_20"] < 1
    assert layer["frames"] is None and layer["same_position"] is None
    assert len(layer["by_head"]["recall_10"]) == layer["heads"] == 4
    printed = capsys.readouterr().out
    assert "| mass on text |" in printed and f"| {layer['text']:.1%} |" in printed
    assert "rate per token" in printed and "other frames (heads)" not in printed


def test_the_command_measures_every_level_of_a_unet(shapes_sd15, tmp_path):
    layers = run(shapes_sd15, tmp_path, "--height", "128")["layers"]
    assert [layer["kind"] for layer in layers] == ["self"] * len(layers) and len(layers) == 4
    assert layers == sorted(layers, key=lambda layer: layer["layer"])
    for layer in layers:
        assert layer["tokens"] == layer["grid"][1] * layer["grid"][2] and layer["text"] is None


def test_measuring_changes_nothing(tiny_wan):
    arguments = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}

    def latents():
        return tiny_wan("a red circle", generator=torch.Generator().manual_seed(0), **arguments).frames

    stock, recorder = latents(), AttentionStatisticsRecorder(4)
    with dit_accel.accelerate(tiny_wan, controls=[recorder]):
        assert torch.equal(latents(), stock)
    assert len(recorder.by_layer()) == 2
    assert sorted(recorder.by_layer()[0]["by_step"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "figures.txt"], "--out must be a .json file"),
        (["--out", "figures.json", "--model", "shapes-sd9"], "no shipped model is called 'shapes-sd9'"),
        (["--out", "figures.json", "--samples", "0"], "recorded steps must be at least 1"),
        (["--out", "figures.json", "--option", "decay=1"], "belongs to a sparse method"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
