"""The evaluator on rendered truth: clean, and with blur and noise."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator

import pytest
import torch

from dit_accel.shapes.evaluate import SLOTS, Observation, judge, observe, redraw, score
from dit_accel.shapes.world import (
    MOTIONS,
    TEXTURES,
    Clip,
    ObjectWords,
    Scene,
    SceneObject,
    SceneWords,
    held_out,
    render,
    sample_scene,
    sample_words,
)

SUBSETS = {"basic": 1, "single": 1, "pair": 2, "triple": 3}


def drawn(
    subset: str, count: int, seed: int, frames: int, height: int = 256, width: int = 256
) -> Iterator[tuple[Scene, Clip]]:
    """Random scenes; a basic image is a basic clip's middle, without its motion."""
    rng = random.Random(f"{subset} {seed}")
    for _ in range(count):
        basic = subset == "basic"
        words = sample_words(rng, objects=SUBSETS[subset], motion=basic or frames > 1, plain=basic)
        if basic and frames == 1:
            words = words._replace(objects=(words.objects[0]._replace(motion=None),))
        scene = sample_scene(rng, words)
        yield scene, render(scene, frames, height, width)


def degraded(video: torch.Tensor, sigma: float, noise: float, seed: int) -> torch.Tensor:
    """Gaussian blur (edges repeated), then noise. Both in pixels of the video and units of its values."""
    rows, columns = (_blurring(side, sigma) for side in video.shape[-2:])
    grain = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return (rows @ video @ columns.T + noise * grain).clamp(0, 1)


def _blurring(side: int, sigma: float) -> torch.Tensor:
    """Matrix ``[side, side]`` that blurs what it is multiplied with."""
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    near = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, near, (weights / weights.sum()).expand(side, -1))


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize(
    ("count", "frames", "height", "width"), [(20, 1, 256, 256), (4, 9, 256, 256), (4, 1, 64, 64), (2, 5, 96, 160)]
)
def test_rendered_truth_is_always_right(subset: str, count: int, frames: int, height: int, width: int) -> None:
    for scene, clip in drawn(subset, count, 1, frames, height, width):
        seen = observe(clip.video)
        verdict = judge(seen, scene.words)
        assert verdict.all, (scene, seen)
        assert verdict.bound
        assert seen.residual is not None
        assert seen.residual < 0.05
        _places_are_true(seen, scene, clip)


def _places_are_true(observed: Observation, scene: Scene, clip: Clip) -> None:
    """Centers to 1.5 px, radii to 5 %; colors tell the objects apart."""
    seen = {item.color: item for item in observed.objects}
    for index, item in enumerate(scene.objects):
        found = seen[item.words.color]
        torch.testing.assert_close(found.centers, clip.centers[:, index], atol=1.5, rtol=0)
        radius = torch.full((len(clip.video),), item.size * min(clip.video.shape[-2:]))
        torch.testing.assert_close(found.radius, radius, atol=0.5, rtol=0.05)
        assert found.overlap > 0.9


@pytest.mark.parametrize(("count", "frames"), [(15, 1), (5, 5)])
def test_blur_and_noise_cost_at_most_one_slot_in_a_hundred(count: int, frames: int) -> None:
    rights = [
        right
        for subset in SUBSETS
        for seed, (scene, clip) in enumerate(drawn(subset, count, 2, frames))
        for right in score(degraded(clip.video, 1.5, 0.05, seed), scene.words).right.values()
    ]
    assert len(rights) >= 150
    assert sum(rights) >= 0.99 * len(rights)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize(("frames", "height", "width"), [(4, 96, 160), (33, 160, 96)])
def test_every_motion_is_named_in_frames_of_any_form(motion: str, frames: int, height: int, width: int) -> None:
    words = SceneWords((ObjectWords("cyan", "square", "small", motion=motion),), "black")
    scene = sample_scene(random.Random(4), words)
    assert observe(render(scene, frames, height, width).video).objects[0].motion == motion


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_are_named_at_half_the_default_size_too(texture: str, size: str) -> None:
    for shape in ("circle", "square", "triangle"):
        words = SceneWords((ObjectWords("yellow", shape, size, texture),), "white", True)
        scene = sample_scene(random.Random(5), words)
        assert score(degraded(render(scene, 1, 128, 128).video, 0.75, 0.03, 0), words).all


