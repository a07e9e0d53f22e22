"""Tokens permuted once per call: the model's output stays, and whoever looks inside is told the order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.install import TokenPermutation
from dit_accel.install.permutation import plan_inside
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.token_order import inverse_order, morton_order, pixel_order, tile_order
from dit_accel.layout import TokenLayout
from dit_accel.processors import BlockRoutingAttnProcessor, StaticAttnProcessor

GRID = (3, 5, 7)  # odd on every side
TOKENS = 3 * 5 * 7
ORDERS: dict[str, Callable[[TokenLayout], torch.Tensor]] = {
    "morton": lambda layout: morton_order(layout.grid),
    "tile": lambda layout: tile_order(layout.grid, (2, 2, 4)),
    "pixel": lambda layout: pixel_order(layout.grid),
}


def build_transformer(kind: str) -> Any:
    """``"t2v"``, ``"i2v"`` (prompt image in cross-attention) or ``"per-token"`` (one timestep for each token)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    extra = {"image_dim": 8, "added_kv_proj_dim": 32} if kind == "i2v" else {}
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        **extra,
    ).eval()


def inputs_for(kind: str, batch: int = 2, grid: tuple[int, int, int] = GRID) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
    text = torch.randn(batch, 512 if kind == "i2v" else 6, 12, generator=generator)
    inputs = {"hidden_states": latent, "encoder_hidden_states": text, "timestep": torch.tensor([500.0] * batch)}
    if kind == "i2v":
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 5, 8, generator=generator)
    if kind == "per-token":
        tokens = grid[0] * grid[1] * grid[2]
        inputs["timestep"] = torch.rand(batch, tokens, generator=generator) * 1000
    return inputs


@torch.no_grad()
def run(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return transformer(**inputs, return_dict=False)[0]


def hooks_of(transformer: Any) -> dict[str, tuple[int, int, list[str]]]:
    """Whatever a permutation could leave behind."""
    return {
        path: (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
        for path, module in transformer.named_modules()
    }


KINDS = ("t2v", "i2v", "per-token")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORDERS)
def test_permuted_equals_plain_and_removal_is_bit_equal(kind: str, name: str) -> None:
    transformer, inputs = build_transformer(kind), inputs_for(kind)
    plain, before = run(transformer, inputs), hooks_of(transformer)
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS[name])]):
        permuted = run(transformer, inputs)
        again = run(transformer, inputs)
    torch.testing.assert_close(permuted, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(permuted, again)
    assert hooks_of(transformer) == before
    assert torch.equal(run(transformer, inputs), plain)


@pytest.mark.parametrize("left_out", ["patch_embedding", "rope", "condition_embedder", "proj_out"])
def test_every_place_of_the_stream_is_needed(left_out: str) -> None:
    """What is permuted everywhere but at one place shows in the output, so equality above means something."""
    transformer, inputs = build_transformer("per-token"), inputs_for("per-token")
    plain = run(transformer, inputs)
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS["morton"])]):
        transformer.get_submodule(left_out)._forward_hooks.clear()
        assert (run(transformer, inputs) - plain).abs().max() > 1e-3


class Watcher(dit_accel.AttentionControl):
    """Keeps the layout and the queries of each call."""

    def __init__(self, **selection: Any) -> None:
        super().__init__(**selection)
        self.seen: dict[str, tuple[TokenLayout, torch.Tensor]] = {}

    def record(self, call: Any, query: Any, key: Any, value: Any, output: Any) -> None:
        self.seen[call.site.path] = (call.layout, query)


