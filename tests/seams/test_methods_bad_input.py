"""Methods on models where they cannot act, and settings that fit nothing: refused, naming what is accepted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel, WanTransformer3DModel
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel.controls import SiteInfo
from dit_accel.families import registry
from dit_accel.families.wan import WAN
from dit_accel.install import BoundProcessor
from dit_accel.layout import TokenLayout
from dit_accel.processors import ATTENTION, DynamicAttnProcessor, StaticAttnProcessor, processor_by_name

WITH_PLANS = [n for n, kind in ATTENTION.items() if issubclass(kind, (StaticAttnProcessor, DynamicAttnProcessor))]
EVERY = (*(name for name in ATTENTION if name != "learned_gate"), "auto")  # gates fit one model, and say so first


@pytest.fixture
def families(monkeypatch):
    """Registers families for one test."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    return dit_accel.register_family


class CrossOnly(WanTransformer3DModel):
    """Its self-attention is nothing that methods know."""


def tiny_sana():
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    ).eval()


def sana_layout(root, arguments):
    return TokenLayout.video_only((1, *arguments["hidden_states"].shape[-2:]))


class ByPath:
    """Reaches attention by no name that leads to it, though it uses ``F`` for something else."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mixed = torch.nn.functional.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)
        return F.dropout(mixed, 0.0)[:, 0]


class ByName:
    """Has the function itself."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return scaled_dot_product_attention(*[F.dropout(hidden_states, 0.0)[:, None]] * 3)[:, 0]


class ByOwnImport:
    """Imports the module, or diffusers' function, when it runs."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        import torch.nn.functional as F
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if rotary_emb is None:
            return F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]
        return dispatch_attention_fn(*[hidden_states[:, :, None]] * 3)[:, :, 0]


class ByGlobals:
    """As they should be."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]


def processors_of(root):
    return [type(module.processor) for module in root.modules() if hasattr(module, "processor")]


@pytest.mark.parametrize("method", EVERY)
def test_models_with_cross_attention_alone_are_refused(t2v, families, method):
    def only_cross(path, module):
        return "cross" if path.endswith(".attn2") else None

    families(replace(WAN, root_class="CrossOnly", site_kind=only_cross))
    model = CrossOnly.from_config(dict(t2v.root.config))
    before = processors_of(model)
    with pytest.raises(ValueError, match=r"acts on self and joint attention, and CrossOnly has 2 cross-attention mod"):
        dit_accel.accelerate(model, method)
    assert processors_of(model) == before and dit_accel.acceleration_of(model) is None
    recorder = dit_accel.AttentionMassRecorder(16, kinds=("cross",))
    with dit_accel.accelerate(model, controls=[recorder]):  # controls can act there
        assert any(issubclass(kind, BoundProcessor) for kind in processors_of(model))


@pytest.mark.parametrize("method", EVERY)
def test_linear_attention_is_refused(families, method):
    model = tiny_sana()
    before = processors_of(model)
    with pytest.raises(ValueError, match="SanaTransformer2DModel is not a model dit_accel knows"):
        dit_accel.accelerate(model, method)
    linear = "SanaLinearAttnProcessor2_0 at transformer_blocks.0.attn1 is linear attention"
    for kind, words in (("self", linear), (None, "2 cross-attention modules only")):
        families(
            dit_accel.Family(
                "SanaTransformer2DModel",
                sana_layout,
                lambda path, module, kind=kind: "cross" if path.endswith("attn2") else kind,
                ("transformer_blocks",),
                makes_video=True,  # so that no method refuses it for that
            )
        )
        with pytest.raises(ValueError, match=words):
            dit_accel.accelerate(model, method)
        assert processors_of(model) == before


@pytest.mark.parametrize("kind", [ByPath, ByName, ByOwnImport])
def test_processors_that_cannot_be_redirected_are_refused(t2v, kind):
    """They would run dense, and be reported as sparse."""
    t2v.root.blocks[1].attn1.processor = kind()
    before = processors_of(t2v.root)
    with pytest.raises(TypeError, match=rf"{kind.__name__} at blocks\.1\.attn1 .* cannot be redirected"):
        dit_accel.accelerate(t2v.pipe, "radial")
    assert processors_of(t2v.root) == before


def test_processors_of_ones_own_that_use_global_names_are_redirected(t2v):
    t2v.root.blocks[1].attn1.processor = ByGlobals()
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0) as handle:
        t2v.run()
        assert all(site.dense_calls == 0 and site.sparse_calls for site in handle.report().sites)


