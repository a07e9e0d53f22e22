"""Extrapolation by kept values, against formulas in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.caching.predictors import DMD, AdaptiveLinear, Clipped, Heun, Kept, Place, Predictor, Reuse, Taylor
from dit_accel.caching.predictors.branch_mean import BranchMean

ALL = [
    Taylor(1),
    Taylor(3),
    Taylor(2, form="taylorseer"),
    Heun(),
    DMD(),
    Clipped(Reuse()),
    Clipped(Taylor(2, kappa=None)),
]

steps_going_up = st.lists(st.integers(1, 12), min_size=6, max_size=6)  # gaps between computed steps, then the skip


def place(step: int, sigma: float | None = None) -> Place:
    return Place(step, sigma)


def kept_at(times, values, sigmas=None, probes=None) -> list[Kept]:
    """Newest first from oldest first."""
    sigmas, probes = sigmas or [None] * len(times), probes or [None] * len(times)
    found = [Kept(Place(*at), v, p) for at, v, p in zip(zip(times, sigmas, strict=True), values, probes, strict=True)]
    return found[::-1]


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 3, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(word: str) -> Any:
    """A word that no type allows."""
    return word


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))


# ---- Taylor --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 4), steps_going_up, st.sampled_from(["step", "sigma"]), st.integers(0, 9))
def test_newton_of_order_n_is_exact_on_polynomials_of_degree_n(order, gaps, along, seed):
    times = [sum(gaps[: i + 1]) for i in range(order + 1)]
    at = times[-1] + gaps[-1]
    sigma = lambda step: 1.0 - 0.01 * step - 0.0001 * step**2  # noqa: E731  falls, unevenly
    axis = (lambda step: float(step)) if along == "step" else sigma
    factors = [tokens(seed + power) for power in range(order + 1)]
    exact = lambda step: sum(f * axis(step) ** power for power, f in enumerate(factors))  # noqa: E731
    kept = kept_at(times, [exact(t) for t in times], [sigma(t) for t in times])
    found = Taylor(order, along, kappa=None).predict(kept, place(at, sigma(at)))
    largest = max(float(item.value.abs().max()) for item in kept)
    assert (found - exact(at)).abs().max() <= 1e-6 * max(largest, float(exact(at).abs().max()))


def taylorseer_by_loops(values: list[Tensor], times: list[int], at: int) -> Tensor:
    """The paper's recursion as its cache is filled, computed step by computed step; lists run from the oldest on."""
    ladder: list[Tensor] = []
    last = times[0]
    for value, time in zip(values, times, strict=True):
        fresh = [value]
        for order, before in enumerate(ladder):
            fresh.append((fresh[order] - before) / (time - last))
        ladder, last = fresh, time
    return sum(d * (at - last) ** i / math.factorial(i) for i, d in enumerate(ladder))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 4), steps_going_up, st.booleans())
def test_the_taylorseer_form_is_the_papers_recursion(order, gaps, even):
    gaps = [gaps[0]] * 5 + gaps[-1:] if even else gaps
    times = [sum(gaps[: i + 1]) for i in range(order + 1)]
    values = [tokens(time) for time in times]
    found = Taylor(order, form="taylorseer", kappa=None).predict(kept_at(times, values), place(times[-1] + gaps[-1]))
    wanted = taylorseer_by_loops(values, times, times[-1] + gaps[-1])
    assert relative(found, wanted) < 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps_going_up)
def test_both_forms_are_one_line_at_order_1(gaps):
    kept = kept_at([0, gaps[0]], [tokens(1), tokens(2)])
    at = place(gaps[0] + gaps[1])
    one, other = (Taylor(1, form=form, kappa=None).predict(kept, at) for form in ("newton", "taylorseer"))
    wanted = tokens(2) + gaps[1] / gaps[0] * (tokens(2) - tokens(1))
    assert relative(one, wanted) < 1e-12 and relative(other, wanted) < 1e-12


def test_at_order_2_only_newton_meets_a_parabola():
    """Why there are two forms: differences over gaps are no derivatives at the latest value."""
    kept = kept_at([0, 2, 4], [torch.full((1, 1), float(t * t)) for t in (0, 2, 4)])
    newton, seer = (Taylor(2, form=form, kappa=None).predict(kept, place(6)) for form in ("newton", "taylorseer"))
    assert newton.item() == 36 and seer.item() == 16 + 2 * 6 + 2**2 * 2 / 2 == 32


