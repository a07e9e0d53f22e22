"""Agent attention against loops over single tokens: merging for UNets, pooling for transformers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.kernels.agent.joint import agent_attention_beside, full_plan
from dit_accel.kernels.agent.merged import attention_of_pairs
from dit_accel.kernels.agent.merging import match_tokens
from dit_accel.kernels.agent.pooling import cells_by_number
from dit_accel.layout import TokenLayout
from dit_accel.plan.schedule import Schedule
from dit_accel.processors import AgentAttnProcessor, processor_by_name

from .agent_oracle import merged, pooled

JOINT = SiteInfo("transformer_blocks.1.attn", "joint", 1, 3, "transformer")
UNET = SiteInfo("down_blocks.0.attentions.0.transformer_blocks.0.attn1", "self", 1, 4, "unet")
CPU = torch.device("cpu")
Grid = tuple[int, int, int]


def state(step: int, grid: Grid, steps: int | None = 10, branch: str = "cond") -> StepState:
    return StepState(0, step, steps, branch, "unet", 0, TokenLayout.video_only(grid), None)


def tensors(batch: int, heads: int, length: int, seed: int, dim: int = 4) -> list[Tensor]:
    """Tokens before heads in memory, as models have it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, heads, dim, generator=generator).transpose(1, 2) for _ in range(3)]


def layout_of(grid: Grid, before: int, after: int, seed: int | None) -> TokenLayout:
    """Text on either side; a reference image takes the place of text behind where there is text before."""
    stop, order = before + math.prod(grid), None
    if seed is not None:
        order = torch.randperm(stop + after, generator=torch.Generator().manual_seed(seed))
    behind = (stop, stop + after) if after else None
    if before:
        return TokenLayout(grid, (before, stop), (0, before), (behind,) if behind else (), order=order)
    return TokenLayout(grid, (0, stop), behind, order=order)


def wanted_cells(grid: Grid, agents: Any) -> Any:
    if isinstance(agents, int):
        return cells_by_number(grid, agents)
    return tuple(math.ceil(length / side) for length, side in zip(grid, agents, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5)),
    text=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    agents=st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(2, 3))),
    batch=st.integers(1, 3),
    order=st.one_of(st.none(), st.integers(0, 99)),
    scale=st.sampled_from([None, 0.9]),
    power=st.sampled_from([0.3, 1.0]),
    shortcut=st.sampled_from([0.0, 0.075]),
)
def test_pooled_agents_equal_the_loops(
    grid: Grid,
    text: tuple[int, int],
    agents: Any,
    batch: int,
    order: int | None,
    scale: float | None,
    power: float,
    shortcut: float,
) -> None:
    layout = layout_of(grid, *text, order)
    processor = AgentAttnProcessor(agents=agents, second_scale_power=power, shortcut=shortcut)
    cells = wanted_cells(grid, agents)
    if 2 * math.prod(cells) >= math.prod(grid):
        with pytest.raises(ValueError, match="which saves nothing"):
            processor.set_up(JOINT, layout, CPU)
        return
    setup = processor.at_step(processor.set_up(JOINT, layout, CPU), JOINT, state(0, grid))
    q, k, v = tensors(batch, 2, layout.length, seed=sum(grid) + sum(text))
    out = processor.attend(q, k, v, setup, scale=scale)
    first = 0.5 if scale is None else scale
    for b, h in itertools.product(range(batch), range(2)):
        expected = pooled(q[b, h], k[b, h], v[b, h], layout, cells, (first, first**power), shortcut)
        torch.testing.assert_close(out[b, h].double(), expected, rtol=1e-4, atol=1e-5)
    pairs = sum(text) * layout.length + math.prod(grid) * sum(text) + 2 * math.prod(cells) * math.prod(grid)
    assert processor.cost(setup) == pytest.approx(pairs / layout.length**2)


