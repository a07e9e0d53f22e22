"""torch.compile: one graph for the whole model, and no new graph for another layer or step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel

RUN = {"height": 240, "width": 208, "num_frames": 25, "num_inference_steps": 6}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_whole_model_is_one_graph_over_all_layers_and_steps(t2v):
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=1):
        eager = t2v.run(**RUN)
        counter = CompileCounter()
        t2v.pipe.transformer.compile(fullgraph=True, backend=counter)
        compiled = t2v.run(**RUN)
        assert counter.frame_count == 1
        report = dit_accel.acceleration_of(t2v.pipe).report()
    assert torch.allclose(compiled, eager, atol=1e-5)
    assert sum(site.sparse_calls for site in report.sites) == 2 * 6 * 2  # eager and compiled, steps, branches


def test_warm_up_adds_one_graph(t2v):
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=3, dense_layers=0):
        counter = CompileCounter()
        t2v.pipe.transformer.compile(fullgraph=True, backend=counter)
        t2v.run(**RUN)
        t2v.run(**RUN, seed=3)
        assert counter.frame_count == 2


def test_blocks_compiled_one_by_one_share_their_graph(t2v):
    """Regional compilation, as diffusers recommends: every layer of a kind runs the same graph."""
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0):
        eager = t2v.run(**RUN)
        counter = CompileCounter()
        t2v.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert torch.allclose(t2v.run(**RUN), eager, atol=1e-5)
        assert counter.frame_count == 1


def test_blocks_compiled_one_by_one_keep_their_own_plans(t2v, make_tiny_wan):
    """One graph serves alike blocks, but no block may run by what was decided for another, or for another model."""
    other = make_tiny_wan(1).transformer
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=1):
        eager = t2v.run(**RUN)
        counter = CompileCounter()
        t2v.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert torch.equal(t2v.run(**RUN), eager)
        assert counter.frame_count == 2
    torch._dynamo.reset()
    t2v.pipe.transformer, first = other, t2v.pipe.transformer
    with (
        dit_accel.accelerate(first, "radial", block=64, dense_steps=0, dense_layers=0) as handle,
        dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0, decay=1.0),
    ):
        eager = t2v.run(**RUN)
        for root in (first, other):
            root.compile_repeated_blocks(fullgraph=True, backend=counter)
        handle.clock.set_step(0, 1)
        shapes = ((1, 16, 7, 30, 26), (1, 16, 64))
        first(torch.randn(shapes[0]), torch.tensor([900]), torch.randn(shapes[1]))
        assert torch.equal(t2v.run(**RUN), eager)


def test_removal_after_compiling_is_bit_equal(t2v):
    stock = t2v.run(**RUN)
    handle = dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=0, dense_layers=0)
    t2v.pipe.transformer.compile(backend="eager")
    t2v.run(**RUN)
    handle.remove()
    assert torch.equal(t2v.run(**RUN), stock)


def test_wrapping_in_torch_compile_still_keeps_the_clock(t2v):
    """The clock then breaks the graph instead of standing still."""
    with dit_accel.accelerate(t2v.pipe, "radial", block=64, dense_steps=3, dense_layers=0) as handle:
        t2v.pipe.transformer = torch.compile(t2v.pipe.transformer, backend="eager")
        t2v.run(**RUN)
        report = handle.report()
        t2v.pipe.transformer = t2v.pipe.transformer._orig_mod
    assert {(site.dense_calls, site.sparse_calls) for site in report.sites} == {(6, 6)}


def test_compiled_first_is_refused(t2v):
    t2v.pipe.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        dit_accel.accelerate(t2v.pipe, "radial")
    t2v.pipe.transformer._compiled_call_impl = None
    t2v.pipe.transformer = torch.compile(t2v.pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        dit_accel.accelerate(t2v.pipe, "radial")
