"""Profiles of tiny pipelines, against scores worked out from recorded queries and keys; and the preset at work."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import WanTransformer3DModel

import dit_accel
from dit_accel.caching.presets.profiling import PerStack, ProfiledRuns, profiling
from dit_accel.caching.profiling import BlockProfile, Saliency, SubjectWords, profile_blocks
from dit_accel.caching.profiling.published import PUBLISHED
from dit_accel.caching.scopes.base import RootView
from dit_accel.caching.scopes.blocks import Runs
from dit_accel.controls import AttentionControl
from dit_accel.install import BlockHook

from ..conftest import build_tiny_wan
from ..seams.conftest import build_image_subject, build_subject, build_video_subject

LAYERS = 5


def wan(layers=LAYERS, variant="t2v"):
    """A tiny Wan of some blocks, whose inputs it knows."""
    torch.manual_seed(0)
    subject = build_subject(build_tiny_wan, variant)
    for name in ("transformer", "transformer_2"):
        root = subject.pipe.components.get(name)
        if root is not None:
            config = dict(root.config) | {"num_layers": layers}
            subject.pipe.register_modules(**{name: WanTransformer3DModel.from_config(config).eval()})
    return subject


class Keep(AttentionControl):
    """Keeps every query and key."""

    def __init__(self):
        super().__init__(kinds=("self", "joint"))
        self.calls = []

    def record(self, call, query, key, value, output):
        place = (call.state.step, call.state.branch, call.site.path)
        self.calls.append((*place, call.layout, query.clone(), key.clone()))


def worked_out(subject, path_of, truth):
    """Mean enrichment of each block, from every pair of tokens, frame by frame.

    ``truth[frame][place]`` says what is foreground.
    """
    keep = Keep()
    with dit_accel.accelerate(subject.pipe, controls=[keep]):
        subject.run(seed=3)
    found = {}
    for _, _, path, layout, query, key in keep.calls:
        weights = (query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        start, stop = layout.visual
        scores = weights[:, :, start:stop, start:stop].mean((1, 2)).unflatten(1, (layout.grid[0], -1))
        for item in scores:
            for frame, mask in zip(item.tolist(), truth, strict=True):
                size = sum(mask)
                high = sorted(range(len(frame)), key=lambda place: -frame[place])[:size]
                share = sum(mask[place] for place in high) / size
                found.setdefault(path_of(path), []).append(share / (size / len(mask)))
    return [sum(values) / len(values) for _, values in sorted(found.items())]


def half(frames, height, width):
    """The left half is foreground."""
    mask = torch.zeros(frames, height, width, dtype=torch.bool)
    mask[..., : width // 2] = True
    return mask


def profile(subject, prompts=None, **changes):
    """A profile of one generation with the noise of seed 3."""
    inputs = dict(subject.inputs)
    steps = inputs.pop("num_inference_steps")
    return profile_blocks(
        subject.pipe, prompts or [{}], **({"steps": steps, "seed": 3, "rows": 10**6} | inputs | changes)
    )


def test_scores_are_those_worked_out_from_every_pair():
    subject = wan()
    mask = half(3, 2, 2)
    made = profile(subject, mask=mask, budget=0.6)
    want = worked_out(subject, lambda path: int(path.split(".")[1]), mask.flatten(1).tolist())
    assert made.scores == pytest.approx(want, rel=1e-5) and len(set(want)) == LAYERS
    assert made.blocks == tuple(sorted(sorted(range(LAYERS), key=want.__getitem__)[:3]))
    assert (made.model, made.layers, made.method) == ("WanTransformer3DModel", LAYERS, "profile")
    assert made.settings["foreground_share"] == 0.5 and made.settings["calls"] == 8, "4 steps of two branches"
    assert made.settings["grids"] == [[3, 2, 2]] and made.by_expert == {}


def test_two_attentions_of_a_block_and_text_are_averaged_and_left_out():
    subject = build_image_subject("sd35")
    mask = half(1, 8, 6)
    made = profile(subject, mask=mask[0], budget=0.5)
    keep = Keep()
    with dit_accel.accelerate(subject.pipe, controls=[keep]):
        subject.run(seed=3)
    scores, want = {}, {}
    for step, branch, path, layout, query, key in keep.calls:
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        place = (step, branch, path.split(".")[1])
        scores.setdefault(place, []).append(weights[:, :, :48, : key.shape[2]].mean((1, 2))[:, slice(*layout.visual)])
    for (_, _, block), parts in scores.items():
        for item in torch.stack(parts).mean(0):
            high = item.topk(24).indices
            want.setdefault(block, []).append(float(mask.flatten()[high].float().mean()) / 0.5)
    assert made.scores == pytest.approx([sum(want[block]) / len(want[block]) for block in "01"], rel=1e-5)


class Finale:
    """A mask that keeps the scenes it was shown."""

    def __init__(self):
        self.scenes = []

    def __call__(self, scene):
        self.scenes.append(scene)
        mask = torch.zeros(scene.grid)
        mask[:, 0] = 1
        return mask


@pytest.mark.parametrize("name", ["wan", "i2v", "hunyuan", "flux", "sd3", "cogvideox"])
def test_the_denoised_latents_of_the_last_step_are_the_result(name):
    """An Euler step to sigma 0 from ``x`` along ``v`` ends at ``x - sigma v``."""
    if name in ("wan", "i2v"):
        subject = wan(2, "t2v" if name == "wan" else "i2v")
    else:
        subject = build_image_subject(name) if name in ("flux", "sd3") else build_video_subject(name)
    off = {"flux": "true_cfg_scale", "hunyuan": "true_cfg_scale"}.get(name, "guidance_scale")
    subject.inputs |= {off: 1.0}
    want = subject.run(seed=3)
    mask = Finale()
    profile(subject, mask=mask, budget=0.5)
    assert len(mask.scenes) == subject.inputs["num_inference_steps"], "one branch"
    found = mask.scenes[-1].denoised
    if name == "flux":
        want = want.transpose(1, 2).unflatten(2, mask.scenes[-1].grid)
    elif name == "cogvideox":
        want = want.transpose(1, 2)
    elif name == "sd3":
        want = want.unsqueeze(2)
    assert found.shape == want.shape and torch.allclose(found, want.float(), atol=1e-4)


def test_experts_are_averaged_and_told_apart():
    made = profile(wan(3, "two-experts"), mask=half(3, 2, 2))
    assert set(made.by_expert) == {"transformer", "transformer_2"}
    columns = zip(*made.by_expert.values(), strict=True)
    assert made.scores == pytest.approx([sum(scores) / 2 for scores in columns])


def test_a_profile_is_the_same_again_and_averages_over_prompts():
    subject = wan(3)
    prompts = ["a red circle", "a blue square"]
    texts = {"steps": 2, "prompt_embeds": None, "negative_prompt_embeds": None}
    both, again, first = (profile(subject, prompts=asked, **texts) for asked in (prompts, prompts, prompts[0]))
    assert both == again != first and both.settings["calls"] == 8
    assert both.settings["prompts"] == prompts and both.settings["mask"] == repr(Saliency())
    assert dit_accel.acceleration_of(subject.pipe) is None, "nothing stays on the pipeline"
    assert not subject.root._forward_hooks


def test_only_some_steps_branches_and_rows_are_looked_at():
    made = profile(wan(2), mask=half(3, 2, 2), at=[1, 3], branches=["cond"], rows=4)
    assert made.settings["calls"] == 2 and made.settings["rows"] == 4 and made.settings["at"] == [1, 3]


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_words_of_the_prompt_make_the_mask(name):
    subject = wan(2) if name == "wan" else build_image_subject("flux")
    made = profile(subject, mask=SubjectWords((1, 2)))
    assert 0 < made.settings["foreground_share"] < 1 and "words=(1, 2)" in made.settings["mask"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": torch.zeros(4, 4)}, "nothing was learned about transformer"),
        ({"at": [7]}, "nothing was learned about transformer"),
        ({"mask": torch.ones(2, 8, 8)}, "smaller than the token grid"),
        ({"budget": 1.0}, r"in \(0, 1\)"),
        ({"rows": 0}, "at least 1"),
        ({"prompts": [""]}, "no empty ones"),
        ({"mask": SubjectWords((999,))}, "give places from 0"),
    ],
)
def test_bad_settings_say_what_to_do(changes, words):
    subject = wan(2)
    with pytest.raises(ValueError, match=words):
        profile(subject, **changes)
    assert dit_accel.acceleration_of(subject.pipe) is None and not subject.root._forward_hooks


def test_images_refuse_masks_over_time_and_unets_have_no_stack():
    with pytest.raises(ValueError, match="makes images"):
        profile(build_image_subject("sd3"), mask=torch.ones(2, 8, 6))
    with pytest.raises(ValueError, match="spatial weight"):
        profile(build_image_subject("sd3"), mask=Saliency(spatial=0))
    with pytest.raises(ValueError, match="deepcache or tgate"):
        profile(build_image_subject("sd15"))


class Ran(BlockHook):
    """Which blocks computed something at which step: called inside the cache, outside the block's own code."""

    def __init__(self, root):
        self.steps, self._undo = [], []
        for index, block in enumerate(root.blocks):
            self._undo.append(block.attn1.register_forward_hook(lambda *_, at=index: self.steps.append(at)).remove)


