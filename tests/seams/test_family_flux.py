"""What is special about Flux: packed images whose grid is in their ids, text first, two kinds of blocks."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel.families import flux
from dit_accel.layout import TokenLayout


@pytest.fixture
def subject(make_image_subject):
    return make_image_subject("flux")


class Layouts(dit_accel.AttentionControl):
    """Notes the layout of every site."""

    def __init__(self):
        super().__init__(kinds=("joint",))
        self.sites = {}

    def record(self, call, query, key, value, output):
        self.sites[call.site.path] = (call.site, call.layout)


def ids_of(height, width, image=0):
    ids = torch.zeros(height, width, 3)
    ids[..., 0], ids[..., 1], ids[..., 2] = image, torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)


def layout_of(img_ids, tokens=None, text=10):
    """What the family makes of a call."""
    tokens = img_ids.shape[-2] if tokens is None else tokens
    arguments = {
        "hidden_states": torch.zeros(1, tokens, 16),
        "encoder_hidden_states": torch.zeros(1, text, 32),
        "img_ids": img_ids,
    }
    return flux.FLUX.layout(None, arguments)


def test_text_tokens_come_first_in_both_kinds_of_blocks(subject):
    with dit_accel.accelerate(subject.pipe, controls=[notes := Layouts()]):
        subject.run()
    layout = TokenLayout((1, 8, 6), (10, 58), text=(0, 10))
    paths = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    assert [notes.sites[path][1] for path in paths] == [layout] * 3
    assert [(notes.sites[path][0].layer, notes.sites[path][0].layers) for path in paths] == [(0, 3), (1, 3), (2, 3)]


def test_the_ranges_are_where_text_and_image_are(subject):
    """Other words change the values of the first block in the text range, another image those in the visual range."""
    seen = []

    class Values(dit_accel.AttentionControl):
        def before(self, call, query, key, value):
            seen.append([value[:, :, slice(*part)].clone() for part in (call.layout.text, call.layout.visual)])
            return query, key, value

    with dit_accel.accelerate(subject.pipe, controls=[Values(kinds=["joint"], layers=[0], branches=["cond"])]):
        subject.run(num_inference_steps=1)
        subject.run(num_inference_steps=1, prompt_embeds=subject.inputs["prompt_embeds"] + torch.randn(1, 10, 32))
        subject.run(num_inference_steps=1, latents=torch.randn(1, 48, 16))
    first, other_words, other_image = seen
    assert first[0].shape == (1, 2, 10, 16) and first[1].shape == (1, 2, 48, 16)  # batch, heads, tokens, head size
    assert not torch.allclose(first[0], other_words[0]) and torch.equal(first[1], other_words[1])
    assert torch.equal(first[0], other_image[0]) and not torch.allclose(first[1], other_image[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 9), (9, 3)])
def test_odd_grids(size):
    height, width = size
    assert layout_of(ids_of(height, width)) == TokenLayout((1, height, width), (10, 10 + height * width), text=(0, 10))
    assert layout_of(ids_of(height, width)[None]).grid == (1, height, width)  # as older callers pass them


def test_ids_rounded_to_sixteen_bits():
    """Above 256 bfloat16 skips numbers, so neighboring rows share an id."""
    assert layout_of(ids_of(300, 3).bfloat16()).grid == (1, 300, 3)


def test_given_images_are_references():
    ids = torch.cat([ids_of(4, 6), ids_of(3, 5, image=1), ids_of(2, 2, image=2)])
    layout = layout_of(ids)
    assert layout == TokenLayout((1, 4, 6), (10, 34), text=(0, 10), references=((34, 49), (49, 53)))
    assert layout.length == 53


def test_ids_are_read_once_and_again_when_written_to(monkeypatch):
    reads = []
    monkeypatch.setattr(flux, "_read_grid", lambda ids, read=flux._read_grid: reads.append(ids) or read(ids))
    ids = ids_of(4, 6)
    assert layout_of(ids).grid == layout_of(ids).grid == (1, 4, 6)
    assert len(reads) == 1
    ids.copy_(ids_of(6, 4))
    assert layout_of(ids).grid == (1, 6, 4)
    with torch.inference_mode():
        assert layout_of(ids_of(4, 6)).grid == (1, 4, 6)


@pytest.mark.parametrize(
    ("ids", "tokens", "message"),
    [
        (ids_of(4, 6).flip(0), 24, None),  # a turned image is still row by row
        (ids_of(4, 6)[torch.tensor([0, 7, *range(1, 7), *range(8, 24)])], 24, "row by row"),
        (ids_of(4, 6)[:-1], 23, "row by row"),
        (ids_of(4, 6), 25, "one row of ids for each token"),
    ],
)
def test_ids_that_are_no_grid(ids, tokens, message):
    if message is None:
        assert layout_of(ids, tokens).grid == (1, 4, 6)
        return
    with pytest.raises(ValueError, match=message):
        layout_of(ids, tokens)


def test_a_processor_with_weights_is_refused_and_nothing_is_left(subject):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    stock = subject.run()
    module = subject.root.transformer_blocks[0].attn
    before = module.processor
    module.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32))
    with pytest.raises(ValueError, match=r"FluxIPAdapterAttnProcessor at .* has weights of its own"):
        dit_accel.accelerate(subject.pipe, "block_routing")
    module.set_processor(before)
    assert torch.equal(subject.run(), stock)
