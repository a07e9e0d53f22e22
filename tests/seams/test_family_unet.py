"""What is special about UNets: attention at several resolutions, so that the grid belongs to the site."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel.caching import Cache
from dit_accel.caching.policies.static import Static
from dit_accel.caching.scopes.output import Output
from dit_accel.install import BoundProcessor
from dit_accel.processors import BlockRoutingAttnProcessor

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


def routing():
    """Sparse in every call."""
    return BlockRoutingAttnProcessor(block=64, dense_steps=0, dense_layers=0)


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ({"attention": routing()}, "attn1"),
        ({"controls": [Grids("cross")]}, "attn2"),
        ({"cache": Cache(Output(), Static(compute_steps=(0,)))}, None),
    ],
)
def test_other_processors_are_reported_where_something_acts(make_image_subject, options, listed):
    """Attention slicing puts others on all modules, as ``pipe.enable_attention_slicing()`` does."""
    unet = make_image_subject("sd15").root
    with dit_accel.accelerate(unet, **options) as handle:
        assert handle.report().fallbacks == {}
        unet.set_attention_slice("max")
        report = handle.report()
    wanted = {f"{path}.{listed}" for path, _ in unet.named_modules() if path.endswith("transformer_blocks.0")}
    assert {path.partition(":")[2] for path in report.fallbacks} == (wanted if listed else set())


def adapter_on(module):
    """The processor of an IP-Adapter, which has weights of its own."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    module.set_processor(IPAdapterAttnProcessor2_0(module.to_q.out_features, module.to_k.in_features))


@pytest.fixture
def adapted(make_image_subject):
    """Stable Diffusion 1.5 with an IP-Adapter on all of its cross-attention."""
    subject = make_image_subject("sd15")
    for path, module in list(subject.root.named_modules()):
        if path.endswith(".attn2"):
            adapter_on(module)
    return subject


def call_adapted(unet):
    """One call, with four tokens of an image beside the text."""
    torch.manual_seed(3)
    text = (torch.randn(1, 10, 32), [torch.randn(1, 4, 32)])
    with torch.no_grad():
        return unet(torch.randn(1, 4, 9, 13), torch.tensor(500), text, return_dict=False)[0]


def test_cross_attention_with_an_adapter_stays_stock(adapted):
    unet = adapted.root
    stock, before = call_adapted(unet), unet.attn_processors
    with dit_accel.accelerate(unet, routing()) as handle:
        now = unet.attn_processors
        assert all((now[path] is before[path]) is (".attn2." in path) for path in before)
        assert torch.isfinite(call_adapted(unet)).all()
        report = handle.report()
    assert report.fallbacks == {}
    assert [(site.kind, site.sparse_calls, site.dense_calls) for site in report.sites] == [("self", 1, 0)] * 4
    assert unet.attn_processors == before and torch.equal(call_adapted(unet), stock)


def test_an_adapter_is_refused_where_something_acts(adapted):
    unet = adapted.root
    stock, before = call_adapted(unet), unet.attn_processors
    with pytest.raises(ValueError, match=r"IPAdapterAttnProcessor2_0 at .*attn2 has weights of its own"):
        dit_accel.accelerate(unet, routing(), controls=[Grids("cross")])
    assert unet.attn_processors == before and torch.equal(call_adapted(unet), stock)
    adapter_on(unet.mid_block.attentions[0].transformer_blocks[0].attn1)
    for options in ({"attention": routing()}, {"controls": [Grids("cross")]}):
        with pytest.raises(ValueError, match=r"mid_block.*attn1 has weights|attn2 has weights"):
            dit_accel.accelerate(unet, **options)
    assert not any(isinstance(processor, BoundProcessor) for processor in unet.attn_processors.values())
    assert dit_accel.acceleration_of(unet) is None


def test_unloading_an_adapter_takes_the_method_off_and_says_so(adapted):
    """It renews all processors, ours among them."""
    handle = dit_accel.accelerate(adapted.pipe, routing())
    with pytest.warns(UserWarning, match="BlockRoutingAttnProcessor is off"):
        adapted.pipe.unload_ip_adapter()
    found = {type(processor).__name__ for processor in adapted.root.attn_processors.values()}
    assert found == {"AttnProcessor2_0"} and dit_accel.acceleration_of(adapted.pipe) is None
    assert torch.isfinite(adapted.run()).all()
    handle.remove()
