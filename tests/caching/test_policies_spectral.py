"""SeaCache's filter against plain sums over frequencies, and its rule."""

from __future__ import annotations

import cmath
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.caching.policies import Sight, Spectral
from dit_accel.caching.policies.spectral import spectral_filter
from dit_accel.caching.unit import Unit

UNIT = Unit("blocks 0-3", "blocks", 0, 3)
SIGHT = Sight(0, 9, "cond", "transformer", UNIT, 0.5, None, torch.zeros(1, 1, 2, 2), None, None)


def frequency(index: int, length: int) -> float:
    """Cycles per sample, as a size: the upper half of a spectrum are negative frequencies."""
    return min(index, length - index) / length


def plain_filter(
    values: dict[tuple[int, ...], float], shape: tuple[int, ...], sigma: float, beta: float
) -> list[float]:
    """Fourier transform, gain and inverse transform, as sums; the result in the order of the grid's cells."""
    cells = list(itertools.product(*map(range, shape)))

    def wave(cell: tuple[int, ...], k: tuple[int, ...], sign: int) -> complex:
        return cmath.exp(sign * 2j * math.pi * sum(c * f / n for c, f, n in zip(cell, k, shape, strict=True)))

    def gain(k: tuple[int, ...]) -> float:
        product = 1.0
        for f, n in zip(k, shape, strict=True):
            power = 1.0 / (frequency(f, n) ** beta + 1e-16)
            product *= (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2)
        return product

    mean_gain = sum(gain(k) for k in cells) / len(cells)
    spectrum = {k: sum(values[cell] * wave(cell, k, -1) for cell in cells) * gain(k) / mean_gain for k in cells}
    return [sum(spectrum[k] * wave(cell, k, 1) for k in cells).real / len(cells) for cell in cells]


def filtered_by_hand(latents: Tensor, axes: tuple[int, ...], sigma: float, beta: float) -> Tensor:
    """The plain filter over ``axes`` for every index of the other dimensions."""
    rest = [axis for axis in range(latents.ndim) if axis not in axes]
    shape = tuple(latents.shape[axis] for axis in axes)
    grids = latents.permute(*rest, *axes).reshape(-1, *shape)
    found = []
    for grid in grids:
        values = {cell: float(grid[cell]) for cell in itertools.product(*map(range, shape))}
        found.append(torch.tensor(plain_filter(values, shape, sigma, beta)).reshape(shape))
    stacked = torch.stack(found).reshape([latents.shape[axis] for axis in rest] + list(shape))
    return stacked.permute([(rest + list(axes)).index(axis) for axis in range(latents.ndim)])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    sigma=st.floats(0.01, 0.99),
    beta=st.sampled_from([1.0, 2.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_the_filter_is_the_plain_one_on_any_grid(shape: tuple[int, ...], sigma: float, beta: float, seed: int) -> None:
    latents = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(seed))
    expected = filtered_by_hand(latents, (2, 3, 4), sigma, beta)
    torch.testing.assert_close(spectral_filter(latents, (2, 3, 4), sigma, beta), expected, rtol=1e-3, atol=1e-4)


def test_little_noise_leaves_the_latents_and_much_noise_their_mean() -> None:
    latents = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spectral_filter(latents, (2, 3, 4), 1e-6, 3.0), latents, rtol=1e-4, atol=1e-4)
    blurred = spectral_filter(latents, (2, 3, 4), 1 - 1e-6, 3.0)
    flat = blurred.flatten(2)
    assert float((flat - flat.mean(-1, keepdim=True)).abs().max()) < 1e-3 * float(flat.abs().max())


