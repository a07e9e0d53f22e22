"""What is special about HunyuanVideo: a mask at every call, which hides the padding of the text at the end."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import dit_accel
from dit_accel.families import hunyuan
from dit_accel.install import BoundProcessor
from dit_accel.kernels.sparse_plan import plan_from_blocks
from dit_accel.layout import TokenLayout
from dit_accel.processors import BlockRoutingAttnProcessor, StaticAttnProcessor

from .conftest import build_hunyuan

LARGE = {"height": 96, "width": 128, "num_inference_steps": 1}  # 144 video tokens, three blocks with the text
METHODS = ("radial", "neighborhood", "block_routing", "adaspa", "vmoba", "compensated", "grid", "cluster", "agent")


def shown(*lengths, words=10):
    """Mask of prompts with so many words."""
    return (torch.arange(words) < torch.tensor(lengths)[:, None]).long()


@pytest.fixture
def subject(make_video_subject):
    return make_video_subject("hunyuan")


class Notes(dit_accel.AttentionControl):
    """Notes the layout, the values and the output of every call."""

    def __init__(self, **selection):
        super().__init__(kinds=("joint",), **selection)
        self.layouts, self.values, self.outputs = [], [], []

    def record(self, call, query, key, value, output):
        assert query.shape[2] == key.shape[2] == call.layout.length
        self.layouts.append(call.layout)
        self.values.append(value.clone())
        self.outputs.append(output.clone())


class Blocks(StaticAttnProcessor):
    """Queries see the blocks at most ``width`` away; notes the layouts that it plans for."""

    block = 16

    def __init__(self, width, dense_steps=0):
        super().__init__(dense_steps=dense_steps)
        self.width, self.layouts = width, []

    def build_plan(self, layout, device):
        self.layouts.append(layout)
        index = torch.arange(-(-layout.length // self.block), device=device)
        keep = (index[:, None] - index).abs() <= self.width
        size = {"q_len": layout.length, "kv_len": layout.length, "block_q": self.block, "block_kv": self.block}
        return plan_from_blocks(keep, **size)

    def settings(self):
        return {"width": self.width}


class Routing(BlockRoutingAttnProcessor):
    """Searches once, in a dense call; notes the layouts that each site is set up for."""

    dense_first = True

    def __init__(self):
        super().__init__(block=64, amount=0.5, search_every=99, dense_steps=0, dense_layers=0)
        self.layouts = {}

    def set_up(self, site, layout, device):
        self.layouts.setdefault(site.path, []).append(layout)
        return super().set_up(site, layout, device)


# ---- where the tokens are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latents", "patch", "grid"),
    [((33, 90, 160), 1, (33, 45, 80)), ((1, 2, 6), 1, (1, 1, 3)), ((4, 6, 10), 2, (2, 3, 5))],
)
def test_grids(latents, patch, grid):
    """That of 129 frames at 720p, and small ones."""
    root = SimpleNamespace(config=SimpleNamespace(patch_size=2, patch_size_t=patch))
    tokens = grid[0] * grid[1] * grid[2]
    for text, wanted in ((256, (tokens, tokens + 256)), (0, None)):
        call = {"hidden_states": torch.zeros(1, 1, *latents), "encoder_hidden_states": torch.zeros(1, text, 8)}
        assert hunyuan.HUNYUAN.layout(root, call) == TokenLayout(grid, (0, tokens), text=wanted)


def test_the_ranges_are_where_video_text_and_padding_are(subject):
    """Other words change the values of the first block in the text range, other padding none but those of padding."""
    words, padding = (torch.zeros(1, 10, 32) for _ in range(2))
    words[:, :7], padding[:, 7:] = torch.randn(1, 7, 32), torch.randn(1, 3, 32)
    notes, prompt = Notes(layers=[0], branches=["cond"]), subject.inputs["prompt_embeds"]
    with dit_accel.accelerate(subject.pipe, controls=[notes]):
        for changes in ({}, {"prompt_embeds": prompt + words}, {"prompt_embeds": prompt + padding}):
            subject.run(num_inference_steps=1, **changes)
    assert notes.layouts == [TokenLayout((3, 4, 6), (0, 72), text=(72, 79), padding=3)] * 3
    first, *others = notes.values
    changed = [(first != other).any(dim=(0, 1, 3)).nonzero().flatten().tolist() for other in others]
    assert changed == [list(range(72, 82)), [79, 80, 81]]  # the refiner mixes words, and padding gets what it mixes


def test_the_refiner_stays_stock(subject):
    with dit_accel.accelerate(subject.pipe, controls=[Notes()]):
        found = {path: isinstance(each, BoundProcessor) for path, each in subject.root.attn_processors.items()}
    assert {path.split(".")[0] for path, bound in found.items() if not bound} == {"context_embedder"}
    assert sum(found.values()) == 3 and len(found) == 4


# ---- the mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "padding"),
    [
        (shown(7), 3),
        (shown(10), 0),
        (shown(7).bfloat16(), 3),
        (shown(7).bool(), 3),
        (shown(7, 7), 3),
        (shown(7, 4), None),
        (torch.tensor([[1, 1, 0, 1, 0]]), 2),  # the model counts, and hides as many at the end
        (shown(300, words=512).bfloat16(), 212),  # which bfloat16 cannot count
    ],
)
def test_padding_is_what_the_mask_hides(mask, padding):
    assert hunyuan.HUNYUAN.padding(None, {"encoder_attention_mask": mask}) == padding
    assert hunyuan.HUNYUAN.padding(None, {}) is None


@pytest.mark.parametrize("lengths", [(7,), (10,), (1,), (7, 7), (7, 4)])
def test_the_model_s_own_mask_is_that_padding(lengths, subject):
    """Read off the mask that its attention gets."""
    masks = []

    def see(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    handle = subject.root.transformer_blocks[0].attn.register_forward_pre_hook(see, with_kwargs=True)
    mask = shown(*lengths)
    batch = len(lengths)
    prompts = {"prompt_embeds": torch.randn(batch, 10, 32), "pooled_prompt_embeds": torch.randn(batch, 24)}
    subject.run(num_inference_steps=1, true_cfg_scale=1.0, prompt_attention_mask=mask, **prompts)
    handle.remove()
    padding = hunyuan.HUNYUAN.padding(None, {"encoder_attention_mask": mask})
    seen = masks[0].expand(batch, 1, 1, 82)[:, 0, 0]
    hidden = [torch.arange(82) >= 82 - count for count in (10 - length for length in lengths)]
    assert torch.equal(seen, ~torch.stack(hidden))
    assert (padding is None) == (len(set(lengths)) > 1)


def test_the_mask_is_read_once_and_again_when_written_to(monkeypatch):
    reads = []
    counted = hunyuan._count_padding
    monkeypatch.setattr(hunyuan._read_padding, "_read", lambda mask: reads.append(mask) or counted(mask))
    mask = shown(7)
    call = {"encoder_attention_mask": mask}
    assert [hunyuan.HUNYUAN.padding(None, call) for _ in range(3)] == [3] * 3
    assert len(reads) == 1
    mask[:, 5:] = 0
    assert hunyuan.HUNYUAN.padding(None, call) == 5


# ---- sparse methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [7, 10, 1])
def test_a_full_plan_is_dense_and_plans_leave_the_padding_out(subject, words):
    """Bits may differ; the mask costs time and the plan none, but both see the same tokens."""
    masks = {name: shown(words) for name in subject.inputs if "mask" in name}
    stock = subject.run(**LARGE, **masks)
    for width, same in ((99, True), (0, False)):
        recipe, notes = Blocks(width), Notes()
        with dit_accel.accelerate(subject.pipe, recipe, controls=[notes]) as handle:
            assert torch.allclose(subject.run(**LARGE, **masks), stock, atol=1e-5) is same
            report = handle.report()
        assert report.fallbacks == {} and all(site.sparse_calls == 2 for site in report.sites)
        assert recipe.layouts == [TokenLayout((3, 6, 8), (0, 144), text=(144, 144 + words))]
        assert {layout.padding for layout in notes.layouts} == {10 - words}
        for output in notes.outputs:
            assert output.shape[2] == 154 and not output[:, :, 144 + words :].any()
    assert torch.equal(subject.run(**LARGE, **masks), stock)


def test_the_padding_has_no_effect_on_a_sparse_video(subject):
    """Other padding, the same video: not so if a plan let anybody see it."""
    prompt = subject.inputs["prompt_embeds"]
    other = prompt.clone()
    other[:, 7:] = 100 * torch.randn(1, 3, 32)
    with dit_accel.accelerate(subject.pipe, Blocks(1)):
        assert torch.allclose(subject.run(**LARGE), subject.run(**LARGE, prompt_embeds=other), atol=1e-5)


def test_the_mass_recorder_leaves_the_padding_out(subject):
    recorder = dit_accel.AttentionMassRecorder(block=1, kinds=("joint",))
    with dit_accel.accelerate(subject.pipe, controls=[recorder]):
        subject.run()
    assert {masses.shape[1:] for masses in recorder.masses.values()} == {(79, 79)}


def test_each_branch_has_its_own_padding_and_one_generation(subject):
    recipe, notes = Blocks(99), Notes()
    masks = {"prompt_attention_mask": shown(7), "negative_prompt_attention_mask": shown(2)}
    stock = subject.run(**masks)
    with dit_accel.accelerate(subject.pipe, recipe, controls=[notes]) as handle:
        assert torch.allclose(subject.run(**masks), stock, atol=1e-5)
        assert (handle.clock.state.generation, handle.clock.state.step) == (0, 1)
    assert [layout.padding for layout in notes.layouts] == [*[3] * 3, *[8] * 3] * 2  # three sites, two branches
    assert [layout.text_tokens for layout in recipe.layouts] == [7, 2]  # each planned once


def test_calls_without_named_branches_are_one_generation(subject):
    """The pipelines for images name no branches; texts of different lengths must not look like other videos."""
    root = subject.root
    with dit_accel.accelerate(root, controls=[notes := Notes()]) as handle:
        for step in (900.0, 500.0):
            for words in (7, 2):
                call = {"timestep": torch.tensor([step]), "encoder_attention_mask": shown(words)}
                root(**inputs_of(root), **call)
        state = handle.clock.state
        assert (state.generation, state.step, state.branch) == (0, 1, "call1")
    assert [layout.padding for layout in notes.layouts[::3]] == [3, 8, 3, 8]


def test_texts_that_differ_in_length_are_one_generation(subject):
    """Not by their mask alone, but in the number of tokens: the layouts differ, the grid does not."""
    root, method, states = subject.root, Routing(), []
    calls = [
        {"encoder_hidden_states": torch.randn(1, words, 32), "encoder_attention_mask": shown(words, words=words)}
        for words in (10, 14)
    ]
    with dit_accel.accelerate(root, method) as handle, torch.no_grad():
        for step in (900.0, 500.0, 100.0):
            for call in calls:
                root(**inputs_of(root) | call, timestep=torch.tensor([step]))
                states.append(handle.clock.state)
        report = handle.report()
    wanted = [(0, step, branch) for step in range(3) for branch in ("call0", "call1")]
    assert [(state.generation, state.step, state.branch) for state in states] == wanted
    assert [state.layout.text_tokens for state in states] == [10, 14] * 3
    # Each branch searches at its first step, and follows its plan at the others.
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(4, 2)] * 3


def test_branches_of_different_words_are_set_up_once_each(subject):
    masks = {"prompt_attention_mask": shown(7), "negative_prompt_attention_mask": shown(2)}
    with dit_accel.accelerate(subject.pipe, method := Routing()):
        subject.run(**masks, num_inference_steps=3)
    assert len(method.layouts) == 3
    for layouts in method.layouts.values():
        assert [layout.text_tokens for layout in layouts] == [7, 2]


def inputs_of(root):
    """Of one call, but for timestep and mask."""
    return {
        "hidden_states": torch.randn(1, root.config.in_channels, 3, 8, 12),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "pooled_projections": torch.randn(1, 24),
        "guidance": torch.tensor([6000.0]),
    }


def test_texts_of_different_lengths_in_one_batch_run_dense_and_say_so(subject):
    prompts = {name: torch.randn(2, *part.shape[1:]) for name, part in subject.inputs.items() if "embeds" in str(name)}
    masks = {name: shown(7, 4) for name in subject.inputs if "mask" in name}
    stock = subject.run(**prompts | masks)
    with dit_accel.accelerate(subject.pipe, Blocks(0)) as handle, pytest.warns(UserWarning, match="passes a mask"):
        assert torch.equal(subject.run(**prompts | masks), stock)
        assert len(handle.report().fallbacks) == 3
        assert all(site.sparse_calls == 0 for site in handle.report().sites)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_never_sees_the_padding(subject, method):
    other = subject.inputs["prompt_embeds"].clone()
    other[:, 7:] = 100 * torch.randn(1, 3, 32)
    settings = {"block": 64} if method in ("radial", "block_routing", "compensated") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_accel.accelerate(subject.pipe, method, dense_steps=0, dense_layers=0, **settings) as handle:
            video = subject.run(**LARGE)
            again = subject.run(**LARGE, prompt_embeds=other)
            report = handle.report()
    assert report.fallbacks == {} and torch.isfinite(video).all()
    assert torch.allclose(video, again, atol=1e-4)


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_models_for_images(kind):
    """Other blocks, the same tokens."""
    torch.manual_seed(0)
    root = build_hunyuan(kind).root
    call = inputs_of(root) | {"timestep": torch.tensor([500.0]), "encoder_attention_mask": shown(7)}
    stock = root(**call).sample
    with dit_accel.accelerate(root, Blocks(99), controls=[notes := Notes()]):
        assert torch.allclose(root(**call).sample, stock, atol=1e-5)
    assert notes.layouts == [TokenLayout((3, 4, 6), (0, 72), text=(72, 79), padding=3)] * 3
    with dit_accel.accelerate(root, Blocks(0)):
        assert not torch.allclose(root(**call).sample, stock, atol=1e-5)
    assert torch.equal(root(**call).sample, stock)


def test_layouts_end_in_text_or_have_no_padding():
    layout = TokenLayout((1, 2, 3), (0, 6), text=(6, 9))
    assert layout.without_end(0) is layout
    assert layout.without_end(2) == TokenLayout((1, 2, 3), (0, 6), text=(6, 7))
    assert layout.without_end(3) == TokenLayout.video_only((1, 2, 3))
    for wrong in (layout, TokenLayout((1, 2, 3), (4, 10), text=(0, 4)), TokenLayout.video_only((1, 2, 3))):
        with pytest.raises(ValueError, match=r"last 4 tokens of .* are not all text"):
            wrong.without_end(4)