@pytest.mark.parametrize("background", [(0,), (0, 1, 3), (1, 2, 4), tuple(range(LAYERS))])
def test_foreground_blocks_always_run_and_background_runs_hold_their_residual(background):
    """Also where a run starts at the first block, where the authors' code fails; against the loop of their paper."""
    subject = wan()
    subject.inputs |= {"num_inference_steps": 6, "guidance_scale": 1.0}
    cache = profiling(background, dense_steps=2, interval=3)
    ran = Ran(subject.root)
    with dit_accel.accelerate(subject.pipe, cache=cache):
        found = subject.run(seed=3)
    full, part = list(range(LAYERS)), [block for block in range(LAYERS) if block not in background]
    assert ran.steps == [block for step in range(6) for block in (full if step in (0, 1, 2, 5) else part)]
    assert torch.allclose(found, by_hand(wan(), background, computed=(0, 1, 2, 5)), atol=1e-5)


def by_hand(subject, background, computed):
    """The same generation with the blocks replaced by functions that keep ``out - in`` of each run."""
    subject.inputs |= {"num_inference_steps": 6, "guidance_scale": 1.0}
    root, step, kept, first = subject.root, [0], {}, {}
    root.register_forward_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for index, block in enumerate(root.blocks):
        begins, ends = index - 1 not in background, index + 1 not in background

        def forward(hidden, *args, stock=block.forward, index=index, begins=begins, ends=ends, **kwargs):
            if index not in background:
                return stock(hidden, *args, **kwargs)
            if begins:
                first[0] = hidden
            if step[0] in computed:
                hidden = stock(hidden, *args, **kwargs)
                if ends:
                    kept[index] = hidden - first[0]
                return hidden
            return first[0] + kept[index] if ends else hidden

        block.forward = forward
    return subject.run(seed=3)


