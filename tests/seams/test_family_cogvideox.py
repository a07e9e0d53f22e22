"""What is special about CogVideoX: frames before channels, text first, and pairs of frames that 1.5 joins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel.families import cogvideox
from dit_accel.layout import TokenLayout

NAMES = ("cogvideox", "cogvideox1.5")


def layout_of(latents, text=10, patch_frames=None):
    """What the family makes of a call with latents of that shape, frames before channels."""
    root = SimpleNamespace(config=SimpleNamespace(patch_size=2, patch_size_t=patch_frames))
    arguments = {"hidden_states": torch.zeros(1, *latents), "encoder_hidden_states": torch.zeros(1, text, 32)}
    return cogvideox.COGVIDEOX.layout(root, arguments)


@pytest.mark.parametrize(
    ("latents", "patch_frames", "grid"),
    [((13, 16, 60, 90), None, (13, 30, 45)), ((22, 16, 96, 170), 2, (11, 48, 85)), ((1, 4, 2, 6), None, (1, 1, 3))],
)
def test_grids(latents, patch_frames, grid):
    """Those of CogVideoX and 1.5 at their published sizes, and a small one."""
    tokens = grid[0] * grid[1] * grid[2]
    assert layout_of(latents, 226, patch_frames) == TokenLayout(grid, (226, 226 + tokens), text=(0, 226))
    assert layout_of(latents, 0, patch_frames) == TokenLayout.video_only(grid)


@pytest.mark.parametrize("name", NAMES)
def test_the_ranges_are_where_text_and_video_are(name, make_video_subject):
    """Other words change the values of the first block in the text range, another video those in the visual range."""
    subject, seen = make_video_subject(name), []
    noise = torch.randn_like(subject.run(num_inference_steps=1))

    class Values(dit_accel.AttentionControl):
        def before(self, call, query, key, value):
            seen.append([value[:, :, slice(*part)].clone() for part in (call.layout.text, call.layout.visual)])
            return query, key, value

    with dit_accel.accelerate(subject.pipe, controls=[Values(kinds=["joint"], layers=[0])]):
        for changes in ({}, {"prompt_embeds": torch.randn(1, 10, 32)}, {"latents": noise}):
            subject.run(num_inference_steps=1, **changes)
    first, other_words, other_video = seen
    assert first[0].shape == (2, 2, 10, 16) and first[1].shape == (2, 2, 72, 16)  # both branches, heads, tokens, size
    assert torch.equal(first[0][0], other_words[0][0]) and not torch.allclose(first[0][1], other_words[0][1])
    assert torch.equal(first[1], other_words[1])
    assert torch.equal(first[0], other_video[0]) and not torch.allclose(first[1], other_video[1])


@pytest.mark.parametrize("name", NAMES)
def test_tokens_run_frame_by_frame(name, make_video_subject):
    """Latents that change in one frame and one corner change the values of the first block there alone."""
    subject, seen = make_video_subject(name), []
    noise = torch.randn_like(subject.run(num_inference_steps=1))
    changed = noise.clone()
    changed[:, -1, :, -1, 0] += 1  # last frame, last row, first column

    class Values(dit_accel.AttentionControl):
        def before(self, call, query, key, value):
            seen.append(value[:, :, slice(*call.layout.visual)].unflatten(2, call.layout.grid))
            return query, key, value

    with dit_accel.accelerate(subject.pipe, controls=[Values(kinds=["joint"], layers=[0])]):
        for latents in (noise, changed):
            subject.run(num_inference_steps=1, latents=latents)
    where = (seen[0] != seen[1]).any(dim=(0, 1, 5))
    assert where.nonzero().tolist() == [[2, 3, 0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("method", "settings"), [("grid", {"block": 64}), ("cluster", {"density": 0.3}), ("agent", {})]
)
def test_methods_run_with_text_in_front(name, method, settings, make_video_subject):
    """Those that are not run on every family."""
    subject = make_video_subject(name)
    dense = subject.run(height=96, width=128)
    with dit_accel.accelerate(subject.pipe, method, dense_steps=0, dense_layers=0, **settings) as handle:
        found = subject.run(height=96, width=128)
        report = handle.report()
    assert report.fallbacks == {} and all(site.sparse_calls > 0 for site in report.sites)
    assert report.density < 1 and torch.isfinite(found).all() and not torch.equal(found, dense)


def test_radial_attention_refuses_text_in_front(make_video_subject):
    """Before anything runs: it has to have the video first."""
    subject = make_video_subject("cogvideox")
    with pytest.raises(ValueError, match=r'has the text first; choose another method, such as "block_routing"'):
        dit_accel.accelerate(subject.pipe, "radial", dense_steps=0, dense_layers=0, block=64)
    assert dit_accel.acceleration_of(subject.pipe) is None
