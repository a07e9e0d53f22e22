"""The way people know: ``set_attn_processor`` on pipelines and models."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel.install import BoundProcessor
from dit_accel.processors import BlockRoutingAttnProcessor, RadialAttnProcessor


def radial(**settings) -> RadialAttnProcessor:
    return RadialAttnProcessor(block=64, dense_steps=0, dense_layers=0, **settings)


@contextlib.contextmanager
def offloaded(model):
    """Parameters are on no device but while the model's forward runs, as accelerate's hooks have it."""
    real = dict(model.named_parameters())
    stock = model.forward

    def place(found):
        for name, parameter in found.items():
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._parameters[last] = parameter

    away = {name: torch.nn.Parameter(parameter.to("meta")) for name, parameter in real.items()}

    def forward(*args, **kwargs):
        place(real)
        try:
            return stock(*args, **kwargs)
        finally:
            place(away)

    model.forward = forward
    place(away)
    try:
        yield
    finally:
        del model.forward
        place(real)


def kinds_of(model) -> set[bool]:
    return {isinstance(processor, BoundProcessor) for processor in model.attn_processors.values()}


def test_on_a_pipeline_reaches_every_expert(subject):
    subject.pipe.set_attn_processor(radial())
    for name in ("transformer", "transformer_2"):
        model = subject.pipe.components.get(name)
        assert model is None or kinds_of(model) == {True}
    subject.run()
    report = dit_accel.acceleration_of(subject.pipe).report()
    assert report.fallbacks == {} and all(site.dense_calls == 0 for site in report.sites)
    assert sum(site.sparse_calls for site in report.sites) == 4 * 2 * 2  # steps x branches x layers


def test_on_a_transformer_without_its_pipeline(t2v):
    t2v.pipe.transformer.set_attn_processor(radial())
    t2v.run()
    handle = dit_accel.acceleration_of(t2v.pipe.transformer)
    assert sum(site.sparse_calls for site in handle.report().sites) == 4 * 2 * 2
    assert handle.clock.state.step == 3


def test_a_fraction_needs_the_number_of_steps(i2v):
    """The image-to-video pipeline names its branches but not its steps."""
    i2v.pipe.transformer.set_attn_processor(RadialAttnProcessor(block=64, dense_steps=0.5))
    with pytest.raises(ValueError, match="nobody says how many steps"):
        i2v.run()
    i2v.pipe.set_attn_processor(RadialAttnProcessor(block=64, dense_steps=0.5, dense_layers=0))
    i2v.run()
    report = dit_accel.acceleration_of(i2v.pipe).report()
    assert {(site.dense_calls, site.sparse_calls) for site in report.sites} == {(4, 4)}


def test_stock_processor_takes_ours_off(t2v):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    stock = t2v.run()
    for target in (t2v.pipe, t2v.pipe.transformer):
        t2v.pipe.set_attn_processor(radial())
        target.set_attn_processor(WanAttnProcessor())
        assert kinds_of(t2v.pipe.transformer) == {False}
        assert dit_accel.acceleration_of(t2v.pipe) is None
        assert torch.equal(t2v.run(), stock)


def test_processors_that_diffusers_sets_by_itself_take_ours_off_aloud(make_image_subject):
    """Who fuses projections asked for no other attention, unlike who sets a processor by hand."""
    sd3, method = make_image_subject("sd3"), BlockRoutingAttnProcessor(block=64, dense_steps=0, dense_layers=0)
    stock = sd3.run()
    dit_accel.accelerate(sd3.pipe, method)
    with pytest.warns(UserWarning, match=r"BlockRoutingAttnProcessor is off; call accelerate\(\) again") as caught:
        sd3.root.fuse_qkv_projections()
    told = [Path(each.filename).name for each in caught if "dit_accel" in str(each.message)]
    assert told == [Path(__file__).name]  # it points at the user
    assert dit_accel.acceleration_of(sd3.pipe) is None and torch.allclose(sd3.run(), stock, atol=1e-4)
    with dit_accel.accelerate(sd3.pipe, method) as handle:
        sd3.run()
        assert [(site.sparse_calls, site.dense_calls) for site in handle.report().sites] == [(2, 0)] * 2
        with pytest.warns(UserWarning, match="BlockRoutingAttnProcessor is off"):
            sd3.root.unfuse_qkv_projections()
        assert kinds_of(sd3.root) == {False} and torch.equal(sd3.run(), stock)


def test_caches_outlive_processors_that_diffusers_sets(make_image_subject):
    sd3 = make_image_subject("sd3")
    method = BlockRoutingAttnProcessor(block=64, dense_steps=0, dense_layers=0)
    dit_accel.accelerate(sd3.pipe, method, cache="static", cache_settings={"compute_steps": [0], "steps": 2})
    with pytest.warns(UserWarning, match=r"is off; set it once more with set_attn_processor\(\)"):
        sd3.root.fuse_qkv_projections()
    sd3.root.set_attn_processor(method)
    with dit_accel.acceleration_of(sd3.pipe) as handle:
        sd3.run()
        assert handle.processor is method and len(handle.caches.engines) == 1
        assert [(site.sparse_calls, site.dense_calls) for site in handle.report().sites] == [(1, 0)] * 2


def test_processors_that_users_set_take_ours_off_without_a_word(t2v):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in (t2v.pipe, t2v.root):
            target.set_attn_processor(radial())
            target.set_attn_processor(WanAttnProcessor())
            assert dit_accel.acceleration_of(t2v.pipe) is None


def test_a_dict_of_stock_processors_serves_both_experts(two_experts):
    two_experts.pipe.set_attn_processor(radial())
    stock = two_experts.pipe.transformer.attn_processors
    replacement = {path: processor.stock for path, processor in stock.items()}
    two_experts.pipe.set_attn_processor(replacement)
    assert len(replacement) == 4
    assert kinds_of(two_experts.pipe.transformer_2) == {False}


def test_a_new_recipe_replaces_the_old_one(t2v):
    t2v.pipe.set_attn_processor(radial(decay=0.2))
    t2v.pipe.set_attn_processor(radial(decay=0.5))
    assert dit_accel.acceleration_of(t2v.pipe).processor.decay == 0.5


def test_a_model_of_an_accelerated_pipeline_stands_for_all_of_them(two_experts):
    """The other expert, the pipeline's clock and the caches stay."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    pipe, settings = two_experts.pipe, {"compute_steps": [0, 2], "steps": 4}
    for processor, decay in ((radial(decay=0.5), 0.5), (WanAttnProcessor(), None)):
        dit_accel.accelerate(pipe, radial(decay=0.2), cache="static", cache_settings=settings)
        pipe.transformer_2.set_attn_processor(processor)
        handle = dit_accel.acceleration_of(pipe)
        assert handle is dit_accel.acceleration_of(pipe.transformer)
        with handle:
            two_experts.run()
            assert getattr(handle.processor, "decay", None) == decay
            assert handle.clock.state.steps == 4 and handle.clock.state.expert == "transformer_2"
            reused = {each.step for each in handle.caches.engines[0].record.decisions if not each.computed}
            assert reused and reused <= {1, 3}