def test_a_profile_becomes_a_cache_from_memory_and_from_its_file(tmp_path):
    subject = wan()
    made = profile(subject, mask=half(3, 2, 2), budget=0.4)
    made.save(tmp_path / "blocks.json")
    assert profiling(made) == profiling(tmp_path / "blocks.json") == profiling(str(tmp_path / "blocks.json"))
    with dit_accel.accelerate(subject.pipe, cache=profiling(made, dense_steps=1, interval=2, budget=0.8)):
        some = subject.run()
    blocks = made.with_budget(0.8).blocks
    with dit_accel.accelerate(subject.pipe, cache=profiling(blocks, dense_steps=1, interval=2)):
        assert torch.equal(subject.run(), some)
    assert not torch.equal(subject.run(), some)


def test_profiles_of_other_models_are_refused():
    subject = wan(4)
    made = profile(subject, mask=half(3, 2, 2))
    for other, words in (
        (wan(5), "and this one has 5"),
        (build_image_subject("sd3"), "not for a SD3Transformer2DModel"),
    ):
        with pytest.raises(ValueError, match=words):
            dit_accel.accelerate(other.pipe, cache=profiling(made))
        assert dit_accel.acceleration_of(other.pipe) is None
    with pytest.raises(ValueError, match="of 40 blocks"):
        dit_accel.accelerate(subject.pipe, cache=profiling("wan2.1-14b"))


