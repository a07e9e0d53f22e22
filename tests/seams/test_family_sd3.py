"""What is special about Stable Diffusion 3: image and text in one sequence, and a second attention in 3.5."""

from __future__ import annotations

import torch

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.processors import BlockRoutingAttnProcessor


class Layouts(dit_accel.AttentionControl):
    """Notes the layout of every site."""

    def __init__(self):
        super().__init__(kinds=("joint", "self"))
        self.sites = {}

    def record(self, call, query, key, value, output):
        self.sites[call.site.path] = (call.site, call.layout)


def test_image_tokens_come_first_and_the_second_attention_has_no_text(make_image_subject):
    subject, notes = make_image_subject("sd35"), Layouts()
    with dit_accel.accelerate(subject.pipe, controls=[notes]):
        subject.run()
    joint = TokenLayout((1, 8, 6), (0, 48), text=(48, 58))
    layouts = {path: layout for path, (_, layout) in notes.sites.items()}
    assert layouts == {
        "transformer_blocks.0.attn": joint,
        "transformer_blocks.0.attn2": TokenLayout.video_only((1, 8, 6)),
        "transformer_blocks.1.attn": joint,
    }
    sites = {path: (site.kind, site.layer, site.layers) for path, (site, _) in notes.sites.items()}
    assert sites["transformer_blocks.1.attn"] == ("joint", 1, 2)
    assert sites["transformer_blocks.0.attn2"] == ("self", 0, 1)


def test_the_text_range_is_where_the_text_is(make_image_subject):
    """Other words change the values in that range, another image does not."""
    subject, seen = make_image_subject("sd3"), []

    class Text(dit_accel.AttentionControl):
        def before(self, call, query, key, value):
            start, stop = call.layout.text
            seen.append(value[:, :, start:stop].clone())
            return query, key, value

    with dit_accel.accelerate(subject.pipe, controls=[Text(kinds=["joint"], layers=[0])]):
        subject.run(num_inference_steps=1)
        subject.run(num_inference_steps=1, prompt_embeds=subject.inputs["prompt_embeds"] + 1)
        subject.run(num_inference_steps=1, latents=torch.randn(1, 4, 16, 12))
    first, other_words, other_image = seen
    assert first.shape == (2, 2, 10, 8)  # unwanted and wanted prompt, heads, tokens, head size
    assert torch.equal(first[0], other_words[0]) and not torch.allclose(first[1], other_words[1])
    assert torch.equal(first, other_image)


def test_layers_that_guidance_leaves_out_are_not_counted(make_image_subject):
    """Skip-layer guidance of SD 3.5 calls the model once more without some layers, in dense steps and in others."""
    root = make_image_subject("sd3").root
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 12),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([900.0]),
    }
    calls, method = [], BlockRoutingAttnProcessor(block=64, dense_steps=1, dense_layers=0)
    with dit_accel.accelerate(root, method) as handle, torch.no_grad():
        for step, skipped in ((0, [1]), (0, None), (1, [1])):
            handle.clock.set_step(step, 2)
            root(**inputs, skip_layers=skipped)
            calls.append([(site.sparse_calls, site.dense_calls) for site in handle.report().sites])
    assert calls == [[(0, 1), (0, 0)], [(0, 2), (0, 1)], [(1, 2), (0, 1)]]
