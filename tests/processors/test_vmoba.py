"""VMoBA against its formulas, in loops over cells, queries and single pairs, and at work in a tiny Wan."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import dit_accel
from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.kernels.attend import attend
from dit_accel.kernels.search.cell_plan import SCOPES, cell_lists, cell_plan
from dit_accel.kernels.search.cell_reference import query_cell_mask
from dit_accel.kernels.search.cells import SUBSET_CELLS, aligned_block, grid_cells
from dit_accel.kernels.search.plan import count_density
from dit_accel.kernels.token_order import morton_order
from dit_accel.layout import TokenLayout
from dit_accel.plan.vmoba import top_k_density
from dit_accel.processors import VMOBA_PRESETS, VMoBAAttnProcessor, processor_by_name

CHOICES = [("top_k", scope) for scope in SCOPES if scope != "cell"] + [("threshold", scope) for scope in SCOPES]


def cell_of(grid: tuple[int, ...], cell: tuple[int, ...]) -> list[tuple[int, ...]]:
    """By definition: the cell of every raster token."""
    places = itertools.product(*map(range, grid))
    return [tuple(x // side for x, side in zip(place, cell, strict=True)) for place in places]


def chosen(
    gate: dict[tuple[int, int, Any], float],
    own: set[tuple[int, int, Any]],
    weight: dict[int, int],
    select: str,
    scope: str,
    amount: float,
) -> set[tuple[int, int, Any]]:
    """By definition: which (head, row, cell) are kept, given the gates of one batch item."""

    def scope_of(entry: tuple[int, int, Any]) -> Any:
        head, row, cell = entry
        return {"query": (head, row), "cell": cell, "head": head, "all": 0}[scope]

    kept = set(own)
    for name in {scope_of(entry) for entry in gate}:
        entries = [entry for entry in gate if scope_of(entry) == name]
        ranked = sorted(entries, key=lambda entry: (entry not in own, -gate[entry]))
        if select == "top_k":
            value = {entry: float(weight[entry[1]]) for entry in entries}
            goal = amount * sum(weight[row] for _, row in {(head, row) for head, row, _ in entries})
        else:
            low, high = min(map(gate.__getitem__, entries)), max(map(gate.__getitem__, entries))
            value = {entry: (gate[entry] - low) / (high - low or 1) * weight[entry[1]] for entry in entries}
            goal = amount * sum(value.values())
        held = 0.0
        for entry in ranked:
            if held >= goal - 1e-9 * abs(goal):
                break
            kept.add(entry)
            held += value[entry]
    return kept


def expected(
    q: Tensor,
    k: Tensor,
    grid: tuple[int, int, int],
    cell: tuple[int, int, int],
    start: int,
    block: int,
    select: str,
    scope: str,
    amount: float,
) -> Tensor:
    """The element mask by loops; blocks of queries run in the order of the cells, `block` 1 is the paper's method."""
    labels = cell_of(grid, cell)
    ordered = sorted(range(len(labels)), key=lambda token: labels[token])  # stable: raster order inside a cell
    members = {name: [t + start for t, label in enumerate(labels) if label == name] for name in sorted(set(labels))}
    rows = [[t + start for t in ordered[i : i + block]] for i in range(0, len(ordered), block)]
    length = q.shape[1]
    mask = torch.ones(q.shape[0], q.shape[2], length, length, dtype=torch.bool)
    for b in range(q.shape[0]):
        gate, own = {}, set()
        for h, (r, row), name in itertools.product(range(q.shape[2]), enumerate(rows), members):
            mean = k[b, members[name], h].double().mean(0)
            gate[h, r, name] = sum(float(q[b, token, h].double() @ mean) for token in row) / len(row)
            if any(labels[token - start] == name for token in row):
                own.add((h, r, name))
        kept = chosen(gate, own, {r: len(row) for r, row in enumerate(rows)}, select, scope, amount)
        for h, (r, row), name in itertools.product(range(q.shape[2]), enumerate(rows), members):
            short = length > len(labels) and len(row) < block  # a block with tokens of no cell sees everything
            if (h, r, name) not in kept and not short:
                mask[b, h, torch.tensor(row)[:, None], torch.tensor(members[name])] = False
    return mask


def tensors(batch: int, heads: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, 8, generator=generator) for _ in range(2))
    return q, k


