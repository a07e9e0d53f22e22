"""AdaSpa in whole generations: when it searches, what it remembers, what leaks, and how it compiles."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.processors import AdaSpaAttnProcessor

ODD = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens
BATCH = 2


class Watched(AdaSpaAttnProcessor):
    """Notes for every search whether it had a memory, and counts what was measured."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.had_memory, self.lse, self.measured = [], [], 0

    def search(self, query, key, setup, memory, *, scale):
        self.had_memory.append(memory is not None)
        plan, found = super().search(query, key, setup, memory, scale=scale)
        self.lse.append(found[-1])
        return plan, found

    def measure(self, query, key, memory):
        self.measured += 1
        return super().measure(query, key, memory)


class Searches(dit_accel.AttentionControl):
    """Notes the steps at which the first layer searched."""

    def __init__(self, processor):
        super().__init__(kinds=("self",))
        self.processor, self.found_at, self._count = processor, [], 0

    def record(self, call, query, key, value, output):
        if len(self.processor.had_memory) > self._count and call.site.layer == 0:
            self.found_at.append((call.state.step, call.state.branch))
        self._count = len(self.processor.had_memory)


def sites_of(handle):
    return [site for installed in handle._installed for site in installed.sites.values() if site.info.kind == "self"]


def call_wan(handle, subject, step, *, frames=4, batch=1, seed=0, branch="cond"):
    """One call of the bare transformer, on 15 x 13 tokens for each frame."""
    generator = torch.Generator().manual_seed(seed)
    handle.clock.set_step(step, 9, branch)
    latents = torch.randn(batch, 16, frames, 30, 26, generator=generator)
    text = subject.inputs["prompt_embeds"].expand(batch, -1, -1)
    with torch.no_grad():
        return subject.root(latents, torch.full((batch,), 900 - step), text, return_dict=False)[0]


def test_the_first_search_leaves_the_output_dense_bit_for_bit(t2v):
    stock = [t2v.run(**ODD, num_inference_steps=steps) for steps in (2, 3)]
    processor = Watched()
    handle = dit_accel.accelerate(t2v.pipe, processor)
    assert torch.equal(t2v.run(**ODD, num_inference_steps=2), stock[0])
    report = handle.report()
    assert [(site.sparse_calls, site.dense_calls, site.kept) for site in report.sites] == [(0, 4, 4.0)] * 2
    assert processor.had_memory == [False] * 4 and report.density == 1 and not report.fallbacks
    assert not torch.allclose(t2v.run(**ODD, num_inference_steps=3), stock[1])
    handle.remove()
    assert torch.equal(t2v.run(**ODD, num_inference_steps=3), stock[1])
    assert not any(site._kept for site in sites_of(handle))


def test_it_searches_twice_and_the_second_time_with_the_first_log_sum_exp(t2v):
    processor = Watched()
    with dit_accel.accelerate(t2v.pipe, processor, controls=[noted := Searches(processor)]) as handle:
        t2v.run(**ODD, num_inference_steps=5)
        report = handle.report()
        second = t2v.run(**ODD, num_inference_steps=5, seed=4)
    assert noted.found_at == [(step, branch) for step in (1, 3) for branch in ("cond", "uncond")] * 2
    assert processor.had_memory == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4
    first, later = processor.lse[:4], processor.lse[4:8]
    assert all(a is b for a, b in zip(first, later, strict=True)) and processor.measured == 0
    assert [(site.sparse_calls, site.dense_calls) for site in report.sites] == [(6, 4)] * 2
    assert 0.15 < report.plan_density < 0.35  # 3 of 13 blocks in every row
    with dit_accel.accelerate(t2v.pipe, "adaspa"):
        assert torch.equal(t2v.run(**ODD, num_inference_steps=5, seed=4), second)


