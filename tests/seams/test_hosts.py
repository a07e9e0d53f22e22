"""What surrounds a model or stands in it: autocast, and blocks and processors that do not come to attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.kernels.sparse_plan import plan_from_blocks
from dit_accel.processors import BlockRoutingAttnProcessor, StaticAttnProcessor

SPARSE = {"block": 64, "dense_steps": 0, "dense_layers": 0}
LARGE = {"height": 28, "width": 32}  # 14 x 16 tokens in SD 3.5, and ten of text
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class AllPairs(StaticAttnProcessor):
    """Sparse attention that leaves nothing out."""

    block = 64

    def __init__(self):
        super().__init__(dense_steps=0)

    def build_plan(self, layout, device):
        blocks = -(-layout.length // self.block)
        keep = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
        return plan_from_blocks(keep, q_len=layout.length, kv_len=layout.length, block_q=64, block_kv=64)

    def settings(self):
        return {}


class Watched(BlockRoutingAttnProcessor):
    """Notes what it is given, and whether autocast is on."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = set()

    def search_with_values(self, query, key, value, *rest, **options):
        self.seen.add((query.dtype, key.dtype, value.dtype, torch.is_autocast_enabled("cpu")))
        return super().search_with_values(query, key, value, *rest, **options)


class Dtypes(dit_accel.AttentionControl):
    """Notes what the model's own code hands to attention."""

    def __init__(self):
        super().__init__(kinds=("joint", "self"))
        self.seen = set()

    def record(self, call, query, key, value, output):
        self.seen.add((query.dtype, key.dtype, value.dtype, output.dtype))


@pytest.fixture
def sd35(make_image_subject):
    """Its norms of queries and keys have float32 weights, and so give float32 under autocast."""
    return make_image_subject("sd35")


@pytest.mark.parametrize("method", ["neighborhood", "block_routing", "adaspa", "vmoba", "compensated", "agent"])
def test_methods_run_under_autocast(sd35, method):
    settings = {"dense_steps": 0, "dense_layers": 0} if method == "agent" else SPARSE
    dtypes = Dtypes()
    with dit_accel.accelerate(sd35.pipe, method, controls=[dtypes], **settings) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(sd35.run(**LARGE)).all()
        report = handle.report()
    assert dtypes.seen == {(FLOAT32, FLOAT32, BFLOAT16, BFLOAT16)}
    assert report.fallbacks == {} and all(site.sparse_calls > 0 for site in report.sites)


def test_autocast_gives_methods_what_it_gives_the_stock_attention(sd35):
    with torch.autocast("cpu", torch.bfloat16):
        stock = sd35.run(**LARGE)
        with dit_accel.accelerate(sd35.pipe, controls=[Dtypes()]):
            assert torch.equal(sd35.run(**LARGE), stock)
        with dit_accel.accelerate(sd35.pipe, AllPairs()):
            sparse = sd35.run(**LARGE)
    assert torch.allclose(sparse.float(), stock.float(), atol=0.05)
    for enabled, dtype in ((True, BFLOAT16), (False, FLOAT32)):
        method = Watched(**SPARSE)
        with dit_accel.accelerate(sd35.pipe, method), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sd35.run(**LARGE)
        assert method.seen == {(dtype, dtype, dtype, False)}


def test_padding_is_left_out_under_autocast(make_video_subject):
    subject = make_video_subject("hunyuan")
    with torch.autocast("cpu", torch.bfloat16):
        stock = subject.run()
        with dit_accel.accelerate(subject.pipe, AllPairs()) as handle:
            assert torch.allclose(subject.run().float(), stock.float(), atol=0.05)
            assert handle.report().fallbacks == {}


def test_compiled_models_run_under_autocast(sd35):
    torch._dynamo.reset()
    counter = CompileCounter()
    with dit_accel.accelerate(sd35.pipe, AllPairs()), torch.autocast("cpu", torch.bfloat16):
        eager = sd35.run(**LARGE)
        sd35.root.compile(fullgraph=True, backend=counter)
        for _ in range(2):
            assert torch.allclose(sd35.run(**LARGE).float(), eager.float(), atol=1e-2)
    assert counter.frame_count == 2  # the pipeline's latents are bfloat16 after the first step
    torch._dynamo.reset()


class StandIn(dit_accel.BlockHook):
    """Gives the first block's input as its output."""

    def around(self, block, state, run, arguments):
        if block.index > 0:
            return run()
        return arguments["args"][0] if arguments["args"] else arguments["kwargs"]["hidden_states"]


@pytest.mark.parametrize("method", ["radial", "block_routing", "agent"])
def test_blocks_that_a_hook_stands_in_for_are_not_counted(t2v, method):
    settings = {"dense_steps": 0, "dense_layers": 0} if method == "agent" else SPARSE
    with dit_accel.accelerate(t2v.pipe, method, block_hooks=[StandIn()], **settings) as handle:
        t2v.run()
        first, second = handle.report().sites
    assert (first.sparse_calls, first.dense_calls) == (0, 0)
    assert (second.sparse_calls, second.dense_calls) == (4 * 2, 0)  # steps x branches


class Torn:
    """Uses a name that leads to us, but not always."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads = [hidden_states[:, None]] * 3
        if rotary_emb is None:
            return F.scaled_dot_product_attention(*heads)[:, 0]
        return torch.nn.functional.scaled_dot_product_attention(*heads)[:, 0]


@pytest.mark.parametrize("method", ["radial", "block_routing"])
def test_attention_that_was_not_redirected_after_all_counts_as_dense(t2v, method):
    t2v.root.blocks[0].attn1.processor = Torn()
    with dit_accel.accelerate(t2v.pipe, method, **SPARSE) as handle:
        t2v.run()
        first, second = handle.report().sites
    assert (first.sparse_calls, first.dense_calls) == (0, 4 * 2)
    assert (second.sparse_calls, second.dense_calls) == (4 * 2, 0)