def random_case(seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    grid = (chance.randint(1, 5), chance.randint(1, 7), chance.randint(2, 7))
    kind = seed % 3
    cell = tuple(min(chance.randint(1, length), chance.randint(1, length)) for length in grid)
    cell = (cell[0], *grid[1:]) if kind == 0 else (grid[0], *cell[1:]) if kind == 1 else cell
    before, after = chance.choice([(0, 0), (0, 5), (4, 0), (3, 9)])
    select, scope = CHOICES[seed % len(CHOICES)]
    amount = chance.randint(1, 4) if select == "top_k" else chance.uniform(0.1, 0.7)
    return {
        "grid": grid,
        "cell": cell,
        "before": before,
        "length": before + math.prod(grid) + after,
        "batch": chance.randint(1, 2),
        "heads": chance.randint(1, 3),
        "block_q": chance.choice([4, 8, 16]),
        "block_kv": chance.choice([4, 8, 16, 32]),
        "choice": {"select": select, "scope": scope, "amount": amount},
    }


@pytest.mark.parametrize("seed", range(63))
def test_pairs_are_those_of_the_formula(seed: int) -> None:
    case = random_case(seed)
    q, k = tensors(case["batch"], case["heads"], case["length"], seed)
    where = {"start": case["before"], "length": case["length"]}
    cells = grid_cells(case["grid"], case["cell"], block_q=case["block_q"], block_kv=case["block_kv"], **where)
    given = (q, k, case["grid"], case["cell"], case["before"])
    plan = cell_plan(q, k, cells, **case["choice"])
    wanted = expected(*given, case["block_q"], **case["choice"])
    assert torch.equal(plan.element_mask(), wanted)
    exact = expected(*given, 1, **case["choice"])
    assert torch.equal(query_cell_mask(q, k, cells, **case["choice"]), exact)
    whole = grid_cells(
        case["grid"], case["cell"], block_q=case["block_q"], block_kv=case["block_kv"], cut=False, **where
    )
    kept = cell_plan(q, k, whole, **case["choice"])
    assert kept.pair_test is None and not (wanted & ~kept.element_mask()).any()
    assert torch.equal(kept.to_bool(), plan.to_bool())  # the very blocks that hold a kept pair


def test_random_cases_cover_the_ways_in_which_blocks_hold_cells() -> None:
    cases = [random_case(seed) for seed in range(63)]
    names = ("grid", "cell", "block_q", "block_kv", "length")
    cells = [grid_cells(**{name: case[name] for name in names}, start=case["before"]) for case in cases]
    assert sum(x.crowded.numel() > 0 for x in cells) >= 5 and sum(not x.cuts for x in cells) >= 5
    assert sum(bool((x.touched.clamp(max=SUBSET_CELLS) > 1).any()) for x in cells) >= 20
    assert {c["before"] for c in cases} >= {0, 3, 4} and any(c["length"] == math.prod(c["grid"]) for c in cases)


@pytest.mark.parametrize("text", [(0, 0), (7, 0), (0, 7)])
def test_queries_that_agree_choose_as_the_paper_says(text: tuple[int, int]) -> None:
    """Cells are whole blocks of queries, and alike queries want the same cells."""
    grid, cell, before, length = (2, 8, 8), (1, 4, 4), text[0], 128 + sum(text)
    cells = grid_cells(grid, cell, block_q=16, block_kv=16, start=before, length=length)
    assert not cells.cuts or text != (0, 0)
    q, k = tensors(2, 3, length, 1)
    blocks = torch.randn(2, 8, 3, 8, generator=torch.Generator().manual_seed(2)).repeat_interleave(16, 1)
    q[:, cells.order[:128]] = blocks
    for select, amount in (("top_k", 3.0), ("threshold", 0.4)):
        choice: Any = {"select": select, "scope": "query", "amount": amount}
        plan = cell_plan(q, k, cells, **choice)
        exact = query_cell_mask(q, k, cells, **choice)
        assert torch.equal(plan.element_mask(), exact) and not exact.all()
        v = torch.randn(2, 3, length, 8)
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 8**-0.5).masked_fill(~exact, -torch.inf)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v, plan)
        assert torch.allclose(out, scores.softmax(-1) @ v, atol=1e-5)


