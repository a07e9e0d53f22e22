from __future__ import annotations

import random
import time

import pytest
import torch
import torch.nn.functional as F

from dit_accel.shapes.evaluate import judge, nearest, observe, score
from dit_accel.shapes.fit import direction, fit_shape
from dit_accel.shapes.foreground import label_pieces
from dit_accel.shapes.world import (
    COLORS,
    SHAPES,
    Attributes,
    Clip,
    Scene,
    all_attributes,
    held_out_attributes,
    render,
    sample_scene,
)

SCENE = Scene(Attributes("blue", "square", "right", "white"), 0.18, (0.5, 0.45), 0.4)


def random_clips(count: int, seed: int, frames: int, height: int, width: int) -> list[tuple[Attributes, Clip]]:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, rng.choice(all_attributes())) for _ in range(count)]
    return [(scene.attributes, render(scene, frames, height, width)) for scene in scenes]


def degraded(video: torch.Tensor, sigma: float, noise: float, seed: int) -> torch.Tensor:
    offsets = torch.arange(-5, 6).float()
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights /= weights.sum()
    planes = F.pad(video, (5, 5, 5, 5), mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).view_as(video)
    grain = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return (blurred + noise * grain).clamp(0, 1)


@pytest.mark.parametrize(
    ("count", "frames", "height", "width"), [(60, 9, 128, 128), (6, 9, 256, 256), (12, 5, 96, 160), (12, 5, 64, 64)]
)
def test_rendered_truth_is_always_right(count: int, frames: int, height: int, width: int) -> None:
    for attributes, clip in random_clips(count, 1, frames, height, width):
        seen = observe(clip.video)
        assert judge(seen, attributes).all, (attributes, seen)
        assert seen.overlap is not None
        assert seen.overlap > 0.95
        torch.testing.assert_close(seen.centers, clip.centers, atol=1.5, rtol=0)
        torch.testing.assert_close(seen.areas, clip.mask.mean((1, 2, 3)), atol=0.01, rtol=0)


def test_blur_and_noise_cost_at_most_one_in_a_hundred() -> None:
    clips = random_clips(110, 2, 9, 128, 128)
    right = [
        score(degraded(clip.video, 1.5, 0.05, seed), attributes).all for seed, (attributes, clip) in enumerate(clips)
    ]
    assert sum(right) >= 0.99 * len(right)


@pytest.mark.parametrize("attributes", held_out_attributes()[:12], ids=lambda attributes: attributes.prompt)
def test_each_wrong_word_is_caught_alone(attributes: Attributes) -> None:
    seen = observe(render(Scene(attributes, 0.16, (0.5, 0.5), 0.4), 5, 96, 96).video)
    others = {
        "color": COLORS,
        "shape": SHAPES,
        "motion": ("left", "right", "up", "down"),
        "background": ("gray", "black"),
    }
    for slot, words in others.items():
        for word in set(words) - {getattr(attributes, slot)}:
            verdict = judge(seen, attributes._replace(**{slot: word}))
            assert [name for name, right in verdict._asdict().items() if not right] == [slot]
            assert not verdict.all


def test_a_still_clip_has_no_motion() -> None:
    still = render(SCENE, 9, 96, 96).video[4:5].expand(9, -1, -1, -1)
    seen = observe(still)
    assert (seen.color, seen.shape, seen.motion, seen.background) == ("blue", "square", None, "white")
    assert observe(still[:1]).motion is None


def test_a_clip_shown_backwards_moves_the_other_way() -> None:
    assert observe(render(SCENE, 9, 96, 96).video.flip(0)).motion == "left"


def test_slow_and_slanted_motion_are_no_motion() -> None:
    slow = Scene(SCENE.attributes, 0.18, (0.5, 0.5), 0.05)
    assert observe(render(slow, 9, 96, 96).video).motion is None
    steps = torch.arange(5.0)
    slanted = torch.stack([50 + 8 * steps, 50 + 8 * steps], 1)
    assert direction(steps, slanted, 4, 128, 128) is None
    assert direction(steps, slanted * torch.tensor([1.0, 0.5]), 4, 128, 128) == "right"


def test_an_empty_clip_shows_only_its_background() -> None:
    seen = observe(torch.full((9, 3, 64, 64), 0.5))
    assert (seen.color, seen.shape, seen.motion, seen.background) == (None, None, None, "gray")
    assert seen.centers.isnan().all()
    assert not seen.areas.any()
    assert seen.residual is None