class Inputs(dit_accel.BlockHook):
    """Keeps the layout and the tokens that each block gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[TokenLayout, torch.Tensor]] = []

    def around(self, block: Any, state: Any, run: Any, arguments: Any) -> Any:
        self.seen.append((state.layout, arguments["args"][0]))
        return run()


def watched(transformer: Any, inputs: dict[str, Any], *hooks: dit_accel.BlockHook) -> tuple[Watcher, Inputs]:
    watcher, blocks = Watcher(kinds=("self", "cross")), Inputs()
    with dit_accel.accelerate(transformer, controls=[watcher], block_hooks=[blocks, *hooks]):
        run(transformer, inputs)
    return watcher, blocks


def test_controls_and_block_hooks_are_told_the_order() -> None:
    """Position p of what they see is token order[p] of what they see without the permutation."""
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    plain_calls, plain_blocks = watched(transformer, inputs)
    calls, blocks = watched(transformer, inputs, TokenPermutation(ORDERS["morton"]))
    assert len(calls.seen) == 6 and len(blocks.seen) == 3
    for path, (layout, query) in calls.seen.items():
        assert layout.order is not None and layout.grid == GRID
        expected = plain_calls.seen[path][1][:, :, layout.order]
        torch.testing.assert_close(query, expected, rtol=1e-4, atol=1e-4)
    for (layout, tokens), (plain_layout, plain_tokens) in zip(blocks.seen, plain_blocks.seen, strict=True):
        assert layout.order is not None and plain_layout.order is None and layout == plain_layout
        torch.testing.assert_close(tokens, plain_tokens[:, layout.order], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tokens, plain_tokens, atol=1e-2)


def test_an_order_of_none_changes_nothing() -> None:
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    plain = run(transformer, inputs)
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(lambda layout: None)]):
        assert torch.equal(run(transformer, inputs), plain)


def test_another_grid_gets_its_own_order() -> None:
    transformer = build_transformer("t2v")
    asked: list[tuple[int, int, int]] = []

    def order_for(layout: TokenLayout) -> torch.Tensor | None:
        asked.append(layout.grid)
        return None if layout.grid[0] == 1 else morton_order(layout.grid)

    grids = [GRID, (1, 4, 3), (2, 4, 5)]
    plain = [run(transformer, inputs_for("t2v", grid=grid)) for grid in grids]
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(order_for)]):
        for grid, expected in [*zip(grids, plain, strict=True)] * 2:
            out = run(transformer, inputs_for("t2v", grid=grid))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert asked == grids


def test_pipelines_with_one_and_two_experts(subject: Any) -> None:
    stock = subject.run()
    with dit_accel.accelerate(subject.pipe, block_hooks=[TokenPermutation(ORDERS["pixel"])]):
        assert not torch.equal(subject.run(), stock)
        torch.testing.assert_close(subject.run(), stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(subject.run(), stock)


class Fixed(StaticAttnProcessor):
    """Random blocks, planned in an order of tokens."""

    block = 64

    def __init__(self, order: torch.Tensor | None) -> None:
        super().__init__(dense_steps=0)
        self.order = order

    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        keep = torch.tensor([[True, False], [True, True]])
        sizes: dict[str, Any] = {"q_len": TOKENS, "kv_len": TOKENS, "block_q": 64, "block_kv": 64}
        return plan_from_blocks(keep, **sizes, order=self.order, method="fixed")

    def settings(self) -> dict[str, Any]:
        return {"order": self.order}


@pytest.mark.parametrize("planned", [None, "morton", "pixel"])
def test_sparse_attention_is_the_same_inside(planned: str | None) -> None:
    """A plan keeps the same pairs of tokens in whatever order the blocks run; in its own it runs without copies."""
    transformer, inputs = build_transformer("per-token"), inputs_for("per-token")
    layout = TokenLayout.video_only(GRID)
    processor = Fixed(ORDERS[planned](layout) if planned else None)
    dense = run(transformer, inputs)
    with dit_accel.accelerate(transformer, processor):
        expected = run(transformer, inputs)
    assert (expected - dense).abs().max() > 1e-3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        permutation = TokenPermutation(ORDERS["morton"])
        with dit_accel.accelerate(transformer, processor, block_hooks=[permutation]) as handle:
            torch.testing.assert_close(run(transformer, inputs), expected, rtol=1e-5, atol=1e-5)
            assert all(site.sparse_calls == 1 for site in handle.report().sites)
    warned = [str(warning.message) for warning in caught if "another token order" in str(warning.message)]
    assert len(warned) == (planned != "morton")
    inside = plan_inside(processor.build_plan(layout, torch.device("cpu")), None)
    assert inside.order is processor.order


def test_methods_that_search_are_told_the_order() -> None:
    """They see permuted queries and keys; keeping every block is dense attention in any order."""
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    layouts: list[TokenLayout] = []

    class Routing(BlockRoutingAttnProcessor):
        def set_up(self, site: Any, layout: TokenLayout, device: torch.device) -> Any:
            layouts.append(layout)
            return super().set_up(site, layout, device)

    plain = run(transformer, inputs)
    routing = Routing(amount=1.0, block=64, dense_steps=0, dense_layers=0)
    with dit_accel.accelerate(transformer, routing, block_hooks=[TokenPermutation(ORDERS["tile"])]) as handle:
        torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-5, atol=1e-5)
        assert all(site.sparse_calls == 1 for site in handle.report().sites)
    assert len(layouts) == 3
    for layout in layouts:
        assert layout.order is not None and torch.equal(layout.order, tile_order(GRID, (2, 2, 4)))


def test_a_failing_call_leaves_the_model_usable() -> None:
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    plain, before = run(transformer, inputs), hooks_of(transformer)

    class Failing(dit_accel.BlockHook):
        armed = True

        def around(self, block: Any, state: Any, run: Any, arguments: Any) -> Any:
            if self.armed and block.index == 1:
                raise ArithmeticError("in mid-stack")
            return run()

    failing = Failing()
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS["morton"]), failing]):
        with pytest.raises(ArithmeticError):
            run(transformer, inputs)
        latent = inputs["hidden_states"]  # a module called on its own is not permuted
        assert torch.equal(transformer.rope(latent)[0], build_transformer("t2v").rope(latent)[0])
        failing.armed = False
        torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-5, atol=1e-5)
    assert hooks_of(transformer) == before and torch.equal(run(transformer, inputs), plain)


def test_modules_replaced_later_are_hooked_anew() -> None:
    """As when a LoRA on the patch embedding is loaded into an accelerated model, or taken off."""
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    plain = run(transformer, inputs)
    original = transformer.proj_out
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS["morton"])]):
        transformer.proj_out = torch.nn.Sequential(original)
        torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-5, atol=1e-5)
        assert not original._forward_hooks
        transformer.proj_out = original
        torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-5, atol=1e-5)
    assert not original._forward_hooks


def test_gradients_with_checkpointing() -> None:
    """Blocks run again during the backward pass, when the call is over."""
    transformer, inputs = build_transformer("per-token"), inputs_for("per-token")

    def gradient() -> torch.Tensor:
        latent = inputs["hidden_states"].clone().requires_grad_()
        transformer(**(inputs | {"hidden_states": latent}), return_dict=False)[0].square().sum().backward()
        assert latent.grad is not None
        return latent.grad

    plain = gradient()
    transformer.enable_gradient_checkpointing()
    transformer.train()
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS["morton"])]):
        torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("planned", ["dense", "raster", "morton", "pixel"])
def test_what_is_set_up_under_inference_mode_serves_training_later(planned: str) -> None:
    """The order itself, and plans for another one, which get theirs relative to it."""
    transformer, inputs = build_transformer("per-token"), inputs_for("per-token")
    processor = None
    if planned != "dense":
        processor = Fixed(ORDERS[planned](TokenLayout.video_only(GRID)) if planned in ORDERS else None)
    permutation = TokenPermutation(ORDERS["morton"])
    with dit_accel.accelerate(transformer, processor, block_hooks=[permutation]) as handle:
        with torch.inference_mode():
            transformer(**inputs, return_dict=False)
        transformer(**inputs, return_dict=False)[0].square().sum().backward()
        assert planned == "dense" or all(site.sparse_calls == 2 for site in handle.report().sites)
    gradient = transformer.blocks[0].attn1.to_q.weight.grad
    assert gradient is not None and gradient.isfinite().all()


def test_an_order_that_was_made_under_inference_mode_serves_training() -> None:
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    with torch.inference_mode():
        order = morton_order(GRID)
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(lambda layout: order)]):
        transformer(**inputs, return_dict=False)[0].square().sum().backward()
    assert transformer.patch_embedding.weight.grad is not None


def test_compiled_model_and_compiled_blocks_are_one_graph() -> None:
    torch._dynamo.reset()
    inputs = inputs_for("per-token")
    for regional in (False, True):
        transformer, counter = build_transformer("per-token"), CompileCounter()
        plain = run(transformer, inputs)
        with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS["tile"])]):
            compile_ = transformer.compile_repeated_blocks if regional else transformer.compile
            compile_(fullgraph=True, backend=counter)
            for _ in range(3):
                torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1
        torch._dynamo.reset()


def test_a_copy_of_a_permuted_model_is_independent() -> None:
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    with dit_accel.accelerate(transformer, block_hooks=[TokenPermutation(ORDERS["morton"])]):
        permuted = run(transformer, inputs)
        twin = copy.deepcopy(transformer)
    assert torch.equal(run(twin, inputs), permuted) and not torch.equal(run(transformer, inputs), permuted)


@pytest.mark.parametrize(
    ("order_for", "message"),
    [
        (lambda layout: torch.zeros(TOKENS, dtype=torch.int64), "each of its 105 tokens once"),
        (lambda layout: torch.arange(4), r"shape \(105,\)"),
    ],
)
def test_bad_orders_are_explained_at_the_first_call(order_for: Any, message: str) -> None:
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    plain = run(transformer, inputs)
    permutation = TokenPermutation(order_for)
    with dit_accel.accelerate(transformer, block_hooks=[permutation]), pytest.raises(ValueError, match=message):
        run(transformer, inputs)
    assert torch.equal(run(transformer, inputs), plain)


def test_text_must_stay_in_place() -> None:
    layout = TokenLayout((1, 2, 2), (2, 6), text=(0, 2))
    with pytest.raises(ValueError, match="outside the video"):
        TokenPermutation(lambda layout: inverse_order(torch.tensor([5, 1, 2, 3, 4, 0]))).order(
            layout, torch.device("cpu")
        )
    kept = TokenPermutation(lambda layout: torch.tensor([0, 1, 3, 2, 5, 4])).order(layout, torch.device("cpu"))
    assert kept is not None and kept.tolist() == [0, 1, 3, 2, 5, 4]


def test_sharded_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context parallelism gives each process a part of the rotary table."""
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    whole = transformer.rope.forward
    monkeypatch.setattr(transformer.rope, "forward", lambda latent: tuple(t[:, :50] for t in whole(latent)))
    hooks = [TokenPermutation(ORDERS["morton"])]
    with (
        dit_accel.accelerate(transformer, block_hooks=hooks),
        pytest.raises(RuntimeError, match="context parallelism"),
    ):
        run(transformer, inputs)


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_other_families_are_referred_to_plans(make_image_subject: Callable[[str], Any], name: str) -> None:
    subject = make_image_subject(name)
    stock = subject.run()
    with pytest.raises(ValueError, match=r"SparsePlan\.order"):
        dit_accel.accelerate(subject.pipe, block_hooks=[TokenPermutation(ORDERS["morton"])])
    assert torch.equal(subject.run(), stock)


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match="function of the token layout"):
        TokenPermutation("morton")  # type: ignore[arg-type]
    twice = [TokenPermutation(ORDERS["morton"]), TokenPermutation(ORDERS["pixel"])]
    transformer = build_transformer("t2v")
    before = hooks_of(transformer)
    with pytest.raises(ValueError, match="one order only; got 2"):
        dit_accel.accelerate(transformer, block_hooks=twice)
    assert hooks_of(transformer) == before


def test_token_order_is_short_for_the_hook() -> None:
    transformer, inputs = build_transformer("t2v"), inputs_for("t2v")
    seen: list[torch.Tensor | None] = []

    class Notes(dit_accel.AttentionControl):
        def record(self, call: Any, *tensors: torch.Tensor) -> None:
            seen.append(call.layout.order)

    plain = run(transformer, inputs)
    with dit_accel.accelerate(transformer, token_order=ORDERS["morton"], controls=[Notes()]) as handle:
        handle.clock.set_step(0, 1)
        permuted = run(transformer, inputs)
    assert seen and all(order is not None and torch.equal(order, morton_order(GRID)) for order in seen[:1])
    assert torch.allclose(permuted, plain, atol=1e-5)
    assert torch.equal(run(transformer, inputs), plain)