@pytest.mark.parametrize(("select", "scope"), [("top_k", "head"), ("threshold", "head"), ("threshold", "cell")])
def test_wider_scopes_differ_from_the_paper_in_the_last_block_only(select: Any, scope: Any) -> None:
    """A goal that the paper reaches inside a block of alike queries is reached here with all of that block."""
    cells = grid_cells((2, 8, 8), (1, 4, 4), block_q=16, block_kv=16)
    q, k = tensors(1, 2, 128, 3)
    q[:, cells.order] = torch.randn(1, 8, 2, 8, generator=torch.Generator().manual_seed(4)).repeat_interleave(16, 1)
    choice: Any = {"select": select, "scope": scope, "amount": 3.0 if select == "top_k" else 0.4}
    exact = query_cell_mask(q, k, cells, **choice)
    extra = cell_plan(q, k, cells, **choice).element_mask() & ~exact
    assert int(extra.sum()) < 16 * 16 * (2 if scope == "head" else 8)
    assert not (exact & ~cell_plan(q, k, cells, **choice).element_mask()).any()


def site(layer: int) -> SiteInfo:
    return SiteInfo(f"blocks.{layer}.attn1", "self", layer, 8, "transformer")


def shape_of(processor: VMoBAAttnProcessor, layer: int, layout: TokenLayout) -> tuple[int, int]:
    """Cells of a layer, and tokens of the largest."""
    cells, largest = processor.set_up(site(layer), layout, torch.device("cpu")).cells.members.shape
    return cells, largest


def test_published_settings_can_be_said() -> None:
    layout = TokenLayout.video_only((20, 30, 52))
    processor = VMoBAAttnProcessor(**VMOBA_PRESETS["wan-1.3b-480x832"])
    assert [shape_of(processor, layer, layout) for layer in range(4)] == [
        (10, 3120),
        (130, 240),
        (325, 96),
        (10, 3120),
    ]
    setups = [processor.set_up(site(layer), layout, torch.device("cpu")) for layer in range(3)]
    assert [setup.amount for setup in setups] == [3, 20, 15]
    assert not any(setup.cells.cuts for setup in setups)  # every cell is whole blocks
    other = VMoBAAttnProcessor(**VMOBA_PRESETS["wan-1.3b-448x832"])
    small = TokenLayout.video_only((20, 28, 52))
    assert [shape_of(other, layer, small) for layer in range(3)] == [(10, 2912), (28, 1040), (140, 208)]


def test_sides_that_are_not_given_follow_the_grid() -> None:
    usual = VMoBAAttnProcessor()
    sides = {grid: [usual.cell(name, grid) for name in ("temporal", "spatial", "cubes")] for grid in WANTED}
    assert sides == WANTED


WANTED = {
    (20, 30, 52): [(2, 30, 52), (20, 3, 4), (4, 6, 4)],  # FastVideo's
    (9, 16, 16): [(3, 16, 16), (9, 4, 4), (3, 8, 4)],
    (1, 7, 11): [(1, 7, 11), (1, 3, 4), (4, 7, 4)],  # sides without a near divisor are cut at the border
}


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize(("cell", "count"), [((2, 8, 8), 1), ((4, 4, 4), 2), ((4, 4, 4), 9), ((3, 3, 5), 3)])
def test_density_of_top_k_is_known_before(cell: Any, count: int, text: int) -> None:
    cells = grid_cells((4, 8, 8), cell, block_q=16, block_kv=16, length=256 + text)
    low, high = top_k_density(cells, count)
    q, k = tensors(1, 4, 256 + text, 7)
    plan = cell_plan(q, k, cells, select="top_k", scope="query", amount=count)
    density = plan.element_mask().double().mean().item()
    assert low - 1e-9 <= density <= high + 1e-9
    assert (low == pytest.approx(high)) is (cell != (3, 3, 5))
    with pytest.raises(ValueError, match="1 or more"):
        top_k_density(cells, 0)


