"""Bipartite soft matching against loops over single tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.agent import merging
from dit_accel.kernels.agent.merging import TokenMerge, TokenPairs, draw_destinations, match_tokens, pair_tokens

Sizes = tuple[int, int, int]
CASES: list[tuple[Sizes, Sizes]] = [
    ((1, 8, 8), (1, 4, 4)),
    ((1, 5, 7), (1, 2, 2)),
    ((3, 5, 7), (2, 2, 4)),
    ((1, 3, 3), (1, 1, 1)),
    ((2, 3, 5), (9, 9, 9)),
]


def metric(grid: Sizes, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(grid))
    return torch.randn(batch, math.prod(grid), 6, generator=generator).to(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells_of(grid: Sizes, cell: Sizes) -> list[set[int]]:
    """Raster tokens of each cell."""
    members: dict[Sizes, set[int]] = {}
    for token in range(math.prod(grid)):
        t, rest = divmod(token, grid[1] * grid[2])
        h, w = divmod(rest, grid[2])
        members.setdefault((t // cell[0], h // cell[1], w // cell[2]), set()).add(token)
    return [members[which] for which in sorted(members)]


def loop_merge(x: Tensor, destinations: list[int], ratio: float) -> tuple[list[int], Tensor, Tensor]:
    """One batch item, by the words of the method: kept tokens, merged tokens, and what unmerging gives."""
    tokens = len(x)
    edges = []
    for source in sorted(set(range(tokens)) - set(destinations)):
        cosine = [float(torch.cosine_similarity(x[source].double(), x[d].double(), dim=0)) for d in destinations]
        best = max(range(len(destinations)), key=cosine.__getitem__)
        edges.append((cosine[best], source, destinations[best]))
    edges.sort(key=lambda edge: -edge[0])
    merged_into = {source: target for _, source, target in edges[: math.floor(tokens * ratio)]}
    kept = [token for token in range(tokens) if token not in merged_into]
    short, back = [], [x[0]] * tokens
    for token in kept:
        members = [token, *(source for source, target in merged_into.items() if target == token)]
        mean = x[members].double().mean(0).to(x.dtype) if len(members) > 1 else x[token]
        short.append(mean)
        for member in members:
            back[member] = mean
    return kept, torch.stack(short), torch.stack(back)


def destinations_of(pairs: TokenPairs, item: int) -> list[int]:
    return sorted(set(range(pairs.tokens)) - set(pairs.sources[item].tolist()))


@pytest.mark.parametrize(("grid", "cell"), CASES)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("drawn", [False, True])
def test_merge_and_unmerge_equal_the_loop(grid: Sizes, cell: Sizes, ratio: float, drawn: bool) -> None:
    x = metric(grid)
    pairs = match_tokens(x, grid, cell, generator=seeded() if drawn else None)
    merge = pairs.merge_ratio(ratio)
    short = merge.merge(x)
    sources = x.shape[1] - len(cells_of(grid, cell))
    assert short.shape[1] == x.shape[1] - min(math.floor(x.shape[1] * ratio), sources)
    for item in range(3):
        kept, expected, back = loop_merge(x[item], destinations_of(pairs, item), ratio)
        assert merge.kept[item].tolist() == kept
        torch.testing.assert_close(short[item], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merge.unmerge(short)[item], back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("grid", "cell"), CASES)
@pytest.mark.parametrize("drawn", [False, True])
def test_one_destination_in_each_cell(grid: Sizes, cell: Sizes, drawn: bool) -> None:
    cells = cells_of(grid, cell)
    seen: list[set[int]] = [set() for _ in cells]
    for seed in range(20):
        pairs = match_tokens(metric(grid), grid, cell, generator=seeded(seed) if drawn else None)
        for item in range(3):
            destinations = set(destinations_of(pairs, item))
            assert set(pairs.targets[item].tolist()) <= destinations
            for place, members in zip(seen, cells, strict=True):
                assert len(destinations & members) == 1
                place |= destinations & members
    if drawn:  # sixty draws reach more than one token of a cell; partial cells included
        assert all(len(place) > 1 for place, members in zip(seen, cells, strict=True) if len(members) > 1)
    else:
        assert [min(members) for members in cells] == [place.pop() for place in seen]


def test_one_draw_serves_all_items_and_compiled_code_chooses_the_same() -> None:
    x = metric((2, 5, 7), batch=4)
    one, two = (draw_destinations((2, 5, 7), (1, 2, 2), seeded(), draws) for draws in (1, 2))
    pairs = pair_tokens(x, one)
    assert all(destinations_of(pairs, item) == sorted(one[0].tolist()) for item in range(4))
    pairs = pair_tokens(x, two)
    assert [destinations_of(pairs, item) for item in range(4)] == [sorted(draw.tolist()) for draw in (*two, *two)]
    compiled = torch.compile(lambda x, d: pair_tokens(x, d).merge_ratio(0.4).slot, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, two), pairs.merge_ratio(0.4).slot)
    with pytest.raises(ValueError, match=r"batch of 3 .* takes draws that divide it"):
        pair_tokens(x[:3], two)


def test_pairs_are_sorted_by_cosine() -> None:
    x = metric((3, 5, 7))
    pairs = match_tokens(x * torch.rand(3, 105, 1).add(0.1), (3, 5, 7), (1, 2, 2))
    assert bool((pairs.similarity.diff(dim=1) <= 0).all())
    for item in range(3):
        cosine = torch.cosine_similarity(x[item, pairs.sources[item]], x[item, pairs.targets[item]], dim=-1)
        torch.testing.assert_close(pairs.similarity[item], cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_not_merged_stays_bit_equal(dtype: torch.dtype) -> None:
    x = metric((1, 9, 11), dtype=dtype)
    merge = match_tokens(x, (1, 9, 11), (1, 2, 2), generator=seeded()).merge_ratio(0.4)
    back = merge.unmerge(merge.merge(x))
    alone = merge.counts.gather(1, merge.slot) == 1
    assert back.dtype == dtype and 0 < int(alone.sum()) < alone.numel()
    assert torch.equal(back[alone], x[alone])
    assert not torch.equal(back[~alone], x[~alone])
    assert torch.equal(merge.counts.sum(1), torch.full((3,), 99))


def test_ratio_zero_is_the_identity() -> None:
    x = metric((1, 5, 7))
    merge = match_tokens(x, (1, 5, 7), (1, 2, 2), generator=seeded()).merge_ratio(0.0)
    assert torch.equal(merge.merge(x), x) and torch.equal(merge.unmerge(x), x)
    assert torch.equal(merge.slot, torch.arange(35).expand(3, -1))


def same(one: TokenMerge, other: TokenMerge) -> bool:
    return torch.equal(one.slot, other.slot)


def test_the_generator_decides() -> None:
    x = metric((1, 8, 8))
    merges = [match_tokens(x, (1, 8, 8), (1, 4, 4), generator=seeded(seed)).merge_ratio(0.4) for seed in (0, 0, 1)]
    assert same(merges[0], merges[1]) and not same(merges[0], merges[2])


def test_batch_items_are_independent() -> None:
    x = metric((1, 8, 8))
    changed = x.clone()
    changed[1] = torch.randn(64, 6, generator=seeded(9))
    one, other = (match_tokens(t, (1, 8, 8), (1, 4, 4), generator=seeded()).merge_ratio(0.4) for t in (x, changed))
    assert torch.equal(one.slot[[0, 2]], other.slot[[0, 2]]) and not torch.equal(one.slot[1], other.slot[1])
    assert torch.equal(one.merge(x)[[0, 2]], other.merge(changed)[[0, 2]])


def test_guidance_branches_share_their_destinations() -> None:
    x = metric((1, 8, 8), batch=6)
    free = match_tokens(x, (1, 8, 8), (1, 4, 4), generator=seeded())
    shared = match_tokens(x, (1, 8, 8), (1, 4, 4), generator=seeded(), share=2)
    for item in range(3):
        assert destinations_of(shared, item) == destinations_of(shared, item + 3)
        assert destinations_of(free, item) != destinations_of(free, item + 3)
    assert destinations_of(shared, 0) != destinations_of(shared, 1)


def test_similarities_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = metric((1, 9, 11))
    whole = match_tokens(x, (1, 9, 11), (1, 3, 3))
    monkeypatch.setattr(merging, "_SCORE_CHUNK", 50)
    parts = match_tokens(x, (1, 9, 11), (1, 3, 3))
    assert torch.equal(whole.sources, parts.sources) and torch.equal(whole.targets, parts.targets)


def test_gradients_flow_through_merge_and_unmerge() -> None:
    x = metric((1, 5, 7), dtype=torch.float64).requires_grad_()
    merge = match_tokens(x, (1, 5, 7), (1, 2, 2)).merge_ratio(0.4)
    assert not merge.slot.requires_grad
    assert torch.autograd.gradcheck(lambda t: merge.unmerge(merge.merge(t)), (x,))


def test_agents_are_a_deeper_merge_of_the_same_pairs() -> None:
    """Settings of AgentSD: a sixteenth of the tokens are agents."""
    x = metric((1, 16, 16))
    pairs = match_tokens(x, (1, 16, 16), (1, 4, 4), generator=seeded())
    assert pairs.merge_ratio(0.4).merge(x).shape[1] == 256 - 102
    assert pairs.merge_ratio(0.95).merge(x).shape[1] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": (1, 5, 6)}, "floating point"),
        ({"grid": (0, 5, 7)}, "grid is"),
        ({"cell": (1, 0, 2)}, "cell is"),
        ({"share": 2}, "batch of 3"),
        ({"share": 0}, "batch of 3"),
    ],
)
def test_bad_matching(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_tokens(metric((1, 5, 7)), **({"grid": (1, 5, 7), "cell": (1, 2, 2)} | settings))


def test_bad_merging() -> None:
    pairs = match_tokens(metric((1, 5, 7)), (1, 5, 7), (1, 2, 2))
    with pytest.raises(ValueError, match="from 0 to 1"):
        pairs.merge_ratio(1.5)
    merge = pairs.merge_ratio(0.4)
    for call in (merge.merge, merge.unmerge):
        with pytest.raises(ValueError, match=r"this merge takes \[3, "):
            call(torch.zeros(2, 35, 6))