def destinations_of(setup: Any, grid: Grid, side: int) -> set[int]:
    """Those drawn, after a check that there is one in each square of each frame."""
    assert setup.destinations.shape[0] == 1  # for all items of a batch
    chosen = [divmod(token, grid[1] * grid[2]) for token in setup.destinations[0].tolist()]
    squares = [(frame, place // grid[2] // side, place % grid[2] // side) for frame, place in chosen]
    rows, columns = (range(math.ceil(length / side)) for length in grid[1:])
    assert sorted(squares) == list(itertools.product(range(grid[0]), rows, columns))
    return set(setup.destinations[0].tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    side=st.integers(1, 4),
    ratios=st.tuples(st.floats(0, 0.7), st.floats(0, 1)),
    batch=st.integers(1, 3),
    random=st.booleans(),
    scale=st.sampled_from([None, 0.9]),
    seed=st.integers(0, 999),
)
def test_merged_attention_equals_the_loops(
    grid: Grid,
    side: int,
    ratios: tuple[float, float],
    batch: int,
    random: bool,
    scale: float | None,
    seed: int,
) -> None:
    processor = AgentAttnProcessor(cell=side, merge=ratios[0], agent_ratio=ratios[1], random=random, seed=seed)
    layout = TokenLayout.video_only(grid)
    setup = processor.at_step(processor.set_up(UNET, layout, CPU), UNET, state(0, grid))
    q, k, v = tensors(batch, 2, layout.length, seed)
    out = processor.attend(q, k, v, setup, scale=scale)
    first, chosen = 0.5 if scale is None else scale, destinations_of(setup, grid, side)
    for b in range(batch):
        expected = merged(q[b], k[b], v[b], chosen, ratios, (first, first**0.3), 0.075)
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-4, atol=1e-5)


def test_both_sides_of_the_rule_for_agents_are_met() -> None:
    """The published settings on the published grid."""
    processor, layout = AgentAttnProcessor(), TokenLayout.video_only((1, 64, 64))
    setup = processor.set_up(UNET, layout, CPU)
    early, late = (processor.at_step(setup, UNET, state(step, layout.grid, 50)) for step in (19, 20))
    assert early.destinations.shape == (1, 256) and late.destinations.shape == (1, 1024)
    assert processor.cost(early) == 2 * 256 * (4096 - 1638) / 4096**2
    assert processor.cost(late) == (4096 - 1638) ** 2 / 4096**2


@pytest.mark.parametrize(
    ("switch", "steps", "first"), [(0.4, 50, 20), (0.4, 4, 2), (0, 9, 0), (3, None, 3), (1.0, 6, 6)]
)
def test_the_second_stage_begins_at_its_step(switch: float, steps: int | None, first: int) -> None:
    processor, grid = AgentAttnProcessor(switch=switch, merge=(0.4, 0.3)), (1, 8, 8)
    setup = processor.set_up(UNET, TokenLayout.video_only(grid), CPU)
    stages = [processor.at_step(setup, UNET, state(step, grid, steps)) for step in range(steps or 9)]
    assert [(s.cell[1], s.ratio, s.agent_ratio) for s in stages] == [
        (4, 0.4, 0.95) if step < first else (2, 0.3, 0.5) for step in range(steps or 9)
    ]


def test_a_fraction_of_an_unknown_number_of_steps_is_refused() -> None:
    processor = AgentAttnProcessor()
    setup = processor.set_up(UNET, TokenLayout.video_only((1, 8, 8)), CPU)
    with pytest.raises(ValueError, match=r"switch=0\.4 is a fraction.*set_step"):
        processor.at_step(setup, UNET, state(0, (1, 8, 8), None))


@pytest.mark.parametrize(
    ("root", "grid", "size"), [((64, 64), (64, 64), 1), ((11, 13), (6, 7), 2), ((11, 13), (3, 4), 4)]
)
def test_only_fine_levels_of_a_unet_take_part(root: Any, grid: Any, size: int) -> None:
    for site, most in itertools.product((UNET,), (1, 2, 4, 8)):
        for mode in ("merge", "pool"):
            processor = AgentAttnProcessor(mode=mode, max_downsample=most, agents=2)
            setup = processor.set_up(site, TokenLayout.video_only((1, *grid)), CPU)
            assert (processor.at_step(setup, site, state(0, (1, *root))) is None) is (size > most)


def test_levels_that_take_no_part_may_be_too_small_for_the_agents() -> None:
    """256 agents for the 256 tokens of a 16x16 level, of which the finest alone, with 4096, takes part."""
    layout, at = TokenLayout.video_only((1, 16, 16)), state(0, (1, 64, 64))
    processor = AgentAttnProcessor(mode="pool", agents=256)
    assert processor.at_step(processor.set_up(UNET, layout, CPU), UNET, at) is None
    reaching = AgentAttnProcessor(mode="pool", agents=256, max_downsample=4)
    setup = reaching.set_up(UNET, layout, CPU)
    with pytest.raises(
        ValueError, match="256 agents for 256 tokens, which saves nothing; give a number from 1 to 127"
    ):
        reaching.at_step(setup, UNET, at)


def draw(processor: AgentAttnProcessor, step: int = 0, layer: int = 0, branch: str = "cond") -> list[int]:
    site = SiteInfo(UNET.path, "self", layer, 4, "unet")
    setup = processor.set_up(site, TokenLayout.video_only((1, 16, 16)), CPU)
    found = processor.at_step(setup, site, state(step, (1, 16, 16), branch=branch))
    drawn: list[int] = found.destinations[0].tolist()
    return drawn


def test_draws_follow_from_seed_layer_and_step_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(AgentAttnProcessor(seed=5))
    assert torch.equal(torch.get_rng_state(), before)  # and torch's own state is not touched
    torch.manual_seed(2)
    assert first == draw(AgentAttnProcessor(seed=5)) == draw(AgentAttnProcessor(seed=5), branch="uncond")
    mine = AgentAttnProcessor(seed=5)
    others = [draw(AgentAttnProcessor(seed=6)), draw(mine, step=1), draw(mine, layer=1)]
    assert all(other != first for other in others)
    plain = draw(AgentAttnProcessor(random=False))
    assert (
        plain == draw(AgentAttnProcessor(random=False), step=1) == [64 * y + 4 * x for y in range(4) for x in range(4)]
    )


@pytest.mark.parametrize("agent_ratio", [0.95, 0.5])
def test_merging_queries_keys_and_values_is_merging_hidden_states(agent_ratio: float) -> None:
    """AgentSD merges and projects hidden states, and unmerges outputs behind the last projection."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 63, 12, generator=generator, dtype=torch.float64)
    to_q, to_k, to_v, to_out = torch.randn(4, 12, 12, generator=generator, dtype=torch.float64)
    pairs = match_tokens(x, (1, 7, 9), (1, 3, 3), generator=generator)
    merge, deeper = pairs.merge_ratio(0.4), pairs.merge_ratio(agent_ratio)

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(2, (3, 4)).transpose(1, 2)

    short, agents = merge.merge(x), deeper.merge(x)
    q, k, v, a = (heads(t) for t in (short @ to_q, short @ to_k, short @ to_v, agents @ to_q))
    if 2 * agents.shape[1] < short.shape[1]:
        gathered = (a @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        theirs = (q @ a.transpose(-1, -2) * 0.5**0.3).softmax(-1) @ gathered + 0.075 * v
    else:
        theirs = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
    theirs = merge.unmerge(theirs.transpose(1, 2).flatten(2) @ to_out)
    options: dict[str, Any] = {"scale": None, "second_scale_power": 0.3, "shortcut": 0.075}
    options |= {"ratio": 0.4, "agent_ratio": agent_ratio}
    ours = attention_of_pairs(heads(x @ to_q), heads(x @ to_k), heads(x @ to_v), pairs, **options)
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2) @ to_out, theirs, rtol=1e-10, atol=1e-10)
    assert 2 * agents.shape[1] < short.shape[1] or agent_ratio == 0.5


@pytest.mark.parametrize(("site", "published"), [(JOINT, 0.0), (UNET, 0.075)], ids=["pool", "merge"])
def test_the_usual_shortcut_is_that_of_the_mode(site: SiteInfo, published: float) -> None:
    layout = TokenLayout.video_only((1, 6, 7))
    q, k, v = tensors(1, 2, layout.length, 0)
    outs = []
    for shortcut in (None, published, 0.5):
        processor = AgentAttnProcessor(shortcut=shortcut)
        setup = processor.at_step(processor.set_up(site, layout, CPU), site, state(0, layout.grid))
        outs.append(processor.attend(q, k, v, setup, scale=None))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2], atol=0.1)


def test_as_many_agents_as_tokens_in_a_sharp_softmax_are_dense_attention() -> None:
    """A query that is its own agent has the very weight of text and image: scores of unit vectors, far apart."""
    q = torch.eye(12).repeat(1, 2, 1, 1) * 6
    _, k, v = tensors(1, 2, 15, 0, dim=12)
    out = agent_attention_beside(
        q,
        k[:, :, :12],
        v[:, :, :12],
        q,
        k[:, :, 12:],
        v[:, :, 12:],
        gather=full_plan(12, 12, 64, CPU),
        exact=full_plan(12, 3, 64, CPU),
        second_scale_power=0.0,
        shortcut=0.0,
    )
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("site", [JOINT, UNET], ids=["pool", "merge"])
def test_small_dtypes(dtype: torch.dtype, tolerance: float, site: SiteInfo) -> None:
    grid = (1, 6, 7)
    layout = layout_of(grid, 5, 3, None) if site is JOINT else TokenLayout.video_only(grid)
    q, k, v = (x.to(dtype) for x in tensors(2, 3, layout.length, 0, dim=16))
    processor = AgentAttnProcessor(agents=4)
    setup = processor.at_step(processor.set_up(site, layout, CPU), site, state(0, grid))
    out = processor.attend(q, k, v, setup, scale=None)
    wide = processor.attend(q.float(), k.float(), v.float(), setup, scale=None)
    assert out.dtype == dtype and out.shape == q.shape
    torch.testing.assert_close(out.float(), wide, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("site", [JOINT, UNET], ids=["pool", "merge"])
def test_gradients_reach_all_three(site: SiteInfo) -> None:
    layout = layout_of((1, 6, 7), 2, 0, None) if site is JOINT else TokenLayout.video_only((1, 6, 7))
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, layout.length, 0))
    processor = AgentAttnProcessor(agents=4)
    setup = processor.at_step(processor.set_up(site, layout, CPU), site, state(0, (1, 6, 7)))
    out = processor.attend(q, k, v, setup, scale=None)
    assert all(float(g.abs().max()) > 1e-4 for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


def warm_ups(processor: AgentAttnProcessor) -> Iterator[int]:
    for site in (UNET, JOINT):
        yield next(step for step in range(51) if step == 50 or processor.is_sparse(site, state(step, (1, 4, 4), 50)))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, [0, 12]),
        ({"dense_steps": 3}, [3, 3]),
        ({"mode": "pool"}, [12, 12]),
        ({"mode": "merge"}, [0, 0]),
        ({"schedule": {"dense_layers": 0}}, [0, 12]),
        ({"schedule": {"dense_steps": 0.1}}, [5, 5]),
        ({"schedule": Schedule(0.2, 0)}, [10, 10]),
        ({"dense_layers": [1]}, [50, 50]),
    ],
)
def test_warm_up_is_that_of_the_mode_unless_given(options: dict[str, Any], first: list[int]) -> None:
    processor = AgentAttnProcessor(**options)
    assert list(warm_ups(processor)) == first
    again = AgentAttnProcessor(**processor.settings())
    assert list(warm_ups(again)) == first and repr(again) == repr(processor)
    if first[0] < 50:  # dense layers are no warm-up
        assert [processor.warm_up_steps([site], 50) for site in (UNET, JOINT)] == first


def test_autocast_changes_no_pair() -> None:
    x = 5 + torch.randn(2, 63, 12, generator=torch.Generator().manual_seed(0))
    plain = match_tokens(x, (1, 7, 9), (1, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = match_tokens(x, (1, 7, 9), (1, 3, 3))
    assert torch.equal(cast.sources, plain.sources) and torch.equal(cast.targets, plain.targets)


def test_cells_of_a_number_are_as_alike_as_can_be() -> None:
    assert cells_by_number((4, 8, 8), 1) == (1, 1, 1)
    assert cells_by_number((4, 8, 8), 32) == (2, 4, 4)
    assert cells_by_number((1, 5, 9), 8) == (1, 2, 4)
    assert cells_by_number((1, 2, 2), 99) == (1, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "auto, merge, pool"),
        ({"cell": 0}, "1 or more; got 0"),
        ({"cell": (4, 2, 1)}, "two: for the early and the later"),
        ({"merge": 1.0}, r"\[0, 1\); got 1.0"),
        ({"merge": (0.4, -0.1)}, r"\[0, 1\)"),
        ({"agent_ratio": 1.1}, r"\[0, 1\]; got 1.1"),
        ({"agent_ratio": math.nan}, "nan"),
        ({"switch": 1.5}, r"\[0, 1\], or a whole number"),
        ({"switch": -1}, "0 or more"),
        ({"max_downsample": 3}, "1, 2, 4 or 8; got 3"),
        ({"max_downsample": True}, "1, 2, 4 or 8; got True"),
        ({"random": 1}, "True or False"),
        ({"seed": -1}, "seed takes whole numbers, 0 or more"),
        ({"agents": 0}, "1 or more; got 0"),
        ({"agents": (2, 2)}, r"\(frames, height, width\)"),
        ({"agents": (1, 0, 2)}, "1 or more; got 0"),
        ({"second_scale_power": 0}, r"\(0, 1\]; got 0"),
        ({"shortcut": 2}, r"\[0, 1\]; got 2"),
        ({"block": 32}, "64 or 128"),
        ({"schedule": {"layer_budget": {0: 2.0}}}, "no budget that could be scaled"),
        ({"window": 3}, "unexpected keyword argument 'window'"),
    ],
)
def test_bad_settings_say_what_is_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("agent", **options)


def test_layouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 padding tokens"):
        AgentAttnProcessor().set_up(JOINT, TokenLayout((1, 4, 4), (0, 16), padding=3), CPU)
    for layout in (layout_of((1, 4, 4), 2, 0, None), layout_of((1, 4, 4), 0, 0, 3)):
        with pytest.raises(ValueError, match="merging goes by it; use mode='pool'"):
            AgentAttnProcessor().set_up(UNET, layout, CPU)
    with pytest.raises(ValueError, match=r"makes 8 agents for 16 tokens.*from 1 to 7"):
        AgentAttnProcessor(agents=8).set_up(JOINT, TokenLayout.video_only((1, 4, 4)), CPU)
    with pytest.raises(ValueError, match="1 agents for 2 tokens, which saves nothing; leave attention dense"):
        AgentAttnProcessor(agents=1).set_up(JOINT, TokenLayout.video_only((1, 1, 2)), CPU)


@pytest.mark.parametrize("site", [JOINT, UNET], ids=["pool", "merge"])
def test_other_keys_than_tokens_are_refused(site: SiteInfo) -> None:
    processor = AgentAttnProcessor()
    setup = processor.at_step(
        processor.set_up(site, TokenLayout.video_only((1, 6, 6)), CPU), site, state(0, (1, 6, 6))
    )
    q, k, v = tensors(1, 2, 36, 0)
    with pytest.raises(ValueError, match="36 tokens that attend to each other; this call has 36 queries and 72 keys"):
        processor.attend(q, torch.cat((k, k), 2), torch.cat((v, v), 2), setup, scale=None)


def test_merging_is_refused_where_there_is_no_unet() -> None:
    family: Any = SimpleNamespace(makes_video=True, root_class="WanTransformer3DModel", block_lists=("blocks",))
    with pytest.raises(ValueError, match=r"is for UNets.*WanTransformer3DModel is none.*mode='pool'"):
        AgentAttnProcessor(mode="merge").check_family(family)
    AgentAttnProcessor().check_family(family)


def test_a_unet_without_attention_at_the_resolution_is_refused() -> None:
    """As Stable Diffusion XL, whose finest level has none."""
    sites = [
        SiteInfo(f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1", "self", i, 2, "unet") for i in (1, 2)
    ]
    with pytest.raises(ValueError, match="use max_downsample=2 or more"):
        AgentAttnProcessor().check_sites(sites)
    AgentAttnProcessor(max_downsample=2).check_sites(sites)
    AgentAttnProcessor().check_sites([JOINT])