def test_fewer_values_give_a_lower_order():
    kept = kept_at([0, 3], [tokens(1), tokens(2)])
    assert torch.equal(Taylor(3, kappa=None).predict(kept, place(5)), Taylor(1, kappa=None).predict(kept, place(5)))
    assert torch.equal(Taylor(3).predict(kept[:1], place(5)), tokens(2))


def test_along_sigma_wants_noise_levels():
    with pytest.raises(ValueError, match='along="step"'):
        Taylor(1, "sigma").predict(kept_at([0, 1], [tokens(1), tokens(2)]), place(2))


# ---- the bound -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.floats(0.1, 5), st.sampled_from(ALL), st.integers(1, 30))
def test_no_token_moves_further_than_the_bound(seed, kappa, predictor, skip):
    times = [0, 1, 2, 3, 4, 5]
    values = [tokens(seed + t, 2, 5, 4) for t in times]
    bounded = Clipped(predictor, kappa)
    kept = kept_at(times, values)[: bounded.depth]
    free, found = predictor.predict(kept[: predictor.depth], place(5 + skip)), bounded.predict(kept, place(5 + skip))
    for row in range(2):
        for token in range(5):
            latest, before = values[5][row, token], values[4][row, token]
            wanted, bound = free[row, token] - latest, kappa * float((latest - before).norm())
            length = float(wanted.norm())
            expected = free[row, token] if length <= bound else latest + wanted * (bound / length)
            assert (found[row, token] - expected).norm() <= 1e-5 * (1 + length)


@pytest.mark.parametrize(("gap", "skip"), [(1, 1), (1, 5), (2, 12), (6, 5), (12, 7), (4, 24)])
def test_usual_gaps_are_left_alone_by_default(gap, skip):
    kept = kept_at([0, gap], [tokens(1).float(), tokens(2).float()])
    at = place(gap + skip)
    assert torch.equal(Taylor(1).predict(kept, at), Taylor(1, kappa=None).predict(kept, at))


@pytest.mark.parametrize("predictor", [Taylor(1), Taylor(3), Heun()])
def test_the_bound_is_built_in(predictor):
    kept = kept_at([0, 1, 2, 3], [tokens(s) for s in range(4)])[: predictor.depth]
    moved = (predictor.predict(kept, place(60)) - tokens(3)).norm(dim=-1)
    assert torch.allclose(moved, 6 * (tokens(3) - tokens(2)).norm(dim=-1), rtol=1e-5)


# ---- DiCache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "gain"), [(0.2, 1.0), (1.25, 1.25), (9.0, 1.5)])
def test_the_probe_tells_how_far_to_go(way, gain):
    probes = [tokens(5), tokens(6)]
    kept = kept_at([0, 1], [tokens(1), tokens(2)], probes=probes)
    found = AdaptiveLinear().predict(kept, place(2), probes[0] + way * (probes[1] - probes[0]))
    assert relative(found, tokens(1) + gain * (tokens(2) - tokens(1))) < 1e-5


def test_a_probe_that_stands_still_says_nothing():
    kept = kept_at([0, 1], [tokens(1), tokens(2)], probes=[tokens(5), tokens(5)])
    assert torch.equal(AdaptiveLinear().predict(kept, place(2), tokens(6)), tokens(2))
    assert torch.equal(AdaptiveLinear().predict(kept[:1], place(2), tokens(6)), tokens(2))


def test_it_wants_probes():
    assert AdaptiveLinear.needs_probe and not Reuse().needs_probe
    with pytest.raises(ValueError, match="policy that probes"):
        AdaptiveLinear().predict(kept_at([0, 1], [tokens(1), tokens(2)]), place(2), tokens(6))


# ---- Heun ----------------------------------------------------------------------------------------------------------


def heun_by_loops(values: list[Tensor], times: list[int], at: int) -> Tensor:
    """Slopes of the parabola through three values, by Lagrange's formula; forecast; trapezoid."""

    def slope(xs, ys):
        total = torch.zeros_like(ys[0])
        for i in range(3):
            j, k = [n for n in range(3) if n != i]
            total += ys[i] * ((xs[2] - xs[j]) + (xs[2] - xs[k])) / ((xs[i] - xs[j]) * (xs[i] - xs[k]))
        return total  # at xs[2]

    at_latest = slope(times, values)
    forecast = values[2] + (at - times[2]) * at_latest
    at_skipped = slope([times[1], times[2], at], [values[1], values[2], forecast])
    return values[2] + (at - times[2]) / 2 * (at_latest + at_skipped)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps_going_up)
