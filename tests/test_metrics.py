"""Metrics against known answers and independent definitions."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_accel.metrics import describe_noise_floor, flicker, lpips, motion_ratio, noise_floor, psnr, ssim
from dit_accel.metrics.perceptual import _model

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


@pytest.mark.parametrize("metric", [psnr, ssim, lpips, motion_ratio, flicker, lambda a, b: noise_floor([a, b])])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), "one shape"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "one shape"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide"),
        (torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 255.0), "255"),
        (torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), math.nan), "nan"),
    ],
)
def test_bad_input_is_refused(metric: Metric, a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(a, b)


def test_ssim_refuses_frames_too_small_to_mirror() -> None:
    assert ssim(torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 6, 6)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="6 x 6"):
        ssim(torch.zeros(1, 3, 5, 64), torch.zeros(1, 3, 5, 64))


def moving(shift: int, frames: int = 5, level: float = 1.0) -> torch.Tensor:
    """A bar of one column that goes ``shift`` columns to the right in every frame, on black."""
    video = torch.zeros(frames, 3, 4, 16)
    for frame in range(frames):
        video[frame, :, :, frame * shift] = level
    return video


@pytest.mark.parametrize(
    ("video", "reference", "ratio"),
    [
        (moving(1), moving(1), 1.0),
        (moving(1, level=0.5), moving(1), 0.5),
        (moving(0), moving(2), 0.0),
        (moving(3), moving(0), math.inf),
        (moving(0), moving(0, level=0.2), 1.0),
        (torch.cat([moving(1, 3), moving(1, 3)[-1:].expand(2, -1, -1, -1)]), moving(1), 0.5),  # stops half-way
    ],
)
def test_motion_ratio_of_known_motion(video: torch.Tensor, reference: torch.Tensor, ratio: float) -> None:
    assert motion_ratio(video, reference) == pytest.approx(ratio)


def test_flicker_of_known_clips() -> None:
    turns = torch.arange(4.0).remainder(2).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert flicker(turns) == 1.0
    assert flicker(0.4 + 0.1 * turns) == pytest.approx(0.1)
    assert flicker(torch.full((4, 3, 8, 8), 0.3)) == 0.0
    assert flicker(moving(1)) == pytest.approx(2 / 16)  # one column of 16 goes black, another white


def test_flicker_against_a_reference_forgives_motion_and_steady_errors() -> None:
    clean = 0.5 * moving(2) + 0.2
    assert flicker(clean, clean) == 0.0
    assert flicker(clean + 0.1, clean) == pytest.approx(0.0, abs=1e-6)
    blinking = clean + 0.1 * torch.arange(5.0).remainder(2).view(5, 1, 1, 1)
    assert flicker(blinking, clean) == pytest.approx(0.1, rel=1e-5)
    assert flicker(moving(0), moving(1)) == pytest.approx(2 / 16)  # motion that is lost counts too


def test_temporal_metrics_count_in_double() -> None:
    video = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = video.double().diff(dim=0).abs().mean().item()
    assert flicker(video) == pytest.approx(expected, rel=1e-12)
    assert motion_ratio(video, video.double()) == 1.0


@pytest.mark.parametrize("metric", [lambda a: motion_ratio(a, a), flicker, lambda a: flicker(a, a)])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 8, 8), (4, 8, 8, 3)])
def test_temporal_metrics_refuse_what_is_no_clip(metric: Callable[[torch.Tensor], float], shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"\[F, 3, H, W\] of at least 2 frames"):
        metric(torch.zeros(shape))


def test_the_noise_floor_is_the_worst_pair() -> None:
    runs = [torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.01), torch.full((2, 3, 8, 8), 0.1)]
    assert noise_floor([runs[0], runs[0].clone()]) == math.inf
    assert noise_floor(runs[:2]) == pytest.approx(40.0, abs=1e-3)
    assert noise_floor(runs) == pytest.approx(20.0, abs=1e-3)
    with pytest.raises(ValueError, match="at least 2"):
        noise_floor(runs[:1])


@pytest.fixture
def toy_lpips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A package of the real one's shape whose distance is the mean square; lists networks and frames it was given."""
    calls: list[tuple[str, int]] = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            calls.append((self.net, len(x)))
            assert x.dtype == torch.float32
            return (x - y).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    _model.cache_clear()
    yield calls
    _model.cache_clear()


def test_lpips_scales_to_its_range_and_averages_frames(toy_lpips: list[tuple[str, int]]) -> None:
    a = torch.zeros(11, 3, 32, 32, dtype=torch.float64)
    b = torch.cat([torch.ones(1, 3, 32, 32), torch.zeros(10, 3, 32, 32)]).double()
    assert lpips(a, b) == pytest.approx(4 / 11)  # 0 and 1 lie 2 apart in [-1, 1]
    assert lpips(a, a, net="vgg") == 0.0
    assert {net for net, _ in toy_lpips[:2]} == {"alex"}
    assert toy_lpips[-1][0] == "vgg"
    assert sum(frames for net, frames in toy_lpips if net == "alex") == 11


def test_lpips_refuses_small_frames_and_unknown_networks(toy_lpips: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="32 x 32"):
        lpips(torch.zeros(1, 3, 31, 64), torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match="alex, vgg, squeeze"):
        lpips(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), net="resnet")
    assert toy_lpips == []


def test_lpips_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    _model.cache_clear()
    with pytest.raises(ImportError, match="pip install lpips"):
        lpips(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))


def test_noise_floor_is_put_into_words() -> None:
    assert "bit-equal" in describe_noise_floor(math.inf)
    assert describe_noise_floor(52.345).startswith("52.3")
