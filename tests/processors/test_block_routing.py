"""Block routing against the formulas, in loops over blocks and single pairs."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.clock import StepState
from dit_accel.controls import SiteInfo
from dit_accel.kernels.convert import plan_from_element_mask
from dit_accel.kernels.search.plan import count_density, device_density
from dit_accel.kernels.sparse_plan import SparsePlan
from dit_accel.layout import TokenLayout
from dit_accel.processors import BlockRoutingAttnProcessor, processor_by_name

SITE = SiteInfo("blocks.1.attn1", "self", 1, 3, "transformer")
BLOCK = 64
VIDEO = 5 * 7 * 9  # an odd grid: the last block is short
LAYOUTS = {
    "text absent": TokenLayout.video_only((5, 7, 9)),
    "text after": TokenLayout((5, 7, 9), (0, VIDEO), text=(VIDEO, VIDEO + 37)),
    "text before": TokenLayout((5, 7, 9), (37, 37 + VIDEO), text=(0, 37)),
}
AMOUNTS: list[tuple[str, Any]] = [("top_k", 0.4), ("top_k", 2), ("top_p", 0.6), ("threshold", 1.2)]


def tensors(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys that drift along the sequence, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(2, 3, 5, 16, generator=generator).repeat_interleave(-(-length // 5), 2)[:, :, :length]
    q, k = (torch.randn(2, 3, length, 16, generator=generator) + drift for _ in range(2))
    return q, k


def plan_of(processor: BlockRoutingAttnProcessor, layout: TokenLayout, q: Tensor, k: Tensor) -> SparsePlan:
    return processor.find_plan(q, k, processor.set_up(SITE, layout, q.device), scale=None)


def spans(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def log_mass(score: str, q: Tensor, k: Tensor) -> list[list[float]]:
    """By definition, for one head: log of each block's sum of exponentials (mass), or what stands for it."""
    q, k = q.double(), k.double()
    logits = (q @ k.T) / 4
    rows, columns = spans(len(q), BLOCK), spans(len(k), BLOCK)
    if score == "mass":
        weights = logits.softmax(-1)
        return [[math.log(float(weights[i, j].sum())) for j in columns] for i in rows]
    if score == "pooled":
        return [[float(logits[i, j].mean()) + math.log(j.stop - j.start) for j in columns] for i in rows]
    table = []
    for i in rows:
        row = []
        for j in columns:
            parts = itertools.product(spans(i.stop - i.start, BLOCK // 4), spans(j.stop - j.start, BLOCK // 4))
            terms = [(logits[i, j][a, b]) for a, b in parts]
            row.append(math.log(sum(part.numel() * math.exp(float(part.mean())) for part in terms)))
        table.append(row)
    return table


def wanted_blocks(select: str, amount: Any, scores: list[float], always: set[int]) -> set[int]:
    """By definition, for one row: always-kept blocks count first, then the best."""
    weights = [math.exp(score - max(scores)) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    ranked = sorted(range(len(scores)), key=lambda j: (j not in always, -scores[j]))
    if select == "threshold":
        kept = {j for j in ranked if shares[j] >= amount / len(scores)}
        return kept | always or {max(range(len(scores)), key=scores.__getitem__)}
    if select == "top_k":
        count = amount if isinstance(amount, int) else math.ceil(amount * len(scores) - 1e-9)
    else:
        count = next(n for n in range(len(scores) + 1) if sum(shares[j] for j in ranked[:n]) >= amount - 1e-12)
    return set(ranked[: max(count, len(always), 1)])


def expected(processor: BlockRoutingAttnProcessor, layout: TokenLayout, q: Tensor, k: Tensor) -> Tensor:
    """The kept blocks of every batch item and head, by loops."""
    blocks = spans(layout.length, BLOCK)
    ranges = [layout.text] if layout.text else []
    if processor.first_frame:
        ranges.append((layout.visual[0], layout.visual[0] + layout.frame_tokens))
    always = {j for j, part in enumerate(blocks) for a, b in ranges if part.start < b and part.stop > a}
    full = {
        j
        for j, part in enumerate(blocks)
        if layout.text and part.start < layout.text[1] and part.stop > layout.text[0]
    }
    mask = torch.zeros(2, 3, len(blocks), len(blocks), dtype=torch.bool)
    for b, h in itertools.product(range(2), range(3)):
        tables = [log_mass(processor.score, q[b, head], k[b, head]) for head in range(3)]
        if processor.head_shared:
            together = [x[b].transpose(0, 1).flatten(1) * math.sqrt(s) for x, s in ((q, 1 / 3), (k, 1 / 3))]
            table = log_mass(processor.score, *together)
        else:
            table = tables[h]
        for i, row in enumerate(table):
            kept = (
                set(range(len(blocks)))
                if i in full
                else wanted_blocks(processor.select, processor.amount, row, always)
            )
            mask[b, h, i, list(kept)] = True
    return mask


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("select", "amount"), AMOUNTS)
@pytest.mark.parametrize("score", ["pooled", "sub_block", "mass"])
def test_blocks_are_those_of_the_formula(score: Any, select: Any, amount: Any, layout: TokenLayout) -> None:
    processor = BlockRoutingAttnProcessor(score=score, select=select, amount=amount, block=BLOCK)
    q, k = tensors(layout.length)
    found = plan_of(processor, layout, q, k).to_bool()
    assert torch.equal(found, expected(processor, layout, q, k))
    assert not found.all()


@pytest.mark.parametrize(
    "options", [{"first_frame": True}, {"head_shared": True}, {"score": "sub_block", "head_shared": True}]
)
def test_options_follow_the_formula_too(options: dict[str, Any]) -> None:
    processor = BlockRoutingAttnProcessor(select="top_p", amount=0.6, block=BLOCK, **options)
    layout = LAYOUTS["text before"]
    q, k = tensors(layout.length)
    plan = plan_of(processor, layout, q, k)
    assert plan.indices.shape[1] == (1 if processor.head_shared else 3)
    assert torch.equal(plan.to_bool().expand(2, 3, -1, -1), expected(processor, layout, q, k))


def test_everything_is_kept_at_full_amount() -> None:
    q, k = tensors(VIDEO)
    for select in ("top_k", "top_p"):
        processor = BlockRoutingAttnProcessor(select=select, amount=1.0, block=BLOCK)
        assert plan_of(processor, LAYOUTS["text absent"], q, k).to_bool().all()


@pytest.mark.parametrize(("select", "amount"), AMOUNTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_density_on_the_device_is_exact(layout: TokenLayout, select: Any, amount: Any) -> None:
    plan = plan_of(
        BlockRoutingAttnProcessor(select=select, amount=amount, block=BLOCK), layout, *tensors(layout.length)
    )
    exact = plan.element_mask().double().mean().item()
    assert count_density(plan).density == pytest.approx(exact, abs=1e-12)
    assert device_density(plan).item() == pytest.approx(exact, rel=1e-6)


def test_density_needs_no_value_from_the_device() -> None:
    q, k = (x.to("meta") for x in tensors(VIDEO))  # has shapes but no values to look at
    plan = plan_of(BlockRoutingAttnProcessor(block=BLOCK), LAYOUTS["text absent"], q, k)
    assert device_density(plan).device.type == "meta"


def test_density_of_cut_blocks_needs_none_either() -> None:
    mask = torch.rand(2, 3, 100, 77, generator=torch.Generator().manual_seed(0)) < 0.3
    plan = plan_from_element_mask(mask, block_q=32, block_kv=16, bitmap=True)
    assert device_density(plan).item() == pytest.approx(mask.double().mean().item(), rel=1e-6)
    assert device_density(plan.to("meta")).device.type == "meta"


def state(step: int, steps: int | None = 20) -> StepState:
    return StepState(0, step, steps, "cond", "transformer", 0, LAYOUTS["text absent"], None)


def test_searches_come_every_so_many_steps_after_the_warm_up() -> None:
    processor = BlockRoutingAttnProcessor(search_every=4, dense_steps=0.25)
    assert [step for step in range(20) if processor.is_sparse(SITE, state(step))] == list(range(5, 20))
    assert [step for step in range(5, 20) if processor.renews(SITE, state(step))] == [5, 9, 13, 17]
    assert all(BlockRoutingAttnProcessor(dense_steps=2).renews(SITE, state(step, None)) for step in range(2, 9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "best"}, "pooled, sub_block, mass"),
        ({"select": "best"}, "top_k, top_p, threshold"),
        ({"amount": 0.0}, r"density in \(0, 1\].*got 0.0"),
        ({"amount": 1.01}, r"density in \(0, 1\]"),
        ({"amount": 0}, "from 1"),
        ({"amount": True}, "True"),
        ({"amount": math.nan}, "nan"),
        ({"amount": "half"}, "half"),
        ({"select": "top_p", "amount": 0}, r"\(0, 1\]"),
        ({"select": "top_p", "amount": 1.5}, r"\(0, 1\]"),
        ({"select": "threshold", "amount": 0}, "above 0"),
        ({"select": "threshold", "amount": math.inf}, "above 0"),
        ({"block": 32}, "64 or 128"),
        ({"search_every": 0}, "1 or more"),
        ({"search_every": 2.0}, "1 or more"),
        ({"score": "mass", "head_shared": True}, "head_shared"),
        ({"backends": "auto"}, "unexpected keyword argument 'backends'"),
    ],
)
def test_bad_settings_say_what_is_valid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("block_routing", **settings)


def test_settings_build_an_equal_recipe() -> None:
    processor = BlockRoutingAttnProcessor(score="sub_block", select="threshold", search_every=3, dense_layers=[0, 2])
    assert repr(BlockRoutingAttnProcessor(**processor.settings())) == repr(processor)
    assert processor.settings()["amount"] == 1.0


def test_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="3 padding tokens"):
        BlockRoutingAttnProcessor().set_up(SITE, TokenLayout((1, 2, 2), (0, 4), padding=3), torch.device("cpu"))


def test_keeping_the_first_frame_of_an_image_is_refused() -> None:
    family: Any = SimpleNamespace(makes_video=False, root_class="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="first_frame keeps everything in FluxTransformer2DModel"):
        BlockRoutingAttnProcessor(first_frame=True).check_family(family)
    BlockRoutingAttnProcessor().check_family(family)
