"""AdaSpa against its formulas, in float64 and loops over rows of blocks."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.kernels.search.budget import MassBudget, head_recall, head_shifts, select_mass
from dit_accel.kernels.search.budget_plan import mass_plan
from dit_accel.layout import TokenLayout
from dit_accel.processors import AdaSpaAttnProcessor, processor_by_name
from dit_accel.processors.adaspa import Setup

SITE = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
NO_TEXT = Setup((), 1, torch.device("cpu"))


def case(seed: int) -> dict[str, Any]:
    """An odd length, 1 to 6 heads of unlike sharpness, batch 1 or 2, text before, after or absent."""
    rng = random.Random(seed)
    length, heads, text = rng.randrange(31, 150, 2), rng.randint(1, 6), rng.randint(1, 20)
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rng.choice((1, 2)) if i == 0 else 1, heads, length, 8, generator=generator) for i in range(2))
    sharpness = torch.tensor([rng.choice((0.1, 1.0, 4.0, 9.0)) for _ in range(heads)])
    place = seed % 3  # text absent, before, after
    return {
        "q": q * sharpness[:, None, None],
        "k": k.expand(q.shape[0], -1, -1, -1) + torch.randn(q.shape, generator=generator) / 2,
        "block": rng.choice((5, 8, 16)),
        "text": [(), ((0, text),), ((length - text, length),)][place],
        "density": rng.choice((0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0)),
    }


def softmax_mass(q: Tensor, k: Tensor, block: int) -> list[list[float]]:
    """By definition, for one head: the softmax weights of each block, added up."""
    weights = ((q.double() @ k.double().T) / math.sqrt(q.shape[-1])).softmax(-1)
    return [[float(part.sum()) for part in rows.split(block, 1)] for rows in weights.split(block, 0)]


def touched(text: Any, length: int, block: int) -> set[int]:
    return {token // block for start, stop in text for token in range(start, stop)}


def keep_rows(table: list[list[float]], sinks: set[int], count: int) -> list[set[int]]:
    """Row by row: text, and the best of the other blocks; everything for rows of text."""
    kept = []
    for i, row in enumerate(table):
        ranked = sorted(set(range(len(row))) - sinks, key=row.__getitem__, reverse=True)
        kept.append(set(range(len(row))) if i in sinks else sinks | set(ranked[:count]))
    return kept


def recall_of(table: list[list[float]], kept: list[set[int]]) -> float:
    return sum(row[j] for row, ids in zip(table, kept, strict=True) for j in ids) / sum(map(sum, table))


def level_counts(recalls: list[float], base: int, free: int) -> list[int]:
    """The paper's rule: of H heads, the n best keep half of their density and the n worst half as much again."""
    n = min(sum(recall > 0.8 for recall in recalls), len(recalls) // 2)
    ranked = sorted(range(len(recalls)), key=lambda head: -recalls[head])
    less = max(math.ceil(base / 2), 2 * base - free)  # no head can keep more than all
    counts = [base] * len(recalls)
    for best, worst in zip(ranked[:n], ranked[::-1][:n], strict=True):
        counts[best], counts[worst] = less, 2 * base - less
    return counts


def as_mask(rows: list[set[int]], columns: int) -> Tensor:
    return torch.tensor([[j in ids for j in range(columns)] for ids in rows])


@pytest.mark.parametrize("seed", range(60))
def test_mask_is_that_of_the_formula(seed: int) -> None:
    made = case(seed)
    q, k, block, density = made["q"], made["k"], made["block"], made["density"]
    layout_text, length = made["text"], q.shape[2]
    processor = AdaSpaAttnProcessor(density=density, levels=seed % 4 != 0)
    processor.block = block
    found = processor.find_plan(q, k, Setup(layout_text, 1, q.device), scale=None).to_bool()
    columns = -(-length // block)
    sinks = touched(layout_text, length, block)
    free = columns - len(sinks)
    base = math.ceil(density * free - 1e-9)
    for b in range(q.shape[0]):
        tables = [softmax_mass(q[b, h], k[b, h], block) for h in range(q.shape[1])]
        recalls = [recall_of(table, keep_rows(table, sinks, base)) for table in tables]
        counts = level_counts(recalls, base, free) if seed % 4 else [base] * len(tables)
        wanted = [as_mask(keep_rows(t, sinks, c), columns) for t, c in zip(tables, counts, strict=True)]
        assert torch.equal(found[b], torch.stack(wanted))
        video = [i for i in range(columns) if i not in sinks]
        assert found[b][:, video].sum((1, 2)).sum() == len(video) * q.shape[1] * (base + len(sinks))  # the mean


@pytest.mark.parametrize(
    ("recalls", "shifts"),
    [
        ([0.9, 0.5, 0.6, 0.7], [-1, 1, 0, 0]),
        ([0.7, 0.8, 0.3, 0.5], [0, 0, 0, 0]),  # above 0.8, not at it
        ([0.9, 0.95, 0.85, 0.2], [-1, -1, 1, 1]),  # n = 3 of 4 heads: half of them at most
        ([0.9, 0.95, 0.85, 0.99, 0.97], [1, 0, 1, -1, -1]),  # all of an odd number
        ([0.9, 0.9], [-1, 1]),  # equal ones in their order
        ([0.99], [0]),
    ],
)
def test_levels(recalls: list[float], shifts: list[int]) -> None:
    assert head_shifts(torch.tensor([recalls])).tolist() == [shifts]


def test_levels_are_of_each_batch_item() -> None:
    assert head_shifts(torch.tensor([[0.9, 0.1], [0.1, 0.1]])).tolist() == [[-1, 1], [0, 0]]


@pytest.mark.parametrize("over", ["row", "head"])
@pytest.mark.parametrize("seed", range(8))
def test_a_recall_is_met_by_the_fewest_blocks(over: Any, seed: int) -> None:
    made, recall = case(seed), (0.5, 0.75, 0.9, 1.0)[seed % 4]
    q, k, block = made["q"], made["k"], made["block"]
    budget = MassBudget(recall=recall, recall_over=over, min_density=0)
    plan, _ = mass_plan(q.transpose(1, 2), k.transpose(1, 2), block=block, budget=budget, text=made["text"])
    kept, sinks = plan.to_bool(), touched(made["text"], q.shape[2], block)
    video = [i for i in range(kept.shape[-1]) if i not in sinks]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            table = softmax_mass(q[b, h], k[b, h], block)
            ids = [set(row.nonzero().flatten().tolist()) for row in kept[b, h]]
            counts = [len(ids[i]) - len(sinks) for i in video]
            if over == "head":
                assert len(set(counts)) == 1
                groups = [list(range(len(table)))]
            else:
                groups = [[i] for i in video]
            for group in groups:
                part = [table[i] for i in group]
                assert recall_of(part, [ids[i] for i in group]) >= recall - 1e-5
                count = counts[video.index(next(i for i in group if i in video))]
                fewer = [keep_rows(table, sinks, count - 1)[i] for i in group]
                assert count == 1 or recall_of(part, fewer) < recall + 1e-5


def test_a_recall_stays_within_its_bounds() -> None:
    mass = torch.full((1, 2, 3, 10), 0.01)
    mass[:, 0, :, 4] = 10  # one block is enough in the first head, hardly all in the second
    none = torch.zeros(3, 10, dtype=torch.bool)
    for over in ("row", "head"):
        budget = MassBudget(recall=0.95, recall_over=over, min_density=0.21, max_density=0.6)
        assert select_mass(mass, budget, always=none, sinks=0).sum(-1).tolist() == [[[3] * 3, [6] * 3]]
        assert budget.most(10) == 6


def test_a_log_sum_exp_of_long_ago_does_no_harm() -> None:
    mass = torch.rand(1, 4, 3, 10)
    mass[0, 0, 1, 7] = mass[0, 1, 0, 0] = math.inf
    always = torch.zeros(3, 10, dtype=torch.bool)
    for budget in (MassBudget(), MassBudget(recall=0.9), MassBudget(recall=0.9, recall_over="head")):
        kept = select_mass(mass, budget, always=always, sinks=0)
        assert kept[0, 0, 1, 7] and kept[0, 1, 0, 0] and kept.any(-1).all()
    assert not head_recall(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).isnan().any()


@pytest.mark.parametrize("text", [(), ((0, 30),), ((170, 200),)])
def test_the_same_count_in_every_row_and_lists_as_wide_as_the_longest(text: Any) -> None:
    q, k = torch.randn(2, 1, 200, 6, 8)
    q[:, :, :2] += 3
    k[:, 40:48, :2] += 3  # holds nearly all in two heads of six
    plan, lse = mass_plan(q, k, block=8, budget=MassBudget(), text=text)
    assert plan.indices.shape[-1] == (25 if text else 7)  # 5 of 25 blocks, and 2 more at the upper level
    counts = plan.counts[0][:, 10:15]
    assert (counts == counts[:, :1]).all() and len(set(counts[:, 0].tolist())) == 3
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-4)


@pytest.mark.parametrize("text", [(), ((0, 30),)])
def test_counts_stand_in_for_the_density(text: Any) -> None:
    q, k = torch.randn(2, 2, 200, 4, 8)
    q[:, :, :1] += 3
    k[:, 40:48, :1] += 3  # levels move blocks to other heads
    free = 25 - (4 if text else 0)
    for levels in (True, False):
        budget = MassBudget(density=0.3, levels=levels)
        count = torch.tensor([[math.ceil(0.3 * free)]])
        by_density, _ = mass_plan(q, k, block=8, budget=budget, text=text)
        by_count, _ = mass_plan(q, k, block=8, budget=MassBudget(levels=levels), text=text, counts=count)
        assert torch.equal(by_count.to_bool(), by_density.to_bool())
    counts = torch.tensor([[1], [3], [9], [25]]).clamp(max=free)
    plan, _ = mass_plan(q, k, block=8, budget=MassBudget(levels=False), text=text, counts=counts)
    for head, count in enumerate(counts[:, 0].tolist()):
        part, one = MassBudget(density=count / free, levels=False), slice(head, head + 1)
        alone, _ = mass_plan(q[:, :, one], k[:, :, one], block=8, budget=part, text=text)
        assert torch.equal(plan.to_bool()[:, one], alone.to_bool())


def test_heads_of_unlike_counts_move_what_each_of_them_can() -> None:
    mass = torch.full((1, 2, 3, 10), 0.01)
    mass[:, 0, :, 4] = 10  # one block holds nearly all in the first head, hardly anything in the second
    none = torch.zeros(3, 10, dtype=torch.bool)
    kept = select_mass(mass, MassBudget(), always=none, sinks=0, counts=torch.tensor([[6], [8]]))
    assert kept.sum(-1).tolist() == [[[3] * 3, [10] * 3]]  # half of 6 given; 8 and the 2 that are left


def test_later_searches_use_the_cached_log_sum_exp() -> None:
    made = case(2)
    processor, uncached = AdaSpaAttnProcessor(), AdaSpaAttnProcessor(cache_lse=False)
    processor.block = uncached.block = made["block"]
    q, k, moved = made["q"], made["k"], made["q"] + torch.randn(made["q"].shape)
    _, memory = processor.search(q, k, NO_TEXT, None, scale=None)
    later, kept = processor.search(moved, k, NO_TEXT, memory, scale=None)
    assert kept[-1] is memory[-1]
    scores = (moved.double() @ k.double().transpose(-1, -2)) / math.sqrt(8)
    weights = (scores - memory[-1].double()[..., None]).exp()  # of queries that have moved on since
    mass = torch.stack([torch.stack([c.sum((-2, -1)) for c in r.split(processor.block, -1)], -1)
                        for r in weights.split(processor.block, -2)], -2)  # fmt: skip
    always = torch.zeros(mass.shape[-2:], dtype=torch.bool)
    assert torch.equal(later.to_bool(), select_mass(mass, processor.budget, always=always, sinks=0))
    assert uncached.search(q, k, NO_TEXT, None, scale=None)[1] == ()


def state(step: int, steps: int | None) -> StepState:
    return StepState(0, step, steps, "cond", "transformer", 0, TokenLayout.video_only((1, 2, 2)), None)


@pytest.mark.parametrize(
    ("steps", "first", "again"),
    [(50, 10, 30), (40, 8, 24), (30, 6, 18), (25, 5, 15), (12, 3, 8), (5, 1, 3), (4, 1, 3)],
)
def test_searches_are_at_20_and_60_percent(steps: int, first: int, again: int) -> None:
    processor = AdaSpaAttnProcessor()
    assert next(s for s in range(steps) if processor.is_sparse(SITE, state(s, steps))) == first
    assert [s for s in range(steps) if processor.renews(SITE, state(s, steps))] == [again]
    counted = AdaSpaAttnProcessor(search_again=[first, 20, 0.9999])
    assert [s for s in range(30) if counted.renews(SITE, state(s, 30))] == sorted({first, 20})


def test_fractions_need_the_number_of_steps() -> None:
    processor = AdaSpaAttnProcessor(dense_steps=2)
    with pytest.raises(ValueError, match=r"search_again=0.6 is a fraction.*Give an int"):
        processor.renews(SITE, state(3, None))
    assert AdaSpaAttnProcessor(dense_steps=2, search_again=[3]).renews(SITE, state(3, None))


def test_drift_is_the_cosine_of_mean_vectors() -> None:
    processor = AdaSpaAttnProcessor(drift=0.3, cache_lse=False)
    processor.block = 8
    q, k = torch.randn(2, 2, 3, 21, 4) + 1
    _, memory = processor.search(q, k, NO_TEXT, None, scale=None)
    assert processor.measure(q, k * 3, memory).item() == pytest.approx(1)  # longer is not elsewhere
    later = k + torch.randn(k.shape)
    cosines = []
    for b in range(2):
        for h in range(3):
            now, then = (torch.cat([p.double().mean(0) for p in x[b, h].split(8)]) for x in (later, k))
            cosines.append(float(now @ then / now.norm() / then.norm()))
    assert processor.measure(q, later, memory).item() == pytest.approx(sum(cosines) / 6, rel=1e-5)
    assert processor.has_drifted(torch.tensor([0.9, 0.69])) and not processor.has_drifted(torch.tensor([0.9, 0.71]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"density is a part in \(0, 1\].*got 0.0"),
        ({"density": 1.2}, r"\(0, 1\]"),
        ({"density": math.nan}, "nan"),
        ({"recall": 0}, r"recall is a part in \(0, 1\]"),
        ({"recall": 1.01}, "1.01"),
        ({"recall": 0.9, "density": 0.2}, "two budgets"),
        ({"recall": 0.9, "recall_over": "block"}, "'row' or 'head'"),
        ({"recall": 0.9, "min_density": 0.5, "max_density": 0.4}, "max_density=0.4"),
        ({"recall": 0.9, "max_density": 0.0}, "max_density is a part"),
        ({"block": 32}, "64 or 128"),
        ({"drift": 0}, r"\(0, 2\)"),
        ({"drift": 2.5}, "2.5"),
        ({"search_again": 0.6}, "list of steps"),
        ({"search_again": [1.5]}, "1.5"),
        ({"search_again": [1.0]}, r"\[0, 1\) .*got 1.0"),  # behind the last step
        ({"search_again": [-1]}, "-1"),
        ({"search_again": ["half"]}, "half"),
    ],
)
def test_bad_settings_say_what_is_valid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("adaspa", **settings)


@pytest.mark.parametrize("settings", [{}, {"recall": 0.8, "drift": 0.1}, {"density": 0.4, "search_again": [7]}])
def test_settings_build_an_equal_recipe(settings: dict[str, Any]) -> None:
    processor = AdaSpaAttnProcessor(**settings)
    assert repr(AdaSpaAttnProcessor(**processor.settings())) == repr(processor)


def test_the_published_settings_are_the_default() -> None:
    processor = AdaSpaAttnProcessor()
    assert (processor.density, processor.block, processor.search_again) == (0.2, 64, (0.6,))
    assert processor.schedule.dense_step_count(50) == 10 and processor.drift is None and processor.cache_lse


def test_text_is_taken_from_the_layout_and_padding_is_refused() -> None:
    layout = TokenLayout((1, 5, 5), (7, 32), text=(0, 7))
    assert AdaSpaAttnProcessor().set_up(SITE, layout, torch.device("cpu")).text == ((0, 7),)
    with pytest.raises(ValueError, match="3 padding tokens"):
        AdaSpaAttnProcessor().set_up(SITE, replace(layout, padding=3), torch.device("cpu"))
