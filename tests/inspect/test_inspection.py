"""Heads with known attention get the figures, the decay and the method that they should."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.controls import block_mass
from dit_accel.inspect import InspectionRecorder
from dit_accel.inspect.inspection import best_methods
from dit_accel.inspect.methods import Candidate

from ..seams.conftest import build_video_subject
from .oracle import call_for, places, softmax, vectors, video

GRID = (6, 4, 8)
TOKENS = math.prod(GRID)


def heads_of(*weights):
    """Queries and keys ``[1, heads, tokens, tokens]`` of matrices of weights."""
    pairs = [vectors(matrix) for matrix in weights]
    return tuple(torch.stack(part)[None] for part in zip(*pairs, strict=True))


def distances(axis):
    """Distance of all pairs of tokens in frames (0), or in space (1)."""
    place = torch.tensor(places(GRID), dtype=torch.float64)
    apart = place[:, None] - place[None]
    return apart[..., 0].abs() if axis == 0 else torch.hypot(apart[..., 1], apart[..., 2]).round()


def inspect(query, key, value, candidates=(), layout=None, **settings):
    """The record of one layer after one call; its output is that of plain attention."""
    recorder = InspectionRecorder([3], candidates, **settings)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    recorder.record(call_for(layout or video(GRID)), query, key, value, output)
    (layer,) = recorder.by_layer()
    return layer, recorder


def test_a_head_of_its_own_frame_and_a_uniform_one():
    own = torch.where(distances(0) == 0, 1.0, 1e-9)
    query, key = heads_of(own, torch.ones(TOKENS, TOKENS))
    layer, recorder = inspect(query, key, torch.randn_like(query), blocks=(4, 8))
    assert layer["shares"]["same_frame"] == pytest.approx([1, 1 / 6], abs=1e-3)
    assert layer["shares"]["first_frame"] == pytest.approx([0, 1 / 6], abs=1e-3)
    assert layer["shares"]["same_position"] == pytest.approx([0, 5 / TOKENS], abs=1e-3)
    assert layer["shares"]["text"] is None
    assert layer["recall"]["4"]["0.2"] == pytest.approx([1, 0.2], abs=1e-3), "a frame is 8 of 48 blocks"
    assert layer["recall"]["8"]["0.1"] == pytest.approx([0.6, 0.1], abs=1e-3), "a frame is 4 of 24 blocks"
    assert layer["recall"]["4"]["0.5"] == pytest.approx([1, 0.5], abs=1e-3)
    picture = recorder.pictures()["transformer", "blocks.0.attn1"].mass
    assert torch.allclose(picture[1], torch.ones(32, 32), atol=1e-3)
    corner = torch.block_diag(*[torch.full((8, 8), 6.0)] * 2)
    assert torch.allclose(inspect_picture(own)[:16, :16], corner, atol=1e-2), "cells of 4 tokens"
    assert layer["unlike"] < 1e-3 and layer["best"] == [None, None]


def inspect_picture(weights):
    from dit_accel.inspect.thumbnails import mass_picture

    query, key = heads_of(weights)
    return mass_picture(block_mass(query, key, 4), TOKENS, 4, 48)[0]


@pytest.mark.parametrize(("axis", "name", "rate"), [(0, "frames", 0.7), (1, "space", 0.25)])
def test_the_rate_of_an_exponential_decay_is_recovered(axis, name, rate):
    """About, since queries at the border share out their attention among fewer neighbors."""
    query, key = heads_of((-rate * distances(axis)).exp(), (-2 * rate * distances(axis)).exp())
    layer, _ = inspect(query, key, torch.randn_like(query), blocks=(4,))
    assert layer[name]["by_head"]["rate"] == pytest.approx([rate, 2 * rate], rel=0.15)
    assert min(layer[name]["by_head"]["r_squared"]) > 0.98
    assert rate < layer[name]["rate"] < 2 * rate
    own = softmax(query, key)[0][:, (distances(0) == 0) & (distances(1) == 0)].mean() * TOKENS
    assert name == "frames" or layer[name]["profile"][0] == pytest.approx(float(own), rel=1e-3)


def test_a_decay_on_a_ring_is_recovered_exactly():
    """Where the last frame is next to the first, every query has as many neighbors at each distance."""
    apart = torch.minimum(distances(0), 6 - distances(0))
    query, key = heads_of((-0.7 * apart).exp())
    profile = inspect(query, key, torch.randn_like(query), blocks=(4,))[0]["frames"]["profile"]
    ratios = [profile[distance] / profile[distance + 1] for distance in range(3)]
    assert ratios == pytest.approx([math.exp(0.7)] * 3, rel=1e-3)
    assert profile[4:] == pytest.approx(profile[2:0:-1], rel=1e-3)


def test_text_and_images():
    layout = video((1, 6, 8), before=5, after=7)
    query, key, value = (torch.zeros(1, 2, 60, 8) for _ in range(3))
    layer, _ = inspect(query, key, value, layout=layout, blocks=(4,))
    assert layer["shares"]["text"] == pytest.approx([12 / 60] * 2, abs=1e-3)
    assert layer["frames"] is None and layer["shares"]["same_frame"] is None
    assert (layer["tokens"], layer["text_tokens"], layer["grid"]) == (48, 12, [1, 6, 8])
    assert layer["space"]["rate"] is None, "flat profiles have no rate"


def test_each_head_gets_the_method_made_for_it():
    """One head looks within windows of the grid, the other at a few blocks far away, which only a search finds."""
    grid, generator = (4, 16, 16), torch.Generator().manual_seed(0)
    place = torch.tensor(places(grid), dtype=torch.float64)
    apart = (place[:, None] - place[None]).abs()
    window = torch.where((apart <= torch.tensor([1.0, 2.0, 3.0])).all(-1), 1.0, 1e-9)
    block = torch.arange(1024) // 64
    far = torch.where(block[None] == (block[:, None] * 5 + 7) % 16, 1.0, 1e-9)
    query, key = heads_of(window, far)
    value = torch.randn(1, 2, 1024, 8, generator=generator)
    value = torch.nn.functional.pad(value, (0, 1016))
    candidates = [Candidate(name, 0.25) for name in ("neighborhood", "block_routing")]
    layer, recorder = inspect(query, key, value, candidates, video(grid))
    assert layer["best"] == ["neighborhood", "block_routing"]
    errors = {name: layer["methods"][name]["error"] for name in layer["methods"]}
    assert errors["block_routing"][1] < 0.01 < 0.5 < errors["neighborhood"][1]
    assert layer["methods"]["block_routing"]["recall"][1] == pytest.approx(1, abs=1e-3)
    masks = recorder.pictures()["transformer", "blocks.0.attn1"].masks
    assert masks["block_routing"].shape == (2, 32, 32) and masks["neighborhood"].shape[1:] == (32, 32)
    json.dumps(layer)


def test_methods_that_keep_too_much_do_not_take_part():
    methods = {
        "dense": {"error": [0.0, 0.0], "density": [0.7, 0.7]},
        "fine": {"error": [0.3, 0.1], "density": [0.1, 0.4]},
        "good": {"error": [0.2, 0.1], "density": [0.29, 0.29]},
    }
    assert best_methods(methods, 2, 0.25) == ["good", "fine"]
    assert best_methods(methods, 2, 0.1) == [None, None]
    assert best_methods({}, 3, 0.25) == [None] * 3


def test_a_method_that_cannot_act_is_refused_with_the_reason():
    layout = video((2, 4, 8), before=3)  # radial attention wants the text behind
    query = torch.randn(1, 1, layout.length, 8)
    layer, _ = inspect(query, query, query, [Candidate("radial", 0.5)], layout, blocks=(4,))
    assert layer["methods"] == {} and "without padding" in layer["refused"]["radial"]


def test_attention_that_is_not_plain_softmax_is_noticed():
    query = torch.randn(1, 1, TOKENS, 8)
    recorder = InspectionRecorder([3], blocks=(4,))
    causal = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    recorder.record(call_for(video(GRID)), query, query, query, causal)
    assert recorder.by_layer()[0]["unlike"] > 0.2


def test_padding_is_as_if_it_were_not_there():
    layout = video((2, 4, 8), after=5)
    tensors = [torch.randn(1, 2, layout.length + 3, 8) for _ in range(3)]
    seen = [part[:, :, :-3] for part in tensors]
    output = torch.nn.functional.scaled_dot_product_attention(*seen)
    padded = torch.nn.functional.pad(output, (0, 0, 0, 3))

    def recorded(layout, *tensors):
        recorder = InspectionRecorder([3], [Candidate("compensated", 0.5)], blocks=(4,))
        recorder.record(call_for(layout), *tensors)
        return recorder.by_layer()

    layers = recorded(replace(layout, padding=3), *tensors, padded)
    assert layers == recorded(layout, *seen, output)
    assert layers[0]["text_tokens"] == 5 and layers[0]["unlike"] < 1e-3
    assert layers[0]["refused"] == {} and layers[0]["methods"].keys() == {"compensated"}
    share = softmax(seen[0], seen[1])[0, :, :64, 64:].sum(-1).mean(-1)
    assert layers[0]["shares"]["text"] == pytest.approx(share.tolist(), abs=1e-3)


def test_the_padding_of_hunyuanvideo_is_left_out():
    """The last three of its ten text tokens, which the mask of the model hides from all others."""
    subject, names = build_video_subject("hunyuan"), ("radial", "block_routing", "compensated")
    recorder = InspectionRecorder([0], [Candidate(name, 0.5) for name in names], blocks=(4,))
    with dit_accel.accelerate(subject.pipe, controls=[recorder]):
        subject.run(height=96, width=128, num_inference_steps=1)
    layers = recorder.by_layer()
    assert [(layer["tokens"], layer["text_tokens"]) for layer in layers] == [(144, 7)] * 3
    for layer in layers:
        assert layer["methods"].keys() == set(names) and layer["refused"] == {}
        assert layer["unlike"] < 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_named(value):
    query = torch.randn(1, 2, TOKENS, 8)
    output = query.clone()
    output[0, 1, 5, 3] = value
    recorder = InspectionRecorder([3], blocks=(4,))
    message = r"blocks\.0\.attn1 gave NaN or infinity at step 3; try float32 or bfloat16"
    with pytest.raises(ValueError, match=message):
        recorder.record(call_for(video(GRID)), query, query, query, output)
    assert recorder.by_layer() == []


def test_calls_are_averaged_and_steps_are_chosen():
    query = [torch.randn(1, 2, TOKENS, 8) for _ in range(2)]
    recorder = InspectionRecorder([3, 5], blocks=(4,))
    call = call_for(video(GRID))
    assert recorder.acts_at(call.state)
    for part in query:
        recorder.record(call, part, part, part, part)
    together = recorder.by_layer()[0]
    apart = [inspect(part, part, part, blocks=(4,))[0] for part in query]
    mean = [sum(values) / 2 for values in zip(*(layer["recall"]["4"]["0.2"] for layer in apart), strict=True)]
    assert together["recall"]["4"]["0.2"] == pytest.approx(mean, abs=2e-4)
    assert (together["calls"], together["steps"]) == (2, [3])


def test_inspecting_changes_nothing(tiny_wan):
    arguments = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}

    def latents():
        return tiny_wan("a red circle", generator=torch.Generator().manual_seed(0), **arguments).frames

    stock = latents()
    recorder = InspectionRecorder([1], [Candidate("block_routing", 0.25)], blocks=(4,))
    with dit_accel.accelerate(tiny_wan, controls=[recorder]):
        assert torch.equal(latents(), stock)
    assert [layer["steps"] for layer in recorder.by_layer()] == [[1], [1]]
    assert all(layer["unlike"] < 1e-3 for layer in recorder.by_layer())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at": []}, "steps to look at"),
        ({"at": [-1]}, "steps to look at"),
        ({"at": [1], "blocks": (64, 96)}, "multiples of the first"),
        ({"at": [1], "blocks": ()}, "multiples of the first"),
        ({"at": [1], "densities": (0.1, 1.5)}, r"in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InspectionRecorder(**settings)
