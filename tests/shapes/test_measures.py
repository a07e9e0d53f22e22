"""Truth measures: answers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit_accel.metrics import psnr, ssim
from dit_accel.shapes.evaluate import measures
from dit_accel.shapes.world import BACKGROUNDS, COLORS, ObjectWords, Scene, SceneObject, render, second_color

FRAMES, SIDE = 5, 40


def box(left: int, top: int, side: int = 10, step: int = 0) -> torch.Tensor:
    """A square mask that moves ``step`` pixels to the right per frame."""
    mask = torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.bool)
    for frame in range(FRAMES):
        mask[frame, top : top + side, left + frame * step : left + frame * step + side] = True
    return mask


def painted(mask: torch.Tensor, color: tuple[float, ...], ground: float = 0.5) -> torch.Tensor:
    return torch.where(mask[:, None], torch.tensor(color).view(1, 3, 1, 1), torch.tensor(ground))


def noise(seed: int) -> torch.Tensor:
    return torch.rand(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def test_overlap_of_masks() -> None:
    first, second = box(5, 5), box(10, 5)
    assert measures.mask_iou(first, first) == 1
    assert measures.mask_iou(first, second) == pytest.approx(50 / 150)
    assert measures.mask_iou(first, box(25, 25)) == 0
    pair, half = torch.stack([first, first], 1), torch.stack([first, second], 1)
    assert measures.mask_iou(pair.float(), half.float() * 0.6) == pytest.approx((1 + 1 / 3) / 2)
    empty = torch.zeros_like(first)
    assert measures.mask_iou(empty, empty) == 1
    assert measures.mask_iou(first, empty) == 0


def test_centroids_of_masks() -> None:
    both = torch.stack([box(5, 20, step=2), torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.bool)], 1)
    places = measures.centroids(both)
    assert places[:, 0].tolist() == [[10 + 2 * frame, 25] for frame in range(FRAMES)]
    assert places[:, 1].isnan().all()


@pytest.mark.parametrize("as_places", [lambda mask: mask, lambda mask: measures.centroids(mask)[:, 0]])
def test_errors_of_places_and_steps(as_places: Callable[[torch.Tensor], torch.Tensor]) -> None:
    truth = as_places(box(5, 5, step=2))
    assert measures.centroid_error(as_places(box(8, 9, step=2)), truth) == pytest.approx(5)
    assert measures.trajectory_error(as_places(box(8, 9, step=2)), truth) == pytest.approx(0, abs=1e-6)
    assert measures.trajectory_error(as_places(box(5, 5)), truth) == pytest.approx(2)
    assert measures.centroid_error(as_places(box(5, 5)), truth) == pytest.approx(4)  # 0, 2, 4, 6, 8


def test_an_object_in_only_one_track_is_infinitely_far() -> None:
    shown, lost = box(5, 5, step=2), box(5, 5, step=2)
    lost[2] = False
    assert measures.centroid_error(lost, shown) == math.inf
    assert measures.trajectory_error(lost, shown) == math.inf
    assert measures.centroid_error(lost, lost) == 0


def test_the_outside_of_a_mask() -> None:
    source, mask = noise(0), box(15, 15)
    edited = painted(mask, COLORS["red"], 0.0) + torch.where(mask[:, None], 0, source)
    assert measures.outside_psnr(edited, source, mask) == math.inf
    assert measures.outside_ssim(edited, source, mask) == pytest.approx(1)
    assert psnr(edited, source) < 20
    dimmed = torch.where(box(13, 13, 14)[:, None], source, source * 0.9 + 0.1 * 0.5)  # changed beyond the margin of 2
    expected = -10 * math.log10(float((dimmed - source)[:, :, :13].square().mean()))
    assert measures.outside_psnr(dimmed, source, mask, margin=2) == pytest.approx(expected, abs=0.3)
    assert measures.outside_psnr(torch.ones_like(source), torch.zeros_like(source), mask) == 0


def test_the_outside_of_nothing_is_everything() -> None:
    a, b, nowhere = noise(1), noise(2), torch.zeros(FRAMES, SIDE, SIDE)
    assert measures.outside_psnr(a, b, nowhere) == pytest.approx(psnr(a, b))
    assert measures.outside_ssim(a, b, nowhere) == pytest.approx(ssim(a, b))


def test_several_objects_mask_together() -> None:
    source, masks = noise(3), torch.stack([box(2, 2), box(25, 25)], 1)
    edited = painted(masks.any(1), COLORS["red"], 0.0) + torch.where(masks.any(1, keepdim=True), 0, source)
    assert measures.outside_psnr(edited, source, masks, margin=0) == math.inf
    assert measures.outside_psnr(edited, source, masks[:, :1], margin=0) < 30


def test_a_filled_hole() -> None:
    clip = render(Scene((SceneObject(ObjectWords("red", "square"), 0.15, (0.5, 0.5)),), "gray", True), 3, 64, 64)
    empty = clip.backdrop.expand_as(clip.video)
    assert measures.hole_psnr(empty, clip.backdrop, clip.masks) == math.inf
    assert measures.hole_psnr((empty + 0.1), clip.backdrop, clip.masks) == pytest.approx(20, abs=0.01)
    assert measures.hole_psnr((empty + 0.1), empty, clip.masks) == pytest.approx(20, abs=0.01)
    assert measures.hole_psnr(clip.video, clip.backdrop, clip.masks) < 10  # the object is still there
    wrong = torch.where(clip.masks > 0.5, torch.tensor(BACKGROUNDS["black"]).view(1, 3, 1, 1), empty)
    assert measures.hole_psnr(wrong, clip.backdrop, clip.masks) < 10


def test_shares_of_a_color() -> None:
    mask, ground = box(10, 10), BACKGROUNDS["gray"][0]
    video = painted(mask, COLORS["red"], ground)
    assert measures.color_share(video, mask, "red") == 1
    assert measures.color_share(video, mask, "blue") == 0
    assert measures.color_share(video, box(15, 10), "red") == pytest.approx(0.5)
    assert measures.leak(video, mask, "red", margin=0) == 0
    assert measures.leak(video, box(15, 10), "red", margin=0) == pytest.approx(50 / (SIDE**2 - 100))
    assert measures.leak(video, box(15, 10), "red", margin=5) == 0
    assert torch.equal(measures.color_mask(video, "red"), mask)


@pytest.mark.parametrize("color", COLORS)
def test_light_halves_count_for_textures_only(color: str) -> None:
    mask = box(10, 10)
    light = painted(mask, second_color(color), BACKGROUNDS["white"][0])
    assert measures.color_share(light, mask, color, textured=True) == 1
    assert measures.leak(light, mask, color, textured=True) == 0
    assert measures.color_share(light, mask, color) == 0


def test_flicker_outside_ignores_what_moves() -> None:
    mask = box(5, 5, step=3)
    video = painted(mask, COLORS["cyan"])
    assert measures.flicker(video, mask, margin=0) == 0
    assert measures.flicker(video, torch.zeros_like(mask)) > 0
    video[1::2] += torch.where(mask[1::2, None], 0.0, 0.2)
    assert measures.flicker(video, mask) == pytest.approx(0.2)


def test_flicker_inside_follows_the_object() -> None:
    mask = box(5, 5, 12, step=3)
    pattern = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(4))
    video = torch.full((FRAMES, 3, SIDE, SIDE), 0.5)
    for frame in range(FRAMES):
        video[frame, :, 5:17, 5 + 3 * frame : 17 + 3 * frame] = pattern * 0.8
    centers = measures.centroids(mask)[:, 0]
    assert measures.flicker(video, mask, centers, margin=1) == pytest.approx(0, abs=1e-5)
    assert measures.flicker(video, mask, torch.zeros(FRAMES, 2), margin=1) > 0.1
    video[1::2] += 0.1
    assert measures.flicker(video, mask, centers, margin=1) == pytest.approx(0.1, abs=1e-5)


def test_flicker_inside_leaves_out_what_left_the_frame() -> None:
    mask = box(20, 5, 12, step=5)  # partly outside from the third frame on
    video = painted(mask, COLORS["red"])
    centers = torch.stack([26 + 5 * torch.arange(FRAMES), torch.full((FRAMES,), 11)], 1).float()
    assert measures.flicker(video, mask, centers, margin=1) == pytest.approx(0, abs=1e-5)


def test_color_drift() -> None:
    mask = box(5, 5, step=2)
    video = painted(mask, (0.5, 0.5, 0.5), 0.0)
    assert measures.color_drift(video, mask) == 0
    for frame in range(FRAMES):
        video[frame, 0] += 0.1 * frame
    deviation = 0.1 * math.sqrt(2)  # of 0, 1, 2, 3, 4
    assert measures.color_drift(video, mask) == pytest.approx(deviation / 3, abs=1e-6)


def test_synthesis() -> None:
    scene = Scene((SceneObject(ObjectWords("red", "square", texture="striped"), 0.15, (0.4, 0.5)),), "gray", True)
    clip = render(scene, 1, 128, 128)
    clean = measures.synthesis_psnr(clip.video)
    assert clean > 30
    strange = clip.video.clone()
    strange[:, :, 90:120, 20:60] = strange[:, :, 90:120, 20:60].flip(1) * 0.6
    strange[:, :, 50:60, 45:55] = 0.0
    assert measures.synthesis_psnr(strange) < clean - 5
    random = noise(5)
    by_mean = psnr(random, random.mean((0, 2, 3), keepdim=True).expand_as(random))
    assert measures.synthesis_psnr(random) == pytest.approx(by_mean)


GRAY = torch.full((FRAMES, 3, SIDE, SIDE), 0.5)
EMPTY = torch.zeros(FRAMES, SIDE, SIDE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measures.mask_iou(EMPTY, EMPTY[1:]), "one shape"),
        (lambda: measures.mask_iou(EMPTY[0], EMPTY[0]), r"\[frames, height, width\]"),
        (lambda: measures.centroid_error(EMPTY, EMPTY), "neither track"),
        (lambda: measures.centroid_error(torch.zeros(3, 2), torch.zeros(4, 2)), "as many frames and objects"),
        (lambda: measures.trajectory_error(torch.zeros(1, 2), torch.zeros(1, 2)), "at least 2 frames"),
        (lambda: measures.outside_psnr(GRAY, GRAY, EMPTY + 1), "leaves nothing outside"),
        (lambda: measures.outside_psnr(GRAY, GRAY[1:], EMPTY), "like the mask"),
        (lambda: measures.outside_ssim(GRAY, GRAY[1:], EMPTY), "one shape"),
        (lambda: measures.outside_psnr(GRAY, GRAY, EMPTY[:, 1:]), "does not fit the video"),
        (lambda: measures.hole_psnr(GRAY, GRAY[0], EMPTY), "the mask is empty"),
        (lambda: measures.hole_psnr(GRAY, GRAY[0, :1], EMPTY + 1), "like the mask"),
        (lambda: measures.color_share(GRAY, EMPTY + 1, "pink"), "unknown color 'pink'.*red"),
        (lambda: measures.color_mask(GRAY[0], "red"), r"\[F, 3, H, W\]"),
        (lambda: measures.leak(GRAY * 255, EMPTY, "red"), r"\[0, 1\]"),
        (lambda: measures.flicker(GRAY[:1], EMPTY[:1]), "at least 2 frames"),
        (lambda: measures.flicker(GRAY, EMPTY, torch.zeros(FRAMES, 3)), "of one object"),
        (lambda: measures.flicker(GRAY, EMPTY, torch.zeros(FRAMES, 2)), "shrunk masks are empty"),
        (lambda: measures.color_drift(GRAY, EMPTY), "at least 2 frames"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
