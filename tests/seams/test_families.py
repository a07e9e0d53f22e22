"""A model we never heard of becomes known by a handful of facts."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel.families import family_of, registry
from dit_accel.layout import TokenLayout


@pytest.fixture
def unknown(t2v, monkeypatch):
    """Wan, forgotten."""
    monkeypatch.setattr(registry, "_FAMILIES", {})
    return t2v


def test_registering_makes_a_model_work(unknown):
    with pytest.raises(dit_accel.UnknownModelError, match="WanTransformer3DModel"):
        dit_accel.accelerate(unknown.pipe, "radial")
    stock = unknown.run()

    def layout(root, arguments):
        _, _, frames, height, width = arguments["hidden_states"].shape
        return TokenLayout.video_only((frames, height // 2, width // 2))

    def site_kind(path, module):
        return "self" if path.endswith(".attn1") else None

    family = dit_accel.Family("WanTransformer3DModel", layout, site_kind, block_lists=("blocks",))
    dit_accel.register_family(family)
    assert family_of(unknown.pipe.transformer) is family
    with dit_accel.accelerate(unknown.pipe, "radial", block=64, dense_steps=0, dense_layers=0) as handle:
        assert torch.equal(unknown.run(), stock)  # twelve tokens are one block, so nothing is dropped
        assert len(handle.report().sites) == 2


def test_subclasses_inherit_their_family(t2v):
    class Mine(type(t2v.pipe.transformer)):
        pass

    assert family_of(Mine.from_config(dict(t2v.pipe.transformer.config))).root_class == "WanTransformer3DModel"


@pytest.mark.parametrize(
    "broken",
    [
        {"grid": (0, 2, 2), "visual": (0, 0)},
        {"grid": (2, 2, 2), "visual": (0, 7)},
    ],
)
def test_impossible_layouts_are_refused(broken):
    with pytest.raises(ValueError, match="grid"):
        TokenLayout(**broken)


def test_layout_arithmetic():
    layout = TokenLayout((3, 4, 5), (0, 60), text=(60, 67), padding=2)
    assert (layout.frame_tokens, layout.text_tokens, layout.length) == (20, 7, 69)