@pytest.mark.parametrize("scope", ["query", "head"])
def test_heads_may_have_amounts_of_their_own(scope: Any) -> None:
    cells = grid_cells((4, 8, 8), (3, 3, 5), block_q=16, block_kv=16, length=265)
    q, k = tensors(2, 3, 265, 3)
    amounts = torch.tensor([1, 4, 2])
    together = cell_plan(q, k, cells, select="top_k", scope=scope, amount=amounts).element_mask()
    for head, amount in enumerate(amounts.tolist()):
        one = slice(head, head + 1)
        alone = cell_plan(q[:, :, one], k[:, :, one], cells, select="top_k", scope=scope, amount=amount)
        assert torch.equal(together[:, one], alone.element_mask().expand(2, 1, -1, -1))
    with pytest.raises(ValueError, match="one amount for all; got 3"):
        cell_plan(q, k, cells, select="top_k", scope="all", amount=amounts)


def test_partitions_take_turns_from_the_first_sparse_layer_on() -> None:
    cycle = ["temporal", "spatial", "cubes"]
    for dense, first in ((0, 0), (2, 2), ([0, 1, 3], 2), ([1], 0), ([], 0)):
        processor = VMoBAAttnProcessor(dense_layers=dense)
        assert [processor.partition(layer) for layer in range(first, first + 6)] == cycle * 2


@pytest.mark.parametrize(("cell", "block"), [((2, 3, 4), 12), ((2, 2, 2), 8), ((3, 3, 4), 12), ((3, 5, 7), 16)])
def test_key_blocks_fit_cells_where_they_can(cell: Any, block: int) -> None:
    grid = (4, 6, 8)
    assert aligned_block(grid, cell, 16) == block
    assert grid_cells(grid, cell, block_q=8, block_kv=block).cuts is (math.prod(cell) % block > 0)
    assert aligned_block(grid, (2, 3, 4), 16, multiple=8) == 8


LAYOUTS = {
    "absent": TokenLayout.video_only((5, 9, 11)),
    "after": TokenLayout((5, 9, 11), (0, 495), text=(495, 506)),
    "before": TokenLayout((5, 9, 11), (11, 506), text=(0, 11)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"select": "top_k", "amount": (1, 2, 2)}, {"boundaries": "keep"}])
def test_attention_is_that_under_the_mask_for_any_batch_and_order(layout: TokenLayout, options: Any) -> None:
    processor = VMoBAAttnProcessor(chunk=2, patch=(4, 5), cube=(2, 3, 5), **options)
    q, k = tensors(2, 2, layout.length, 5)
    q, k, v = (x.transpose(1, 2) for x in (q, k, q + k))
    for layer in range(3):
        setup = processor.set_up(site(layer), layout, q.device)
        plan = processor.find_plan(q, k, setup, scale=None)
        mask = plan.element_mask()
        start, stop = layout.text or (0, 0)
        assert mask[..., start:stop].all() and mask[..., start:stop, :].all() and not mask.all()
        assert count_density(plan).density == pytest.approx(mask.double().mean().item(), abs=1e-12)
        out = attend(q, k, v, plan)
        scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf)
        assert torch.allclose(out, scores.softmax(-1) @ v, atol=1e-5)
        for i in range(2):
            one = slice(i, i + 1)
            alone = processor.find_plan(q[one], k[one], setup, scale=None)
            assert torch.equal(alone.element_mask(), mask[one])
        assert_same_in_other_order(processor, layer, layout, q, k, mask)


def assert_same_in_other_order(
    processor: VMoBAAttnProcessor, layer: int, layout: TokenLayout, q: Tensor, k: Tensor, mask: Tensor
) -> None:
    """Tokens that were permuted already keep what they keep in raster order."""
    start, stop = layout.visual
    order = torch.arange(layout.length)
    order[start:stop] = morton_order(layout.grid) + start
    inside = TokenLayout(layout.grid, layout.visual, layout.text, order=order)
    setup = processor.set_up(site(layer), inside, q.device)
    plan = processor.find_plan(q[:, :, order], k[:, :, order], setup, scale=None)
    assert torch.equal(plan.element_mask(), mask[:, :, order][..., order])


def test_search_waits_for_nothing_and_spares_the_gate_the_scale() -> None:
    layout = LAYOUTS["before"]
    processor = VMoBAAttnProcessor()
    q, k = (x.transpose(1, 2) for x in tensors(1, 2, layout.length, 6))
    setup = processor.set_up(site(1), layout, q.device)
    plans = [processor.find_plan(q, k, setup, scale=scale).to_bool() for scale in (None, 0.01)]
    assert torch.equal(*plans)
    setup = processor.set_up(site(1), layout, torch.device("meta"))
    processor.find_plan(q.to("meta"), k.to("meta"), setup, scale=None)  # there are no values to look at


