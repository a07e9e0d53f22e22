"""Selection rules: what each keeps, ties, always-kept blocks, minimum, and the lists made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels.search import select as select_module
from dit_accel.kernels.search.running import running_sum, sum_by_doubling
from dit_accel.kernels.search.select import row_lists, select_threshold, select_topk, select_topp

LEAD = (2, 3, 7)


def scores(cols: int = 13, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are everywhere.
    return torch.randint(0, 5, (*LEAD, cols), generator=generator).float() / 4


def forced(cols: int = 13) -> Tensor:
    mask = torch.zeros(7, cols, dtype=torch.bool)
    mask[:, 4] = True
    mask[5] = True
    return mask


def rows_of(*tensors: Tensor) -> Any:
    flat = [t.expand(*LEAD, t.shape[-1]).reshape(-1, t.shape[-1]).tolist() for t in tensors]
    return zip(*flat, strict=True)


def ranked(row: list[float], always: list[bool]) -> list[int]:
    return sorted(range(len(row)), key=lambda j: (not always[j], -row[j], j))


@pytest.mark.parametrize("with_always", [False, True])
@pytest.mark.parametrize("minimum", [0, 1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 5, 13, 99])
def test_topk(count: int, minimum: int, with_always: bool) -> None:
    x, always = scores(), forced()
    kept = select_topk(x, count, always=always if with_always else None, minimum=minimum)
    for row, must, got in rows_of(x, always & with_always, kept):
        wanted = ranked(row, must)[: max(count, minimum, sum(must))]
        assert [j for j, on in enumerate(got) if on] == sorted(wanted)


@pytest.mark.parametrize("with_always", [False, True])
@pytest.mark.parametrize("minimum", [0, 1, 3])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_topp_keeps_enough_mass_and_no_block_too_many(share: float, minimum: int, with_always: bool) -> None:
    # Multiples of 1/4, so that the sums below are exact.
    x, always = scores(), forced()
    kept = select_topp(x, share, always=always if with_always else None, minimum=minimum)
    for row, must, got in rows_of(x, always & with_always, kept):
        order = ranked(row, must)
        count = next(n for n in range(len(row) + 1) if sum(row[j] for j in order[:n]) >= share * sum(row))
        wanted = order[: max(count, minimum, sum(must))]
        assert [j for j, on in enumerate(got) if on] == sorted(wanted)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_topp_on_a_softmax(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mass = torch.randn(2, 3, 7, 1000, generator=generator).mul(3).softmax(-1)
    kept = select_topp(mass, share)
    held = mass.double().where(kept, 0).sum(-1)
    assert (held >= share * mass.double().sum(-1)).all()
    # Without the weakest kept block it would not be enough.
    weakest = mass.double().where(kept, 2).amin(-1)
    assert (held - weakest < share * mass.double().sum(-1)).all()
    # What is kept is the best: nothing dropped is above it.
    assert (mass.where(~kept, 0).amax(-1) <= weakest).all()


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_running_sums_by_doubling(length: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(2, 3, length, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sum_by_doubling(x), x.cumsum(-1), rtol=1e-12, atol=0)
    exact = (x * 100).floor()
    assert torch.equal(sum_by_doubling(exact), exact.cumsum(-1))
    assert torch.equal(running_sum(x), x.cumsum(-1))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_topp_keeps_the_same_by_such_sums(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = select_topp(scores(), share)
    monkeypatch.setattr(select_module, "running_sum", sum_by_doubling)
    assert torch.equal(select_topp(scores(), share), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_topp_on_a_gpu_in_the_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        found = select_topp(scores().cuda(), 0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.cpu(), select_topp(scores(), 0.5))


@pytest.mark.parametrize("with_always", [False, True])
@pytest.mark.parametrize("minimum", [0, 1, 3])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.0, 2.0])
def test_threshold(threshold: float, minimum: int, with_always: bool) -> None:
    x, always = scores(), forced()
    kept = select_threshold(x, threshold, always=always if with_always else None, minimum=minimum)
    for row, must, got in rows_of(x, always & with_always, kept):
        best = ranked(row, must)[:minimum]
        wanted = [must[j] or row[j] >= threshold or j in best for j in range(len(row))]
        assert got == wanted


@pytest.mark.parametrize("select", [select_topk, select_topp, select_threshold])
def test_amounts_per_head_and_row(select: Any) -> None:
    x = scores()
    amounts = torch.tensor([1, 4, 9]) if select is select_topk else torch.tensor([0.2, 0.5, 0.9])
    kept = select(x, amounts[:, None])
    for head, amount in enumerate(amounts.tolist()):
        assert torch.equal(kept[:, head], select(x[:, head], amount))


def test_ties_go_to_the_lowest_block() -> None:
    same = torch.ones(2, 9)
    assert select_topk(same, 3)[0].tolist() == [True] * 3 + [False] * 6
    assert select_topp(same, 0.5)[0].tolist() == [True] * 5 + [False] * 4
    assert torch.equal(select_topk(scores(), 4), select_topk(scores(), 4))


def test_rows_without_any_mass_keep_the_minimum() -> None:
    kept = select_topp(torch.zeros(1, 6), 0.9, minimum=2)
    assert kept[0].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("capacity", [None, 9, 20])
def test_lists_hold_ascending_ids_then_zeros(capacity: int | None) -> None:
    keep = scores() > 0.7
    keep[0, 0, 0] = False
    keep[0, 0, 1] = torch.arange(13) < 9
    keep &= keep.cumsum(-1) <= 9
    indices, counts = row_lists(keep, capacity=capacity)
    assert indices.shape == (*LEAD, capacity or 13)
    assert indices.dtype == counts.dtype == torch.int32
    for row, got, count in zip(
        keep.reshape(-1, 13), indices.reshape(-1, indices.shape[-1]), counts.reshape(-1), strict=True
    ):
        wanted = row.nonzero()[:, 0].tolist()
        assert int(count) == len(wanted)
        assert got.tolist() == wanted + [0] * (len(got) - len(wanted))


def test_lists_that_are_too_narrow_stay_within_bounds() -> None:
    indices, counts = row_lists(torch.ones(1, 5, dtype=torch.bool), capacity=3)
    assert indices.tolist() == [[0, 1, 2]] and counts.tolist() == [3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: select_topk(x.long(), 1), "floating"),
        (lambda x: select_topk(x[0, 0, 0], 1), "floating"),
        (lambda x: select_topk(x, -1), "count must not be negative"),
        (lambda x: select_topk(x, 1, minimum=-1), "minimum must not be negative"),
        (lambda x: select_topp(x, 1.1), "between 0 and 1"),
        (lambda x: select_topp(x, 0.5, always=torch.ones(7, 12, dtype=torch.bool)), "broadcast"),
        (lambda x: select_topp(x, 0.5, always=torch.ones(2, 7, 13, dtype=torch.bool)), "broadcast"),
        (lambda x: select_threshold(x, 0.5, always=torch.ones(7, 13)), "must be bool"),
        (lambda x: row_lists(x), "keep must be bool"),
        (lambda x: row_lists(x > 0, capacity=0), "capacity"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(scores())