def test_noise_shows_nothing() -> None:
    seen = observe(torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert (seen.color, seen.shape, seen.motion, seen.background) == (None, None, None, None)


def test_a_few_empty_frames_do_not_matter_but_most_do() -> None:
    video = render(SCENE, 9, 96, 96).video.clone()
    video[[0, 3, 8]] = video[0, :, :1, :1]
    seen = observe(video)
    assert judge(seen, SCENE.attributes).all
    assert seen.centers.isnan().any(1).nonzero()[:, 0].tolist() == [0, 3, 8]
    video[[1, 2]] = video[0, :, :1, :1]
    assert observe(video).color is None


def test_a_shape_that_jumps_once_still_moves_its_way() -> None:
    video = render(SCENE, 9, 96, 96).video.clone()
    video[8] = video[0]
    assert observe(video).motion == "right"


def test_two_shapes_are_not_one() -> None:
    small = Scene(SCENE.attributes, 0.14, (0.5, 0.25), 0.4)
    double = render(small, 9, 96, 96).video.minimum(render(small, 9, 96, 96).video.flip(2))
    assert observe(double).shape is None


def test_an_outline_that_is_no_shape_is_undecided() -> None:
    clip = render(Scene(SCENE.attributes._replace(shape="circle"), 0.22, (0.5, 0.5), 0.3), 9, 128, 128)
    hole = render(Scene(SCENE.attributes._replace(shape="circle"), 0.15, (0.5, 0.5), 0.3), 9, 128, 128)
    ring = torch.where(hole.mask > 0.5, clip.video[:, :, :1, :1], clip.video)
    seen = observe(ring)
    assert (seen.color, seen.shape, seen.motion) == ("blue", None, "right")


def test_shapes_cut_by_the_edge_are_completed() -> None:
    scene = Scene(Attributes("red", "triangle", "up", "black"), 0.22, (0.5, 0.45), 0.5)
    clip = render(scene, 9, 128, 128)
    assert float(clip.mask[-1].sum()) < 0.95 * float(clip.mask[4].sum())  # its tip is outside
    seen = observe(clip.video)
    assert judge(seen, scene.attributes).all
    torch.testing.assert_close(seen.centers, clip.centers, atol=1.5, rtol=0)


def test_the_residual_grows_with_what_is_not_explained() -> None:
    video = render(SCENE, 5, 96, 96).video
    clean, noisy = observe(video).residual, observe(degraded(video, 0.5, 0.1, 0)).residual
    assert clean is not None
    assert noisy is not None
    assert clean < 0.03
    assert 0.05 < noisy < 0.12


def test_colours_far_from_the_palette_have_no_name() -> None:
    assert nearest(torch.tensor([0.85, 0.2, 0.15]), COLORS, 0.45) == "red"
    assert nearest(torch.tensor([0.5, 0.5, 0.5]), COLORS, 0.45) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fit_finds_centre_and_radius(shape: str) -> None:
    clip = render(Scene(SCENE.attributes._replace(shape=shape), 0.2, (0.52, 0.47), 0.3), 3, 128, 128)
    fit = fit_shape(clip.mask[:, 0] > 0.5, shape)
    torch.testing.assert_close(fit.centers, clip.centers, atol=0.7, rtol=0)
    torch.testing.assert_close(fit.radius, torch.full((3,), 0.2 * 128), atol=0.4, rtol=0)


def test_pieces_are_labelled_apart() -> None:
    picture = ["##...#", "..#..#", "#....#", "#.#..."]
    mask = torch.tensor([[character == "#" for character in row] for row in picture])
    labels = label_pieces(torch.stack([mask, ~mask]))
    first = labels[0]
    assert torch.equal(first > 0, mask)
    assert first[0, 0] == first[0, 1] == first[1, 2]
    assert len({int(first[0, 0]), int(first[0, 5]), int(first[3, 0]), int(first[3, 2])}) == 4
    assert int(first[0, 5]) == int(first[2, 5])
    assert len(labels[1].unique()) == 2  # the rest hangs together


def test_other_dtypes_and_frozen_tensors_are_read_too() -> None:
    video = render(SCENE, 5, 64, 64).video
    for variant in (video.bfloat16(), video.double(), video.clone().requires_grad_()):
        assert score(variant, SCENE.attributes).all


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 4, 3, 8, 8), r"\[frames, 3, height, width\].*frames\[0\]"),
        (torch.zeros(4, 8, 8, 3), r"\[frames, 3, height, width\].*permute"),
        (torch.zeros(0, 3, 8, 8), "at least one frame"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "divide 8-bit values by 255"),
        (torch.full((4, 3, 8, 8), 255.0), r"values in \[0, 1\]"),
        (torch.full((4, 3, 8, 8), -1.0), r"video / 2 \+ 0.5"),
        (torch.full((4, 3, 8, 8), float("nan")), r"values in \[0, 1\]"),
    ],
)
def test_what_is_no_video_is_refused(video: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observe(video)


def test_a_full_clip_takes_less_than_a_second() -> None:
    video = render(SCENE, 33, 256, 256).video
    observe(video[:2])
    started = time.process_time()
    assert score(video, SCENE.attributes).all
    assert time.process_time() - started < 1.0