ODD = {"height": 240, "width": 208, "num_frames": 13}  # 4 x 15 x 13 tokens
SETTINGS: dict[str, Any] = {"chunk": 3, "patch": (4, 6), "cube": (3, 6, 6), "dense_steps": 0}


@pytest.fixture
def pipe(make_tiny_wan: Any) -> Any:
    """A tiny Wan of four layers, so that every partition has its turn."""
    from diffusers import WanTransformer3DModel

    pipe = make_tiny_wan(0)
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"num_layers": 4}
    pipe.register_modules(transformer=WanTransformer3DModel.from_config(config).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, seed: int = 1, batch: int = 1, **changes: Any) -> Tensor:
    """Latents of one generation; the samples of a batch have seeds and texts of their own."""
    parts = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    text = [torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed + 50 + i)) for i in range(batch)]
    embeds = {
        "prompt_embeds": torch.stack([t[0] for t in text]),
        "negative_prompt_embeds": torch.stack([t[1] for t in text]),
    }
    size: dict[str, Any] = ODD | {"num_inference_steps": 2}
    latents: Tensor = pipe(**embeds, **(size | changes), generator=parts, output_type="latent").frames
    return latents


class Oracle(dit_accel.AttentionControl):
    """Searches as the method does, and wants the output of dense attention under the mask that was found."""

    def __init__(self, processor: VMoBAAttnProcessor) -> None:
        super().__init__()
        self.processor, self.worst = processor, 0.0
        self.cells: dict[int, int] = {}
        self.density: list[float] = []

    def before(self, call: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        setup = self.processor.set_up(call.site, call.layout, query.device)
        self.cells[call.site.layer] = setup.cells.members.shape[0]
        mask = self.processor.find_plan(query, key, setup, scale=None).element_mask()
        self.density.append(mask.double().mean().item())
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        self.output = scores.softmax(-1) @ value
        return query, key, value

    def after(self, call: Any, output: Tensor) -> Tensor:
        self.worst = max(self.worst, float((output - self.output).abs().max()))
        return output


@pytest.mark.parametrize("options", [{}, {"select": "top_k", "scope": "query", "amount": (1, 4, 3)}])
def test_every_layer_attends_under_the_mask_of_its_partition(pipe: Any, options: Any) -> None:
    processor = VMoBAAttnProcessor(**SETTINGS | options)
    with dit_accel.accelerate(pipe, processor, controls=[oracle := Oracle(processor)]) as handle:
        generate(pipe, num_inference_steps=1)
        report = handle.report()
    assert oracle.worst < 1e-5
    assert oracle.cells == {0: 2, 1: 4 * 3, 2: 2 * 3 * 3, 3: 2}
    assert max(oracle.density) < 1
    kept = [sum(oracle.density[layer::4]) for layer in range(4)]
    assert [tally.kept for tally in report.sites] == pytest.approx(kept, rel=1e-5)


def test_removal_is_bit_equal_and_a_batch_equals_its_samples(pipe: Any) -> None:
    stock = generate(pipe)
    with dit_accel.accelerate(pipe, "vmoba", **SETTINGS):
        together = generate(pipe, batch=2)
        alone = [generate(pipe, seed=seed)[0] for seed in (1, 2)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)
    assert not torch.allclose(alone[0], stock[0], atol=1e-3)
    assert torch.equal(generate(pipe), stock)


def test_nothing_is_left_of_other_generations_sizes_and_branches(pipe: Any) -> None:
    settings = SETTINGS | {"search_every": 3, "boundaries": "keep"}
    pipe.set_attn_processor(VMoBAAttnProcessor(**settings))
    generate(pipe, seed=5, height=32, width=48)
    generate(pipe, seed=6, guidance_scale=1.0)
    second = generate(pipe, num_inference_steps=3)
    handle = dit_accel.acceleration_of(pipe)
    assert handle is not None
    assert not any(site._kept for installed in handle._installed for site in installed.sites.values())
    pipe.set_attn_processor(VMoBAAttnProcessor(**settings))
    assert torch.equal(generate(pipe, num_inference_steps=3), second)


@pytest.mark.parametrize(
    ("options", "graphs"), [({}, 1), ({"search_every": 2}, 2), ({"boundaries": "keep", "dense_steps": 1}, 2)]
)
def test_partitions_share_graphs(pipe: Any, options: Any, graphs: int) -> None:
    """One graph of the whole model for each kind of step."""
    with dit_accel.accelerate(pipe, "vmoba", **SETTINGS | options) as handle:
        eager = generate(pipe, num_inference_steps=3)
        report = handle.report()
        torch._dynamo.reset()
        counter = CompileCounter()
        pipe.transformer.compile(fullgraph=True, backend=counter)
        handle.reset_report()
        assert torch.equal(generate(pipe, num_inference_steps=3), eager)
        assert handle.report() == report
        assert counter.frame_count == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk is one number"),
        ({"patch": (3,)}, r"patch is \(height, width\)"),
        ({"patch": (3, 0)}, "from 1"),
        ({"cube": (4, 6.0, 4)}, r"cube is \(frames, height, width\)"),
        ({"cube": 4}, "cube"),
        ({"select": "top_p"}, "threshold"),
        ({"scope": "row"}, "query, cell, head, all"),
        ({"select": "top_k", "scope": "cell"}, "query, head or all"),
        ({"amount": 0.0}, r"\(0, 1\]"),
        ({"amount": 1.5}, r"\(0, 1\]"),
        ({"amount": math.nan}, "nan"),
        ({"amount": (0.2, 0.3)}, "three of these"),
        ({"select": "top_k", "amount": 0}, "whole number of cells from 1"),
        ({"select": "top_k", "amount": 0.5}, "whole number of cells"),
        ({"boundaries": "pad"}, "cut or keep"),
        ({"block": 96}, "64 or 128"),
        ({"search_every": 0}, "1 or more"),
        ({"tau": 0.2}, "unexpected keyword argument 'tau'"),
    ],
)
def test_bad_settings_say_what_is_valid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("vmoba", **settings)


