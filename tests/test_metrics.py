"""PSNR and SSIM against known answers and an independent definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dit_accel.metrics import describe_noise_floor, psnr, ssim

Metric = Callable[[torch.Tensor, torch.Tensor], float]


def pair(shape: tuple[int, ...] = (2, 3, 24, 17), noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=generator)
    return clean, (clean + noise * torch.randn(shape, generator=generator)).clamp(0, 1)


def ssim_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, weighted statistics in two dimensions, edges mirrored."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    scores = []
    for x, y in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True):
        x, y = np.pad(x, 5, mode="reflect"), np.pad(y, 5, mode="reflect")
        for row, column in np.ndindex(*a.shape[-2:]):
            p, q = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 1e-4) * (2 * cov + 9e-4)
            scores.append(top / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4)))
    return float(np.mean(scores))


@pytest.mark.parametrize(
    ("difference", "decibels"), [(0.0, math.inf), (1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (1 / 255, 48.1308)]
)
def test_psnr_of_a_constant_difference(difference: float, decibels: float) -> None:
    black = torch.zeros(2, 3, 4, 4)
    assert psnr(black, black + difference) == pytest.approx(decibels, abs=1e-3)


def test_psnr_counts_every_pixel_once() -> None:
    a = torch.zeros(10)
    b = a.clone()
    b[0] = 1.0
    assert psnr(a, b) == pytest.approx(10.0)


def test_psnr_of_half_precision_is_computed_in_double() -> None:
    a, b = (video.to(torch.bfloat16) for video in pair())
    assert psnr(a, b) == pytest.approx(psnr(a.double(), b.double()), rel=1e-12)


def test_ssim_equals_its_definition() -> None:
    a, b = pair()
    assert ssim(a, b) == pytest.approx(ssim_by_definition(a.double().numpy(), b.double().numpy()), abs=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_ssim_of_flat_frames(level: float) -> None:
    """Flat frames have no structure: only the luminance term is left."""
    a, b = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), level)
    assert ssim(a, b) == pytest.approx(1e-4 / (level**2 + 1e-4), rel=1e-5)


def test_ssim_is_symmetric_one_for_equals_and_falls_with_noise() -> None:
    a, b = pair()
    _, worse = pair(noise=0.3)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert 0 < ssim(a, worse) < ssim(a, b) < 1


def test_metrics_agree_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = (video.double() for video in pair((3, 3, 40, 33)))
    theirs = functional.structural_similarity_index_measure(a, b, data_range=1.0)
    assert ssim(a, b) == pytest.approx(float(theirs), abs=1e-5)
    assert psnr(a, b) == pytest.approx(float(functional.peak_signal_noise_ratio(a, b, data_range=1.0)), abs=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), "one shape"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "one shape"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 255.0), "255"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), math.nan), "nan"),
    ],
)
def test_bad_input_is_refused(metric: Metric, a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(a, b)


def test_ssim_refuses_frames_too_small_to_mirror() -> None:
    assert ssim(torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 6, 6)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="6 x 6"):
        ssim(torch.zeros(1, 3, 5, 64), torch.zeros(1, 3, 5, 64))


def test_noise_floor_is_put_into_words() -> None:
    assert "bit-equal" in describe_noise_floor(math.inf)
    assert describe_noise_floor(52.345).startswith("52.3")