def test_heun_is_forecast_then_calibrate(gaps):
    times = [0, gaps[0], gaps[0] + gaps[1]]
    values = [tokens(s) for s in range(3)]
    at = times[2] + gaps[2]
    found = Heun(kappa=None).predict(kept_at(times, values), place(at))
    assert relative(found, heun_by_loops(values, times, at)) < 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps_going_up, st.integers(0, 9))
def test_heun_is_exact_on_lines_and_takes_its_share_of_curvature(gaps, seed):
    times = [0, gaps[0], gaps[0] + gaps[1]]
    skip, gap = gaps[2], gaps[1]
    at, level, rise, bend = times[2] + skip, tokens(seed), tokens(seed + 1), tokens(seed + 2)
    line = [level + rise * t for t in times]
    assert relative(Heun(kappa=None).predict(kept_at(times, line), place(at)), level + rise * at) < 1e-9
    curve = [value + bend * t**2 / 2 for value, t in zip(line, times, strict=True)]
    found = Heun(kappa=None).predict(kept_at(times, curve), place(at))
    share = gap / (2 * (skip + gap))
    wanted = curve[2] + skip * (rise + bend * times[2]) + share * bend * skip**2 / 2
    assert relative(found, wanted) < 1e-8


def test_heun_of_two_values_is_a_line():
    kept = kept_at([0, 4], [tokens(1), tokens(2)])
    assert torch.equal(Heun(kappa=None).predict(kept, place(6)), Taylor(1, kappa=None).predict(kept, place(6)))


# ---- DMD -----------------------------------------------------------------------------------------------------------


def dynamics(kind: str, count: int) -> list[Tensor]:
    """States of ``x_(k+1) = A x_k`` of rank 2 in 60 dimensions, from a start within its range."""
    small = {
        "spiral": torch.tensor([[0.9, -0.3], [0.3, 0.9]]),
        "decay": torch.diag(torch.tensor([0.95, 0.6])),
        "line": torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
    }[kind].double()
    basis, _ = torch.linalg.qr(tokens(3, 60, 2))
    matrix = basis @ small @ basis.T
    state, states = basis @ torch.tensor([1.0, 2.0]).double(), []
    for _ in range(count):
        states.append(state.view(1, 15, 4))
        state = matrix @ state
    return states


@pytest.mark.parametrize("kind", ["spiral", "decay", "line"])
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dmd_is_exact_on_linear_dynamics_of_low_rank(kind, gap, count, dtype):
    states = dynamics(kind, 12)
    kept = kept_at([10 + gap * i for i in range(count)], [state.to(dtype) for state in states[:count]])
    for further in range(1, 6):
        found = DMD(6, kappa=None).predict(kept, place(kept[0].place.step + gap * further))
        assert found.dtype == dtype and relative(found, states[count - 1 + further]) < 1e-4


@pytest.mark.parametrize("kind", ["spiral", "decay"])
def test_dmd_goes_on_between_gaps(kind):
    """Every second state is kept; the ones between are known all the same."""
    states = dynamics(kind, 12)
    kept = kept_at([0, 2, 4, 6], [states[t] for t in (0, 2, 4, 6)])
    assert relative(DMD(kappa=None).predict(kept, place(7)), states[7]) < 1e-6


@pytest.mark.parametrize("times", [[0, 1], [0, 1, 2], [0, 1, 2, 4], [0, 4, 5, 6]])
def test_dmd_without_four_even_gaps_is_a_line(times):
    kept = kept_at(times, [tokens(t) for t in times])
    assert torch.equal(DMD().predict(kept, place(7)), Taylor(1).predict(kept, place(7)))


def test_dmd_uses_the_even_ones_of_uneven_values():
    states = dynamics("spiral", 8)
    kept = kept_at([0, 7, 8, 9, 10], [tokens(9, 1, 15, 4), *states[:4]])
    assert relative(DMD(kappa=None).predict(kept, place(11)), states[4]) < 1e-6


