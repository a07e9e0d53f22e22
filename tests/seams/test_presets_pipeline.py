"""Presets and ``attention="auto"`` on whole pipelines: what runs, what is reported, and that nothing leaks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.presets import PRESETS, AutoAttnProcessor, auto, lookup
from dit_accel.processors import ATTENTION, RadialAttnProcessor

ODD = {"height": 240, "width": 208, "num_frames": 13, "num_inference_steps": 5}  # 4 x 15 x 13 tokens
FRAME = ODD | {"num_frames": 1}
SETTINGS = {"dense_steps": 1, "dense_layers": 0}


@pytest.fixture
def pays(monkeypatch):
    """Makes tiny models worth it."""
    monkeypatch.setattr(auto, "PAYS", 0.0)
    monkeypatch.setattr(auto, "FEW_STEPS", 5)


@pytest.fixture
def tiny_presets(monkeypatch):
    """Publishes settings for the tiny Wan, alone and with two experts."""
    config = {"num_layers": 2, "num_attention_heads": 2}
    one = next(preset for preset in PRESETS if (preset.method, preset.name) == ("radial", "wan2.1-14b"))
    one = replace(one, name="tiny", config=config, settings={"decay": 0.3, "dense_steps": 1})
    two = replace(one, name="tiny-two", experts=2, settings={"decay": 0.4})
    sol = replace(one, method="compensated", settings={"tau": 1.5})
    monkeypatch.setattr(lookup, "PRESETS", (one, two, sol))


def choices_of(handle):
    return {expert: choice.method for expert, choice in handle.report().choices.items()}


@pytest.mark.usefixtures("tiny_presets")
def test_a_model_gets_its_preset_by_itself(t2v):
    with dit_accel.accelerate(t2v.pipe, "radial", block=64) as handle:
        assert {"decay": 0.3, "dense_steps": 1, "block": 64}.items() <= handle.processor.settings().items()
        t2v.run(**ODD)
        report = handle.report()
        assert all(site.dense_calls == 2 for site in report.sites if "blocks.1" in site.path)
    assert report.preset.startswith("tiny (Radial Attention, arXiv 2506.19852") and "but for" not in report.preset
    assert report.preset in report.summary() and report.preset in repr(handle)
    assert json.loads(json.dumps(report.to_dict()))["preset"] == report.preset


@pytest.mark.usefixtures("tiny_presets")
def test_two_experts_are_another_model(two_experts):
    with dit_accel.accelerate(two_experts.pipe, "radial", decay=0.9) as handle:
        assert handle.processor.decay == 0.9
        assert handle.report().preset.startswith("tiny-two (") and "but for decay" in handle.report().preset
    with dit_accel.accelerate(two_experts.pipe, "radial") as handle:
        assert handle.processor.decay == 0.4
    with dit_accel.accelerate(two_experts.pipe, "radial", preset="tiny") as handle:  # one that is not meant for it
        assert handle.processor.decay == 0.3


@pytest.mark.usefixtures("tiny_presets")
def test_presets_can_be_left_out_and_never_touch_a_processor(t2v):
    usual = RadialAttnProcessor().settings()
    with dit_accel.accelerate(t2v.pipe, "radial", preset=None) as handle:
        assert handle.processor.settings() == usual and handle.report().preset is None
        assert "preset" not in handle.report().summary()
    mine = RadialAttnProcessor()
    with dit_accel.accelerate(t2v.pipe, mine) as handle:
        assert handle.processor is mine and mine.settings() == usual and handle.report().preset is None
    with pytest.raises(ValueError, match=r"\['preset'\] belong to a method given by name"):
        dit_accel.accelerate(t2v.pipe, mine, preset="tiny")
    with pytest.raises(ValueError, match="radial has no preset 'huge'; those that fit this model: tiny; for other"):
        dit_accel.accelerate(t2v.pipe, "radial", preset="huge")


def test_models_without_a_preset_run_as_before(t2v):
    with dit_accel.accelerate(t2v.pipe, "radial") as handle:
        assert handle.processor.settings() == RadialAttnProcessor().settings() and handle.report().preset is None


def test_auto_leaves_small_videos_dense_and_says_why(t2v):
    size = ODD | {"num_inference_steps": 10}
    stock = t2v.run(**size)
    with dit_accel.accelerate(t2v.pipe, "auto") as handle:
        assert handle.report().choices == {}  # nothing ran yet
        assert torch.equal(t2v.run(**size), stock)
        report = handle.report()
    choice = report.choices["transformer"]
    assert choice.method == "dense" and "780 tokens" in choice.reason and "would not pay" in choice.reason
    assert choice.reason in report.summary() and report.density == 1 and report.backend is None
    assert json.loads(json.dumps(report.to_dict()))["choices"]["transformer"]["method"] == "dense"


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize(
    ("name", "method"), [("wan", "compensated"), ("flux", "block_routing"), ("sd3", "block_routing")]
)
def test_auto_runs_what_it_chose(t2v, make_image_subject, name, method):
    subject = t2v if name == "wan" else make_image_subject(name)
    size = ODD if name == "wan" else {"height": 30, "width": 32, "num_inference_steps": 5}
    stock = subject.run(**size)
    with dit_accel.accelerate(subject.pipe, method, **SETTINGS):
        expected = subject.run(**size)
    assert not torch.equal(expected, stock)
    with dit_accel.accelerate(subject.pipe, "auto", **SETTINGS) as handle:
        assert torch.equal(subject.run(**size), expected)
        report = handle.report()
    choice = report.choices["transformer"]
    assert choice.method == method and choice.recipe.startswith(ATTENTION[method].__name__)
    assert choice.recipe in report.summary() and report.density < 1 and report.backend == "gather"
    assert 0 < report.plan_density < 1
    assert torch.equal(subject.run(**size), stock)  # and it is removed


@pytest.mark.usefixtures("pays", "tiny_presets")
def test_auto_gives_the_preset_of_what_it_chose(t2v):
    with dit_accel.accelerate(t2v.pipe, "auto", **SETTINGS) as handle:
        t2v.run(**ODD)
        choice = handle.report().choices["transformer"]
        assert "tau=1.5" in choice.recipe and choice.preset.startswith("tiny (")
        assert choice.preset in handle.report().summary()
    with dit_accel.accelerate(t2v.pipe, "auto", preset=None, **SETTINGS) as handle:
        t2v.run(**ODD)
        choice = handle.report().choices["transformer"]
        assert "tau=1.0" in choice.recipe and choice.preset is None


def test_auto_on_a_unet(make_image_subject, monkeypatch):
    subject = make_image_subject("sd15")
    size = {"num_inference_steps": 10}
    stock = subject.run(**size)
    with dit_accel.accelerate(subject.pipe, "auto") as handle:
        assert torch.equal(subject.run(**size), stock)
        choice = handle.report().choices["unet"]
        assert choice.method == "dense" and "117 at most" in choice.reason
    monkeypatch.setattr(auto, "AGENT_TOKENS", 100)
    with dit_accel.accelerate(subject.pipe, "agent"):
        expected = subject.run(**size)
    with dit_accel.accelerate(subject.pipe, "auto") as handle:
        assert torch.equal(subject.run(**size), expected) and not torch.equal(expected, stock)
        assert choices_of(handle) == {"unet": "agent"}
        assert any(site.sparse_calls for site in handle.report().sites)


@pytest.mark.usefixtures("pays")
def test_every_generation_may_choose_anew_and_none_changes_on_the_way(t2v, monkeypatch):
    stock, few = t2v.run(**ODD), t2v.run(**ODD | {"num_inference_steps": 4})
    asked = []
    choose = AutoAttnProcessor.for_situation

    def watched(self, at):
        asked.append((at.layout.grid, at.steps))
        return choose(self, at)

    monkeypatch.setattr(AutoAttnProcessor, "for_situation", watched)
    with dit_accel.accelerate(t2v.pipe, "auto", **SETTINGS) as handle:
        first = t2v.run(**ODD)
        recipe = handle._choices["transformer"].choice.recipe
        assert choices_of(handle) == {"transformer": "compensated"} and asked == [((4, 15, 13), 5)]
        assert torch.equal(t2v.run(**ODD), first)
        assert len(asked) == 1 and handle._choices["transformer"].choice.recipe is recipe  # the same once more
        t2v.run(**FRAME)
        assert choices_of(handle) == {"transformer": "block_routing"} and asked[1:] == [((1, 15, 13), 5)]
        assert torch.equal(t2v.run(**ODD | {"num_inference_steps": 4}), few)
        assert choices_of(handle) == {"transformer": "dense"} and len(asked) == 3
        assert handle.report().backend is None
        assert torch.equal(t2v.run(**ODD), first)  # nothing of the others is left
        assert len(asked) == 4 and handle.report().backend == "gather"
    assert torch.equal(t2v.run(**ODD), stock)


@pytest.mark.usefixtures("pays")
def test_every_expert_has_a_choice_of_its_own(two_experts):
    with dit_accel.accelerate(two_experts.pipe, "compensated", **SETTINGS):
        expected = two_experts.run(**ODD)
    with dit_accel.accelerate(two_experts.pipe, "auto", **SETTINGS) as handle:
        assert torch.equal(two_experts.run(**ODD), expected)
        assert choices_of(handle) == {"transformer": "compensated", "transformer_2": "compensated"}


@pytest.mark.usefixtures("pays")
def test_the_backend_is_that_of_the_expert_that_is_not_dense(two_experts, monkeypatch):
    choose = AutoAttnProcessor.for_situation
    monkeypatch.setattr(
        AutoAttnProcessor,
        "for_situation",
        lambda self, at: choose(self, replace(at, steps=at.steps if expert_of(at) == {"transformer"} else 1)),
    )
    with dit_accel.accelerate(two_experts.pipe, "auto", **SETTINGS) as handle:
        two_experts.run(**ODD)
        assert choices_of(handle) == {"transformer": "compensated", "transformer_2": "dense"}
        assert handle.report().backend == "gather"


def expert_of(at):
    return {site.expert for site in at.sites}


def test_a_backend_that_cannot_run_is_refused_at_once(t2v):
    with pytest.raises(ValueError, match="the triton backend cannot run here"):
        dit_accel.accelerate(t2v.pipe, "auto", backend="triton")
    assert dit_accel.acceleration_of(t2v.pipe) is None


@pytest.mark.usefixtures("pays")
def test_auto_leaves_a_unet_dense_where_agents_reach_no_attention(make_image_subject, monkeypatch):
    """Its finest attention is on the way down of a lower level, as that of Stable Diffusion XL."""
    monkeypatch.setattr(auto, "AGENT_TOKENS", 100)
    subject = make_image_subject("sd15")
    stock = subject.run(num_inference_steps=10)
    with dit_accel.accelerate(subject.pipe, "auto") as handle:
        sites = handle._installed[0].sites.values()
        for site in sites:  # only the way up attends at the full resolution
            path = site.info.path.replace("down_blocks.0", "down_blocks.1")
            site.info = replace(site.info, path=path)
        assert torch.equal(subject.run(num_inference_steps=10), stock)
        choice = handle.report().choices["unet"]
        assert choice.method == "dense" and "use max_downsample=2 or more" in choice.reason


@pytest.mark.usefixtures("pays")
def test_auto_is_a_processor_like_any_other(t2v):
    stock = t2v.run(**ODD)
    t2v.pipe.set_attn_processor(AutoAttnProcessor(**SETTINGS))
    changed = t2v.run(**ODD)
    assert choices_of(dit_accel.acceleration_of(t2v.pipe)) == {"transformer": "compensated"}
    dit_accel.acceleration_of(t2v.pipe).remove()
    assert not torch.equal(changed, stock) and torch.equal(t2v.run(**ODD), stock)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo", "pays")
def test_auto_compiles_like_the_method_it_chose(t2v):
    counter = CompileCounter()
    with dit_accel.accelerate(t2v.pipe, "auto", **SETTINGS) as handle:
        eager = t2v.run(**ODD)
        expected = handle.report()
        t2v.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(t2v.run(**ODD), eager)
        assert handle.report() == expected
        assert counter.frame_count == 2  # a dense step, and searching ones