def test_gains_have_mean_one() -> None:
    """A unit pulse has all frequencies alike: its place keeps the mean gain."""
    pulse = torch.zeros(1, 1, 4, 5)
    pulse[0, 0, 0, 0] = 1.0
    assert float(spectral_filter(pulse, (2, 3), 0.4, 3.0)[0, 0, 0, 0]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes", "grid", "expected"),
    [
        ((2, 3, 2, 3, 4), None, None, (2, 3, 4)),  # batch, channels, frames, height, width
        ((2, 3, 3, 4), None, None, (2, 3)),  # images
        ((2, 2, 3, 3, 4), (1, 3, 4), None, (1, 3, 4)),  # frames before channels
    ],
)
def test_axes_are_those_of_the_latents(
    shape: tuple[int, ...], axes: tuple[int, ...] | None, grid: None, expected: tuple[int, ...]
) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = Spectral(0.1, axes=axes).filtered(replace(SIGHT, latents=latents, grid=grid, sigma=0.3))
    torch.testing.assert_close(found, filtered_by_hand(latents, expected, 0.3, 3.0), rtol=1e-3, atol=1e-4)


def test_tokens_are_put_on_their_grid() -> None:
    """Packed latents, with the tokens of a reference image behind those of the picture."""
    picture = torch.randn(1, 5, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    tokens = picture.flatten(2).transpose(1, 2)
    packed = torch.cat([tokens, torch.ones(1, 6, 5)], dim=1)
    found = Spectral(0.1).filtered(replace(SIGHT, latents=packed, grid=(1, 3, 4), sigma=0.6))
    expected = filtered_by_hand(picture, (2, 3, 4), 0.6, 3.0)
    torch.testing.assert_close(found.flatten(1, 3).transpose(1, 2), expected.flatten(2), rtol=1e-3, atol=1e-4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.02, 0.6))
def test_seacache_sums_changes_of_filtered_latents(seed: int, threshold: float) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    latents, steps = [torch.randn(2, 1, 2, 2, 3, generator=generator)], 10
    for _ in range(steps - 1):
        latents.append(latents[-1] + draw.choice((0.02, 0.1)) * torch.randn(2, 1, 2, 2, 3, generator=generator))
    sigmas = [1 - step / steps for step in range(steps)]
    seen = [
        filtered_by_hand(x, (2, 3, 4), min(max(s, 1e-6), 1 - 1e-6), 3.0) for x, s in zip(latents, sigmas, strict=True)
    ]
    judge, total = Spectral(threshold).judge(UNIT, steps), 0.0
    for step in range(steps):
        computes = step == 0
        sight = replace(SIGHT, step=step, latents=latents[step], sigma=sigmas[step])
        if step > 0:
            changes = []  # one for each picture of the batch
            for now, before in zip(seen[step], seen[step - 1], strict=True):
                changes.append(float((now - before).abs().mean() / before.abs().mean()))
            total += sum(changes) / len(changes)
            if abs(total - threshold) < 1e-4:
                return  # too close to tell
            computes = total >= threshold
            assert judge.wants_compute(sight) is computes
            assert judge.value == pytest.approx(total, rel=1e-2, abs=1e-4)
        judge.note(sight, computes, None)
        total = 0.0 if computes else total


def test_noise_added_to_the_signal_counts_as_its_share() -> None:
    """Latents ``x + 3 n`` are four times ``x / 4 + 3 n / 4``, and the filter does not mind the factor."""
    latents = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(4))
    added = Spectral(0.1).filtered(replace(SIGHT, latents=latents, sigma=3.0, flow=False))
    torch.testing.assert_close(added, Spectral(0.1).filtered(replace(SIGHT, latents=latents, sigma=0.75)))


@pytest.mark.parametrize(
    ("sight", "message"),
    [
        (replace(SIGHT, sigma=None), "neither sigmas nor alphas_cumprod"),
        (replace(SIGHT, sigma=14.6), "from 0 to 1; got 14.6"),
        (replace(SIGHT, latents=torch.zeros(1, 6, 4)), "no grid that is known"),
        (replace(SIGHT, latents=torch.zeros(1, 6, 4), grid=(1, 3, 4)), "no grid that is known"),
    ],
)
def test_what_it_needs_is_asked_for(sight: Sight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spectral(0.1).judge(UNIT, 9).wants_compute(sight)


@pytest.mark.parametrize("axes", [(0, 2), (2, 5)])
def test_axes_that_are_none_are_refused(axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="behind the batch"):
        Spectral(0.1, axes=axes).filtered(SIGHT)


def test_an_exponent_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Spectral(0.1, exponent=0.0)