@pytest.mark.parametrize("method", [name for name in ATTENTION if "density" in ATTENTION[name]().settings()])
@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.1, 2, float("nan"), float("inf"), "half", True])
def test_densities_lie_above_0_and_at_most_at_1(method, density):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        processor_by_name(method, density=density)
    processor_by_name(method, density=1.0)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("neighborhood", {"window": 0}, r"\(0, 1\]"),
        ("neighborhood", {"window": 1.5}, r"\(0, 1\]"),
        ("neighborhood", {"window": 4, "stride": 5}, "stride of 1 to 4"),
        ("neighborhood", {"window": (2, 4, 4), "stride": (3, 1, 1)}, "1 to 2"),
        ("block_routing", {"amount": 1.5}, r"\(0, 1\]"),
        ("block_routing", {"amount": 0.0}, r"\(0, 1\]"),
        ("block_routing", {"select": "top_p", "amount": 1.5}, r"\(0, 1\]"),
        ("vmoba", {"amount": 1.5}, r"\(0, 1\]"),
        ("vmoba", {"amount": 0}, r"\(0, 1\]"),
        ("adaspa", {"recall": 1.5}, r"\(0, 1\]"),
        ("adaspa", {"recall": 0}, r"\(0, 1\]"),
        ("radial", {"decay": 0}, "decay"),
        ("radial", {"decay": float("nan")}, "decay"),
        ("agent", {"merge": 1.0}, r"\[0, 1\)"),
        ("agent", {"agent_ratio": 1.5}, r"\[0, 1\]"),
    ],
)
def test_settings_that_fit_nothing_name_what_does(method, settings, words):
    with pytest.raises(ValueError, match=words):
        processor_by_name(method, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": (9, 4, 4)}, "1 to 4"),
        ({"window": (2, 16, 4)}, "1 to 15"),
        ({"window": (2, 4, 14)}, "1 to 13"),
        ({"window": 0.3, "stride": 4}, "stride"),  # 2 of 4 frames
    ],
)
def test_windows_larger_than_the_grid_are_refused_by_the_first_call(t2v, settings, words):
    size = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens
    with (
        dit_accel.accelerate(t2v.pipe, "neighborhood", dense_steps=0, **settings),
        pytest.raises(ValueError, match=words),
    ):
        t2v.run(**size)


@pytest.mark.parametrize("method", [name for name in ATTENTION if "block" in ATTENTION[name]().settings()])
@pytest.mark.parametrize("block", [0, -64, 96, "64"])
def test_blocks_are_64_or_128(method, block):
    with pytest.raises(ValueError, match="64"):
        processor_by_name(method, block=block)


@pytest.mark.parametrize("method", ATTENTION)
@pytest.mark.parametrize(
    ("name", "value"), [("dense_steps", -1), ("dense_steps", 1.5), ("dense_layers", -1), ("no_such", 1)]
)
def test_common_settings_are_checked_by_all(method, name, value):
    with pytest.raises(ValueError, match=name):
        processor_by_name(method, **{name: value})


@pytest.mark.parametrize("method", WITH_PLANS)
def test_padding_tokens_are_refused(method):
    """Nobody must see them, and no plan can tell them from others."""
    layout = replace(TokenLayout.video_only((2, 8, 8)), padding=8)
    recipe, site = ATTENTION[method](), SiteInfo("blocks.0.attn1", "self", 0, 2, "transformer")
    with pytest.raises(ValueError, match="padding"):
        if isinstance(recipe, StaticAttnProcessor):
            recipe.for_site(site).build_plan(layout, torch.device("cpu"))
        else:
            recipe.set_up(site, layout, torch.device("cpu"))


def test_what_does_not_fit_the_layout_is_refused_before_the_dense_steps(t2v):
    ran = []
    hook = t2v.root.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with (
        dit_accel.accelerate(t2v.pipe, "neighborhood", dense_steps=3, window=(9, 9, 9)),
        pytest.raises(ValueError, match="window"),
    ):
        t2v.run()
    hook.remove()
    assert ran == []


def test_what_a_search_needs_is_made_before_the_dense_steps(t2v, monkeypatch):
    def refuse(self, site, layout, device):
        raise ValueError("this layout does not fit")

    monkeypatch.setattr(ATTENTION["block_routing"], "set_up", refuse)
    for dense, words in ((3, "does not fit"), (4, None)):  # of 4 steps
        with dit_accel.accelerate(t2v.pipe, "block_routing", dense_steps=dense):
            if words is None:
                t2v.run()
                continue
            with pytest.raises(ValueError, match=words):
                t2v.run()