def test_processors_that_are_put_back_are_still_ours(t2v):
    """Pipelines with perturbed attention (PAG) save all processors, swap some, and set the saved ones at the end."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model, settings = t2v.pipe.transformer, {"compute_steps": [0, 2], "steps": 4}
    stock = t2v.run()
    handle = dit_accel.accelerate(t2v.pipe, radial(), cache="static", cache_settings=settings)
    wanted, saved = t2v.run(), model.attn_processors
    model.blocks[0].attn1.processor = WanAttnProcessor()
    model.set_attn_processor(dict(saved))
    assert dit_accel.acceleration_of(t2v.pipe) is handle and torch.equal(t2v.run(), wanted)
    assert handle.report().fallbacks == {}
    handle.remove()
    model.set_attn_processor(dict(saved))  # theirs no more
    assert kinds_of(model) == {False} and torch.equal(t2v.run(), stock)
    with dit_accel.accelerate(t2v.pipe, radial(), cache="static", cache_settings=settings):
        model.set_attn_processor({name: WanAttnProcessor() for name in saved})
        assert dit_accel.acceleration_of(t2v.pipe).processor is None
        model.set_attn_processor(dict(saved))
        assert len(dit_accel.acceleration_of(t2v.pipe).caches.engines) == 1
    dit_accel.acceleration_of(t2v.pipe).remove()
    assert torch.equal(t2v.run(), stock)


def test_a_refused_processor_leaves_the_old_one(t2v):
    class Foreign:
        """Calls no attention that could be redirected."""

        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    recorder = dit_accel.AttentionMassRecorder(4)
    settings = {"compute_steps": [0, 2], "steps": 4}
    handle = dit_accel.accelerate(
        t2v.pipe, radial(decay=0.2), cache="static", cache_settings=settings, controls=[recorder]
    )
    wanted = t2v.run()
    for bad in (radial(backend="triton"), Foreign()):
        with pytest.raises((ValueError, TypeError), match=r"cannot run here|cannot be redirected"):
            t2v.pipe.set_attn_processor(bad)
        recorder.masses.clear()
        handle = dit_accel.acceleration_of(t2v.pipe)
        assert handle.processor.decay == 0.2 and torch.equal(t2v.run(), wanted) and recorder.masses
    handle.remove()


def test_controls_and_hooks_stay_when_the_method_is_replaced(t2v):
    recorder, blocks = dit_accel.AttentionMassRecorder(4), dit_accel.BlockRecorder()
    dit_accel.accelerate(t2v.pipe, radial(decay=0.2), controls=[recorder], block_hooks=[blocks])
    t2v.pipe.set_attn_processor(radial(decay=0.5))
    with dit_accel.acceleration_of(t2v.pipe) as handle:
        t2v.run()
        assert handle.processor.decay == 0.5 and recorder.masses and blocks.ran


def test_a_model_that_left_its_pipeline_stands_for_itself(t2v):
    pipe, model = t2v.pipe, t2v.pipe.transformer
    dit_accel.accelerate(pipe, radial(decay=0.2))
    pipe.transformer = copy.deepcopy(model)
    model.set_attn_processor(radial(decay=0.5))
    assert dit_accel.acceleration_of(model).processor.decay == 0.5
    dit_accel.acceleration_of(model).remove()
    pipe.transformer = model


def test_weights_may_be_elsewhere_until_they_are_needed(t2v):
    """As offloading has them: plans and choices go by what the model is given."""
    with dit_accel.accelerate(t2v.pipe, radial()):
        wanted = t2v.run()
    with dit_accel.accelerate(t2v.pipe, radial()) as handle, offloaded(t2v.pipe.transformer):
        assert torch.equal(t2v.run(), wanted)
        assert {plan.device.type for plan in handle._plans.values()} == {"cpu"}


def test_the_report_names_the_backend_of_the_device_at_work(t2v):
    """Where weights were when the model was accelerated says little: pipelines are moved, and offloaded."""
    model = t2v.pipe.transformer
    with offloaded(model), dit_accel.accelerate(model, radial()) as handle:
        assert "on meta" in handle.report().backend_reason
        t2v.run()
        assert "on cpu" in handle.report().backend_reason


def test_a_recipe_put_on_a_module_by_hand_explains_itself(t2v):
    t2v.pipe.transformer.blocks[0].attn1.processor = radial()
    with pytest.raises(RuntimeError, match=r"set_attn_processor"):
        t2v.run()


def test_settings_rebuild_an_equal_recipe():
    recipe = RadialAttnProcessor(rule="paper", block=64, decay=0.4, sink=False, dense_steps=3, dense_layers=[0, 2])
    assert RadialAttnProcessor(**recipe.settings()).settings() == recipe.settings()


def test_backend_chosen_later_reaches_the_stock_attention(t2v):
    from diffusers.models.attention_dispatch import attention_backend

    stock = t2v.run()
    # The choice is kept for the whole process, too, and resetting the model leaves it there; the context does not.
    with attention_backend(), dit_accel.accelerate(t2v.pipe, controls=[dit_accel.AttentionControl()]):
        t2v.pipe.transformer.set_attention_backend("_native_math")
        chosen = {str(processor._attention_backend) for processor in t2v.pipe.transformer.attn_processors.values()}
        output = t2v.run()
        t2v.pipe.transformer.reset_attention_backend()
    assert len(chosen) == 1 and "math" in chosen.pop().lower()
    assert torch.allclose(output, stock, atol=1e-4)