@pytest.mark.parametrize(
    ("second", "searches"),
    [
        ({"step": 2}, []),
        ({"step": 3}, [True, True]),  # where it is to search again
        ({"step": 3, "branch": "uncond"}, [False, False]),
        ({"step": 3, "frames": 3}, [False, False]),
        ({"step": 3, "batch": BATCH}, [False, False]),
        ({"step": 0}, [False, False]),  # another generation
    ],
)
def test_what_a_site_remembers_is_for_the_same_generation_layout_branch_and_batch(t2v, second, searches):
    processor = Watched(dense_steps=0, search_again=[3], drift=1.9)
    with dit_accel.accelerate(t2v.root, processor) as handle:
        call_wan(handle, t2v, 1)
        output = call_wan(handle, t2v, **second, seed=1)
        assert processor.had_memory == [False, False, *searches]
    if searches == [False, False]:
        assert torch.equal(output, call_wan_stock(t2v, **second))


def call_wan_stock(subject, **second):
    with dit_accel.accelerate(subject.root) as handle:
        return call_wan(handle, subject, **second, seed=1)


@pytest.mark.parametrize(("drift", "steps"), [(1e-7, [1, 3, 5]), (1.9, [1])])
def test_drift_makes_all_sites_search(t2v, drift, steps):
    processor = Watched(drift=drift, search_again=(), dense_steps=1)
    with dit_accel.accelerate(t2v.pipe, processor, controls=[noted := Searches(processor)]):
        t2v.run(**ODD, num_inference_steps=6)
    assert noted.found_at == [(step, branch) for step in steps for branch in ("cond", "uncond")]
    assert len(processor.had_memory) == 4 * len(steps) and processor.had_memory.count(False) == 4
    assert processor.measured == 4 * (5 - len(steps))


@pytest.mark.parametrize("drift", [None, 1.9])
def test_drift_alone_reads_the_device_once_before_a_call(t2v, monkeypatch, drift):
    reads, settings = [], {"dense_steps": 0, "search_again": [2], "drift": drift, "backend": "reference"}
    with dit_accel.accelerate(t2v.root, "adaspa", **settings) as handle:
        call_wan(handle, t2v, 0)
        call_wan(handle, t2v, 1)
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stock = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, stock=stock: reads.append(name) or stock(*a))
        call_wan(handle, t2v, 2)
        assert reads == ([] if drift is None else ["__float__"])
        monkeypatch.undo()


def test_a_batch_equals_its_samples(t2v):
    shape = t2v.run(**ODD, num_inference_steps=1).shape[1:]
    prompts = {name: torch.randn(BATCH, *part.shape[1:]) for name, part in t2v.inputs.items() if "embeds" in name}
    noise = torch.randn(BATCH, *shape)
    with dit_accel.accelerate(t2v.pipe, "adaspa") as handle:
        together = t2v.run(**ODD, num_inference_steps=5, latents=noise, **prompts)
        assert handle.report().density < 0.7
        for i in range(BATCH):
            one = {name: part[i : i + 1] for name, part in prompts.items()}
            alone = t2v.run(**ODD, num_inference_steps=5, latents=noise[i : i + 1], **one)
            assert torch.allclose(alone[0], together[i], atol=1e-4)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("options", [{}, {"drift": 1e-7, "recall": 0.5}])
def test_dense_first_search_following_and_later_search_are_one_graph_each(t2v, options):
    counter = CompileCounter()
    with dit_accel.accelerate(t2v.pipe, "adaspa", **options) as handle:
        eager = t2v.run(**ODD, num_inference_steps=6)
        expected = handle.report()
        t2v.root.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(t2v.run(**ODD, num_inference_steps=6), eager)
        assert handle.report() == expected
        assert counter.frame_count == 4
        with torch._dynamo.config.patch(error_on_recompile=True):
            t2v.run(**ODD, num_inference_steps=6, seed=3)


@pytest.mark.parametrize(("family", "size"), [("wan", ODD), ("flux", {"height": 30, "width": 34})])
def test_everything_kept_is_dense_and_less_is_not(make_image_subject, t2v, family, size):
    subject = t2v if family == "wan" else make_image_subject("flux")
    stock = subject.run(**size, num_inference_steps=3)
    for density, same in ((1.0, True), (0.2, False)):
        with dit_accel.accelerate(subject.pipe, "adaspa", density=density) as handle:
            assert torch.allclose(subject.run(**size, num_inference_steps=3), stock, atol=1e-4) is same
            assert (handle.report().plan_density == pytest.approx(1)) is same