def test_dmd_sums_long_values_in_pieces(monkeypatch):
    import dit_accel.caching.predictors.dmd as module

    states = dynamics("spiral", 8)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert relative(DMD(kappa=None).predict(kept_at([0, 1, 2, 3], states[:4]), place(5)), states[5]) < 1e-6


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_values_stay_and_dtypes_too(predictor: Predictor, dtype):
    value = (tokens(1) * 100).to(dtype)
    kept = kept_at([0, 2, 4, 6], [value.clone() for _ in range(4)])[: predictor.depth]
    before = [item.value.clone() for item in kept]
    found = predictor.predict(kept, place(9))
    assert found.dtype == dtype and relative(found, value) <= (1e-6 if predictor == DMD() else 0)
    assert all(torch.equal(item.value, old) for item, old in zip(kept, before, strict=True))  # nobody writes into them


@pytest.mark.parametrize("predictor", [*ALL, Taylor(2, "sigma"), Heun("sigma")], ids=repr)
@pytest.mark.parametrize("times", [[3, 3, 3, 3], [1, 3, 3, 3], [1, 1, 3, 3], [3, 3, 5, 5]])
@pytest.mark.parametrize("values", ["zero", "equal", "other"])
def test_gaps_of_zero_never_give_nan(predictor, times, values):
    made = [{"zero": tokens(0) * 0, "equal": tokens(0), "other": tokens(i)}[values] for i in range(4)]
    kept = kept_at(times, made, [1 / t for t in times])[: predictor.depth]
    for at in (times[-1], times[-1] + 2):
        assert torch.isfinite(predictor.predict(kept, place(at, 1 / at))).all()


def test_places_next_to_each_other_are_one():
    """Two noise levels that differ by rounding: their difference is nothing to draw a line by."""
    kept = kept_at([0, 1, 2], [tokens(0), tokens(1), tokens(2)], [0.9, 0.5 + 1e-9, 0.5])
    wanted = tokens(2) + (0.2 - 0.5) / (0.5 - 0.9) * (tokens(2) - tokens(0))
    assert relative(Taylor(1, "sigma", kappa=None).predict([kept[0], kept[2]], place(3, 0.2)), wanted) < 1e-9
    assert relative(Taylor(2, "sigma", kappa=None).predict(kept, place(3, 0.2)), wanted) < 1e-9


def test_half_precision_is_combined_in_float32():
    """In bfloat16 itself the difference of these would lose most of its bits."""
    values = [torch.tensor([[1.0, 300.0]]).bfloat16(), torch.tensor([[1.0078125, 302.0]]).bfloat16()]
    found = Taylor(1, kappa=None).predict(kept_at([0, 3], values), place(4))
    wanted = values[1].double() + (values[1].double() - values[0].double()) / 3
    assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("predictor", [*ALL, AdaptiveLinear(), Taylor(4, "sigma", "taylorseer", None)], ids=repr)
def test_lowering_keeps_ever_fewer_values_down_to_one(predictor: Predictor):
    depths, probes = [predictor.depth], [predictor.needs_probe]
    lower = predictor.lowered()
    while lower is not None:
        depths.append(lower.depth)
        probes.append(lower.needs_probe)
        lower = lower.lowered()
    assert depths == sorted(set(depths), reverse=True) and depths[-1] == 1 and not probes[-1]


def test_a_bounded_predictor_asks_for_what_its_rule_asks_for():
    assert (
        Clipped(AdaptiveLinear()).needs_probe
        and Clipped(BranchMean()).needs_pairs
        and not Clipped(Reuse()).needs_pairs
    )


def test_recipes_are_equal_by_their_settings():
    assert Taylor(2) == Taylor(2) != Taylor(1) and hash(DMD()) == hash(DMD()) and Taylor(2).lowered() == Taylor(1)
    assert {Taylor(2).depth, Heun().depth, DMD().depth, DMD(4).depth} == {3, 6, 4}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Taylor(0), "1, 2, 3 or 4"),
        (lambda: Taylor(True), "1, 2, 3 or 4"),
        (lambda: Taylor(1, text("time")), '"step", "sigma" or "log_snr"'),
        (lambda: Taylor(form=text("lagrange")), '"newton" or "taylorseer"'),
        (lambda: Taylor(kappa=0), "positive"),
        (lambda: Clipped(Reuse(), -1), "positive"),
        (lambda: Heun(text("time")), '"step", "sigma" or "log_snr"'),
        (lambda: DMD(3), "from 4 to 12"),
        (lambda: DMD(6, 1.0), r"in \(0, 1\)"),
        (lambda: AdaptiveLinear(2.0, 1.0), "lowest <= highest"),
    ],
)
def test_bad_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