@pytest.mark.parametrize(("background", "y"), [("white", 0.12), ("gray", 0.88)])
@pytest.mark.parametrize("texture", ["striped", "checked"])
def test_the_palest_bands_belong_to_the_object(texture: str, background: str, y: float) -> None:
    item = SceneObject(ObjectWords("green", "square", "small", texture), 0.09, (0.4, y))
    scene = Scene((item,), background, True)
    for seed in range(3):
        assert score(degraded(render(scene, 1, 256, 256).video, 1.5, 0.05, seed), scene.words).all


def test_shapes_cut_by_the_edge_are_completed() -> None:
    item = SceneObject(ObjectWords("red", "triangle", "large", motion="up"), 0.22, (0.5, 0.4), 0.5)
    scene = Scene((item,), "black")
    clip = render(scene, 9, 128, 128)
    assert float(clip.masks[-1].sum()) < 0.95 * float(clip.masks[4].sum())  # its tip is outside
    assert score(clip.video, scene.words).all
    _places_are_true(observe(clip.video), scene, clip)


def test_an_image_has_no_motion_and_one_place() -> None:
    (words,) = held_out("single", 1, motion=False)
    clip = render(sample_scene(random.Random(0), words), 1, 128, 128)
    (item,) = observe(clip.video).objects
    assert item.motion is None
    assert item.centers.shape == (1, 2)
    assert item.radius.shape == (1,)
    assert "motion" not in score(clip.video, words).right


def test_objects_are_listed_largest_first() -> None:
    items = [("red", 0.09, (0.2, 0.2)), ("blue", 0.15, (0.7, 0.3)), ("green", 0.08, (0.4, 0.8))]
    objects = tuple(SceneObject(ObjectWords(color, "circle"), size, center) for color, size, center in items)
    seen = observe(render(Scene(objects, "gray"), 1, 256, 256).video)
    assert [item.color for item in seen.objects] == ["blue", "red", "green"]


def test_the_scene_is_drawn_anew_from_what_was_read() -> None:
    for _, clip in drawn("triple", 2, 6, 5, 128, 128):
        assert float((redraw(observe(clip.video), 128, 128) - clip.video).square().mean().sqrt()) < 0.05


def test_the_residual_grows_with_what_is_not_explained() -> None:
    (_, clip) = next(drawn("single", 1, 3, 5))
    clean, noisy = observe(clip.video).residual, observe(degraded(clip.video, 0.5, 0.2, 0)).residual
    assert clean is not None
    assert noisy is not None
    assert clean < 0.03
    assert 0.05 < noisy < 0.15  # the noise, averaged over 2 x 2 pixels and cut at black and white


def test_other_dtypes_and_frozen_tensors_are_read_too() -> None:
    scene, clip = next(drawn("pair", 1, 4, 5, 128, 128))
    for variant in (clip.video.bfloat16(), clip.video.double(), clip.video.clone().requires_grad_()):
        assert score(variant, scene.words).all


def test_slots_restrict_what_is_judged() -> None:
    scene, clip = next(drawn("basic", 1, 5, 5, 128, 128))
    assert tuple(score(clip.video, scene.words).right) == SLOTS
    some = score(clip.video, scene.words, slots=("background", "color"))
    assert some.right == {"color": True, "background": True}
    wrong = scene.words._replace(gradient=True)
    assert score(clip.video, wrong, slots=("color", "shape", "motion", "background")).all
    assert not score(clip.video, wrong).all


@pytest.mark.parametrize(("frames", "seconds"), [(33, 1.0), (1, 0.1)])
def test_observing_is_fast(frames: int, seconds: float) -> None:
    _, clip = next(drawn("triple", 1, 7, frames))
    observe(clip.video[:1])
    spent = []
    for _ in range(3):  # the best of three: other processes share the caches
        started = time.process_time()
        assert observe(clip.video).count == 3
        spent.append((time.process_time() - started) / torch.get_num_threads())
    assert min(spent) < seconds
