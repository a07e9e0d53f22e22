"""Installing changes nothing by itself, and removing leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel import AttentionMassRecorder, BlockRecorder
from dit_accel.install import BoundProcessor
from dit_accel.processors import BlockRoutingAttnProcessor, RadialAttnProcessor


def everything_on(pipe):
    return dit_accel.accelerate(
        pipe,
        RadialAttnProcessor(block=64, dense_steps=0, dense_layers=0),
        controls=[AttentionMassRecorder(4, kinds=("self", "cross"))],
        block_hooks=[BlockRecorder()],
    )


def state_of(pipe) -> dict:
    """Whatever an installation could leave behind on a root or its modules."""
    roots = {name: part for name, part in pipe.components.items() if name.startswith("transformer") and part}
    return {
        name: {
            "class": type(root),
            "processors": {path: id(processor) for path, processor in root.attn_processors.items()},
            "attributes": {path: sorted(vars(module)) for path, module in root.named_modules()},
            "hooks": (len(root._forward_pre_hooks), len(root._forward_hooks)),
        }
        for name, root in roots.items()
    }


def test_watching_alone_is_bit_equal(subject):
    stock = subject.run()
    with dit_accel.accelerate(
        subject.pipe, controls=[AttentionMassRecorder(4, kinds=("self", "cross"))], block_hooks=[BlockRecorder()]
    ):
        assert torch.equal(subject.run(), stock)


def test_removal_restores_output_and_objects(subject):
    stock, before = subject.run(), state_of(subject.pipe)
    handle = everything_on(subject.pipe)
    assert state_of(subject.pipe) != before
    subject.run()
    handle.remove()
    handle.remove()
    assert state_of(subject.pipe) == before
    assert torch.equal(subject.run(), stock)


def test_removal_after_an_error_inside_the_model(t2v):
    stock, before = t2v.run(), state_of(t2v.pipe)

    class Failing(dit_accel.AttentionControl):
        def after(self, call, output):
            if call.state.step == 2:
                raise ArithmeticError("in mid-generation")
            return output

    with pytest.raises(ArithmeticError), dit_accel.accelerate(t2v.pipe, controls=[Failing()]):
        t2v.run()
    assert state_of(t2v.pipe) == before
    assert torch.equal(t2v.run(), stock)


def test_run_after_an_error_equals_a_fresh_run(t2v):
    """With a method that follows what it found at earlier steps."""
    size = {"height": 96, "width": 128}  # several blocks of 64 tokens
    method = BlockRoutingAttnProcessor(block=64, amount=0.5, search_every=3, dense_steps=0, dense_layers=0)
    fail_at = []

    class Failing(dit_accel.AttentionControl):
        def after(self, call, output):
            if call.state.step in fail_at:
                raise ArithmeticError("in mid-generation")
            return output

    with dit_accel.accelerate(t2v.pipe, method, controls=[Failing(), AttentionMassRecorder(4)]) as handle:
        expected = t2v.run(**size)
        assert handle.report().density < 1
    fail_at.append(2)
    recorder = AttentionMassRecorder(4)
    with dit_accel.accelerate(t2v.pipe, method, controls=[Failing(), recorder]) as handle:
        with pytest.raises(ArithmeticError):
            t2v.run(**size)
        fail_at.clear()
        recorder.masses.clear()
        assert torch.equal(t2v.run(**size), expected)
        assert sorted({step for _, _, step, _ in recorder.masses}) == [0, 1, 2, 3]
        assert handle.clock.state.generation == 1


@pytest.mark.parametrize("kept", [True, False])
def test_what_diffusers_sets_on_processors_outlives_removal(t2v, kept):
    """``enable_parallelism`` and ``set_attention_backend`` set it on those that they find, which are ours."""
    config, before = object(), state_of(t2v.pipe)
    with everything_on(t2v.pipe):
        for processor in t2v.root.attn_processors.values():
            processor._parallel_config, processor._attention_backend = config, "native"
            if not kept:
                processor._parallel_config = processor._attention_backend = None
    assert state_of(t2v.pipe) == before
    found = {(each._parallel_config, each._attention_backend) for each in t2v.root.attn_processors.values()}
    assert found == ({(config, "native")} if kept else {(None, None)})
    with everything_on(t2v.pipe):
        assert found == {
            (each._parallel_config, each._attention_backend) for each in t2v.root.attn_processors.values()
        }


def test_stock_processors_without_such_settings_get_none(make_image_subject):
    sd = make_image_subject("sd15")
    with dit_accel.accelerate(sd.pipe, "neighborhood", block=64):
        for processor in sd.root.attn_processors.values():
            processor._attention_backend = "native"
    assert not any(hasattr(each, "_attention_backend") for each in sd.root.attn_processors.values())


def test_class_of_a_bound_processor_makes_fresh_stock_processors(t2v):
    """The loaders of IP-Adapters in diffusers renew by it what they leave alone."""
    stock = t2v.run()
    with everything_on(t2v.pipe) as handle:
        found = t2v.root.attn_processors
        renewed = {name: type(each)() for name, each in found.items()}
        assert all(type(each) is type(found[name].stock) for name, each in renewed.items())
        assert all(each is not found[name].stock for name, each in renewed.items())
        t2v.root.set_attn_processor(renewed)
        assert torch.equal(t2v.run(), stock)
        handle.remove()
    assert torch.equal(t2v.run(), stock)
    with pytest.raises(TypeError, match="stock"):
        BoundProcessor()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_bound_processor_are_bound(t2v, copied):
    with everything_on(t2v.pipe):
        bound = t2v.root.blocks[0].attn1.processor
        bound._attention_backend = "native"
        twin = copied(bound)
        assert type(twin) is type(bound) and twin is not bound and twin._attention_backend == "native"
        assert (twin.site is bound.site) is (copied is copy.copy)


def test_failed_installation_leaves_nothing(two_experts, monkeypatch):
    before = state_of(two_experts.pipe)

    class Foreign:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return hidden_states

    foreign = Foreign()
    monkeypatch.setattr(two_experts.pipe.transformer_2.blocks[1].attn1, "processor", foreign)
    with pytest.raises(TypeError, match=r"Foreign at blocks\.1\.attn1"):
        everything_on(two_experts.pipe)
    monkeypatch.undo()
    assert state_of(two_experts.pipe) == before


def test_one_pipeline_does_not_touch_another(make_tiny_wan, t2v):
    other = make_tiny_wan(0).transformer
    with everything_on(t2v.pipe):
        assert not any(isinstance(processor, BoundProcessor) for processor in other.attn_processors.values())


def test_second_installation_is_refused(t2v):
    with everything_on(t2v.pipe), pytest.raises(ValueError, match="accelerated already"):
        everything_on(t2v.pipe)


def test_unknown_model_says_how_to_register_it():
    class NewTransformer(nn.Module):
        pass

    with pytest.raises(dit_accel.UnknownModelError, match=r"NewTransformer.*register_family"):
        dit_accel.accelerate(NewTransformer(), "radial")


@pytest.mark.parametrize("target", [object(), {}, None])
def test_not_a_model_at_all(target):
    with pytest.raises(dit_accel.UnknownModelError, match="neither a diffusers pipeline nor a model"):
        dit_accel.accelerate(target, "radial")


@pytest.mark.parametrize(
    ("attention", "settings", "message"),
    [
        ("radiant", {}, "choose one of radial"),
        ("radial", {"blocks": 64}, "unexpected keyword argument 'blocks'"),
        ("radial", {"block": 32}, "64 or 128"),
        ("radial", {"rule": "rules"}, "rule"),
        (3, {}, "dit_accel processor"),
        (None, {"block": 64}, "method given by name"),
    ],
)
def test_bad_settings_are_explained(t2v, attention, settings, message):
    with pytest.raises(ValueError, match=message):
        dit_accel.accelerate(t2v.pipe, attention, **settings)


def test_deepcopy_of_an_accelerated_model_is_independent(t2v):
    size = {"height": 240, "width": 208, "num_inference_steps": 2}  # several blocks of 64 tokens
    stock = t2v.run(**size)
    recorder = AttentionMassRecorder(64)
    handle = dit_accel.accelerate(t2v.pipe, "radial", controls=[recorder], block=64, dense_steps=0, dense_layers=0)
    accelerated = t2v.run(**size)
    twin = copy.deepcopy(t2v.pipe.transformer)
    handle.remove()
    t2v.pipe.transformer = twin
    assert torch.equal(t2v.run(**size), accelerated) and not torch.equal(accelerated, stock)


def test_a_foreign_processor_put_later_is_reported(t2v):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    with everything_on(t2v.pipe) as handle:
        t2v.pipe.transformer.blocks[0].attn1.processor = WanAttnProcessor()
        t2v.run()
        assert "another attention processor" in handle.report().fallbacks["transformer:blocks.0.attn1"]
    assert type(t2v.pipe.transformer.blocks[0].attn1.processor) is WanAttnProcessor


def test_gradient_checkpointing_is_refused_with_a_way_out(t2v):
    """Blocks would be recomputed dense, after the call whose plans they followed."""
    channels = t2v.root.config.in_channels
    inputs = {
        "hidden_states": torch.randn(1, channels, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, t2v.root.config.text_dim),
    }
    t2v.root.enable_gradient_checkpointing()
    with dit_accel.accelerate(t2v.root, "radial", block=64, dense_steps=0, dense_layers=0) as handle:
        handle.clock.set_step(0, 1)
        with pytest.raises(NotImplementedError, match="disable_gradient_checkpointing"):
            t2v.root(**inputs)
        with torch.no_grad():
            t2v.root(**inputs)
        t2v.root.disable_gradient_checkpointing()
        t2v.root(**inputs).sample.sum().backward()
    assert all(site.sparse_calls == 2 for site in handle.report().sites)
