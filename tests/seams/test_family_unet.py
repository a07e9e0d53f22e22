"""What is special about UNets: attention at several resolutions, so that the grid belongs to the site."""

from __future__ import annotations

import pytest
import torch

import dit_accel

BLOCKS = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture
def make_unet(make_image_subject):
    """A UNet of three levels; the upper two and the middle attend."""

    def make(name="sd15", **changes):
        layers = {"transformer_layers_per_block": (1, 2, 2)} if name == "sdxl" else {}
        return rebuilt(make_image_subject(name).root, **BLOCKS | layers | changes)

    return make


def rebuilt(root, **changes):
    """The same model with other settings."""
    config = {name: value for name, value in root.config.items() if not name.startswith("_")}
    return type(root)(**config | changes).eval()


class Grids(dit_accel.AttentionControl):
    """Notes the grid of every site, by its place in the UNet."""

    def __init__(self, kind="self"):
        super().__init__(kinds=[kind])
        self.grids, self.root_grids = {}, set()

    def record(self, call, query, key, value, output):
        assert query.shape[2] == call.layout.length
        self.grids[call.site.path.partition(".attentions")[0]] = call.layout.grid
        self.root_grids.add(call.state.layout.grid)


def watch(unet, size, kind="self"):
    """Runs the UNet once, on a latent of any size."""
    grids = Grids(kind)
    extra = {"text_embeds": torch.randn(1, 24), "time_ids": torch.ones(1, 6)}
    with dit_accel.accelerate(unet, controls=[grids]), torch.no_grad():
        unet(torch.randn(1, 4, *size), torch.tensor(500), torch.randn(1, 10, 32), added_cond_kwargs=extra)
    return grids


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize(("size", "half", "quarter"), [((8, 12), (4, 6), (2, 3)), ((11, 13), (6, 7), (3, 4))])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_each_level_has_its_own_grid(make_unet, name, size, half, quarter, kind):
    """Odd sides are rounded up, as the model's padded convolutions do."""
    grids = watch(make_unet(name), size, kind)
    levels = {"down_blocks.0": size, "down_blocks.1": half, "mid_block": quarter}
    levels |= {"up_blocks.1": half, "up_blocks.2": size}
    assert grids.grids == {place: (1, *level) for place, level in levels.items()}
    assert grids.root_grids == {(1, *size)}


def test_padding_of_the_downsampling_counts(make_unet):
    """Without it odd sides are rounded down."""
    unet = make_unet(downsample_padding=0)
    assert watch(unet, (11, 13)).grids["mid_block"] == (1, 2, 3)


def test_a_unet_without_a_middle_still_counts_its_blocks(make_image_subject):
    subject = make_image_subject("sd15")
    subject.pipe.unet = rebuilt(subject.root, mid_block_type=None)
    recorder = dit_accel.BlockRecorder()
    with dit_accel.accelerate(subject.pipe, controls=[Grids()], block_hooks=[recorder]):
        subject.run(num_inference_steps=1)
    assert [index for *_, index in recorder.ran] == list(range(4))


def test_attention_by_other_names_stays_stock(make_unet):
    """Gated attention over grounding tokens sees more than image tokens, so it is no site."""
    unet = make_unet(attention_type="gated")
    stock = {path: type(processor) for path, processor in unet.attn_processors.items()}
    with dit_accel.accelerate(unet, controls=[Grids()]):
        left = {path for path, processor in unet.attn_processors.items() if type(processor) is stock[path]}
    assert left and all(".fuser." in path for path in left)