def view(name, count):
    """A model of a name, with nothing in it."""
    root = type(name, (), {})()
    return RootView(root, name, tuple(f"blocks.{index}" for index in range(count)), (), False)


def test_published_lists_run_as_their_authors_say():
    wan14, hunyuan = profiling("wan2.1-14b"), profiling("hunyuan-video")
    units = wan14.scope.units(view("WanTransformer3DModel", 40))
    assert [(unit.first, unit.last) for unit in units] == [(0, 0), (2, 7), (10, 20), (25, 32), (37, 38)]
    runs = [(unit.first, unit.last) for unit in hunyuan.scope.units(view("HunyuanVideoTransformer3DModel", 60))]
    assert runs[0] == (6, 19) and runs[1] == (20, 20), "no run crosses from double blocks to single ones"
    assert sum(last - first + 1 for first, last in runs) == 38
    assert isinstance(hunyuan.policy, PerStack)
    double, single = (
        hunyuan.policy.judge(unit, 50) for unit in hunyuan.scope.units(view("HunyuanVideoTransformer3DModel", 60))[:2]
    )
    steps = range(6, 50)
    assert [step for step in steps if wants(double, step)] == [6, 12, 18, 24, 30, 36, 42, 48]
    assert [step for step in steps if wants(single, step)] == [6, 18, 26, 32, 38, 42, 46, 48]
    assert all(of.source for of in PUBLISHED.values())


def wants(judge, step):
    """Asks about a step alone."""
    from types import SimpleNamespace

    return judge.wants_compute(SimpleNamespace(step=step))


def test_two_stacks_with_schedules_of_their_own_run(monkeypatch):
    from dit_accel.caching.profiling.published import Published

    subject = build_video_subject("hunyuan")
    subject.inputs |= {"num_inference_steps": 10, "true_cfg_scale": 1.0}
    made = Published("HunyuanVideoTransformer3DModel", 3, (0, 1, 2), 1, (), 10, "a test")
    calls = []
    for index, (_, block) in enumerate(blocks_of(subject.root)):
        block.attn.register_forward_hook(lambda *_, at=index: calls.append(at))
    with dit_accel.accelerate(subject.pipe, cache=profiling(made, dense_steps=2, interval=3)):
        subject.run()
    shrinking = len({0, 1, *profiling(made, dense_steps=2).policy.rest.refresh_steps(10)})
    assert calls.count(0) == len([0, 1, 2, 5, 8]) and calls.count(1) == calls.count(2) == shrinking != 5


def blocks_of(root):
    """Double blocks, then single ones."""
    return [*root.transformer_blocks.named_children(), *root.single_transformer_blocks.named_children()]


def test_by_name_the_preset_knows_the_published_list_of_the_model():
    root = type("WanTransformer3DModel", (torch.nn.Module,), {})()
    root.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(40))
    assert profiling(root=root) == profiling("wan2.1-14b")
    root.blocks = root.blocks[:30]
    for given in ({}, {"root": root}):
        with pytest.raises(ValueError, match=r"needs background=.*wan2\.1-14b"):
            profiling(**given)


def test_presets_say_what_they_take():
    assert profiling([3, 1, 1]).scope == Runs((1, 3))
    made = BlockProfile("Toy", "0", 2, "profile", (1.0, 2.0), (0,))
    assert isinstance(profiling(made).scope, ProfiledRuns)
    for bad, words in (
        ({"background": "wan"}, "there are wan2.1-14b, hunyuan-video"),
        ({"background": []}, "at least one"),
        ({"background": [-1]}, "indices from 0"),
        ({"background": "nowhere.json"}, "there is no block profile"),
        ({"background": [1], "budget": 0.5}, "give a profile"),
        ({"background": made, "budget": 2}, r"in \(0, 1\)"),
        ({"background": [1], "schedule": "growing"}, "uniform, shrinking"),
        ({"background": [1], "interval": 0}, "every"),
    ):
        with pytest.raises(ValueError, match=words):
            profiling(**bad)