def test_settings_build_an_equal_recipe() -> None:
    for settings in ({}, *VMOBA_PRESETS.values(), {"dense_layers": [0, 2], "boundaries": "keep", "search_every": 4}):
        processor = VMoBAAttnProcessor(**settings)
        assert repr(VMoBAAttnProcessor(**processor.settings())) == repr(processor)


def test_padding_is_refused_and_searches_have_their_steps() -> None:
    processor = VMoBAAttnProcessor(dense_steps=0.25, search_every=3)
    with pytest.raises(ValueError, match="3 padding tokens"):
        processor.set_up(site(0), TokenLayout((1, 2, 2), (0, 4), padding=3), torch.device("cpu"))
    states = [StepState(0, step, 20, "cond", "transformer", 0, LAYOUTS["absent"], None) for step in range(20)]
    sparse = [state for state in states if processor.is_sparse(site(0), state)]
    assert [state.step for state in sparse] == list(range(5, 20))
    assert [state.step for state in sparse if processor.renews(site(0), state)] == [5, 8, 11, 14, 17]


def test_cells_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="12 video tokens from position 3"):
        grid_cells((1, 3, 4), (1, 1, 1), block_q=4, block_kv=4, start=3, length=14)
    with pytest.raises(ValueError, match="each at least 1"):
        grid_cells((1, 3, 4), (1, 0, 1), block_q=4, block_kv=4)
    cells = grid_cells((1, 3, 4), (1, 1, 2), block_q=4, block_kv=4)
    q, k = tensors(1, 1, 13, 0)
    with pytest.raises(ValueError, match="13 tokens, the cells are those of 12"):
        cell_plan(q, k, cells, select="threshold", scope="head", amount=0.5)
    with pytest.raises(ValueError, match="no scope 'cell'"):
        cell_plan(q[:, :12], k[:, :12], cells, select="top_k", scope="cell", amount=1)


@pytest.mark.parametrize(("cell", "cut"), [((1, 1, 1), True), ((2, 3, 2), True), ((2, 3, 2), False)])
def test_the_operator_tells_the_compiler_its_shapes(cell: Any, cut: bool) -> None:
    cells = grid_cells((2, 5, 4), cell, block_q=8, block_kv=8, length=43, cut=cut)
    arguments = (*tensors(1, 2, 43, 8), *cells, torch.tensor([0.4]), "threshold", "head")
    torch.library.opcheck(cell_lists, arguments, test_utils=("test_schema", "test_faketensor"))
