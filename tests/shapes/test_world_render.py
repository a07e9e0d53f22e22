"""Pictures and clips of the shapes world show what their truth says."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from dit_accel.shapes.world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    ObjectWords,
    Scene,
    SceneObject,
    backdrop,
    render,
    sample_scene,
    sample_words,
    second_color,
    signed_distance,
    texture_color,
    trajectory,
)

RED_LEFT = SceneObject(ObjectWords("red", "circle", motion="left"), 0.2, (0.5, 0.5), 0.3)


def scene_of(*items: SceneObject, background: str = "gray", gradient: bool = False) -> Scene:
    return Scene(items, background, gradient)


def item_of(
    size: float = 0.2, center: tuple[float, float] = (0.5, 0.5), travel: float = 0.0, **words: str
) -> SceneObject:
    return SceneObject(RED_LEFT.words._replace(**words), size, center, travel)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_covers_the_area_of_its_circle(shape: str) -> None:
    clip = render(scene_of(item_of(shape=shape)), 1, 256, 256)
    assert float(clip.masks.sum()) == pytest.approx(math.pi * (0.2 * 256) ** 2, rel=0.01)


@pytest.mark.parametrize("texture", ["plain", "checked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_center_is_the_centroid_in_every_frame(shape: str, texture: str) -> None:
    item = replace(item_of(0.12, (0.47, 0.53), shape=shape, texture=texture, motion="circling"), travel=0.2, phase=1.0)
    clip = render(scene_of(item), 7, 256, 256)
    mask, positions = clip.masks[:, 0], torch.arange(256) + 0.5
    moments = torch.stack([mask.sum(1) @ positions, mask.sum(2) @ positions], 1)
    torch.testing.assert_close(moments / mask.sum((1, 2))[:, None], clip.centers[:, 0], atol=0.1, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (200, 72)])
@pytest.mark.parametrize("motion", DIRECTIONS)
def test_straight_motion_goes_from_end_to_end(motion: str, height: int, width: int) -> None:
    clip = render(scene_of(item_of(0.15, (0.5, 0.4), 0.3, motion=motion)), 9, height, width)
    way = torch.tensor(DIRECTIONS[motion]) * torch.tensor([width, height])
    middle = torch.tensor([0.5 * width, 0.4 * height])
    for frame, share in ((0, -0.15), (2, -0.075), (4, 0.0), (8, 0.15)):
        torch.testing.assert_close(clip.centers[frame, 0], middle + share * way)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (100, 180), (240, 100)])
def test_circling_is_one_clockwise_turn_round_the_center(height: int, width: int) -> None:
    item = replace(item_of(motion="circling"), travel=0.2)
    centers = render(scene_of(item), 9, height, width).centers[:, 0] - torch.tensor([width / 2, height / 2])
    right, down, left, up = [20.0, 0.0], [0.0, 20.0], [-20.0, 0.0], [0.0, -20.0]
    torch.testing.assert_close(centers[::2], torch.tensor([right, down, left, up, right]), atol=1e-4, rtol=0)
    begun_below = trajectory(replace(item, phase=math.pi / 2), 9, height, width)
    torch.testing.assert_close(begun_below[0] - torch.tensor([width / 2, height / 2]), torch.tensor(down))


def test_one_frame_shows_the_middle_of_the_way_or_the_beginning_of_the_orbit() -> None:
    item = replace(RED_LEFT, center=(0.5, 0.4), travel=0.4)
    clip = render(scene_of(item), 1, 64, 96)
    torch.testing.assert_close(clip.centers[:, 0], torch.tensor([[48.0, 25.6]]))
    torch.testing.assert_close(clip.centers[:, 0], trajectory(item, 3, 64, 96)[1:2])
    still = replace(item, words=item.words._replace(motion=None))
    torch.testing.assert_close(trajectory(still, 1, 64, 96), clip.centers[:, 0])
    orbit = replace(item, words=item.words._replace(motion="circling"), phase=0.7)
    torch.testing.assert_close(trajectory(orbit, 1, 64, 96), trajectory(orbit, 5, 64, 96)[:1])


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_pixels_have_the_palette_colors(color: str, background: str) -> None:
    video = render(scene_of(item_of(travel=0.3, color=color, shape="square"), background=background), 3, 64, 64).video
    assert video[1, :, 32, 32].tolist() == pytest.approx(COLORS[color])
    assert video[1, :, 0, 0].tolist() == pytest.approx(BACKGROUNDS[background])


def test_edges_are_anti_aliased() -> None:
    mask = render(scene_of(item_of(0.2, (0.5, 0.5), shape="square")), 1, 64, 64).masks[0, 0]
    half = 0.886 * 0.2 * 64  # 11.34 px: the outermost column it enters is a third covered
    assert mask[32, 32:].sum() == pytest.approx(half, abs=1e-4)
    assert mask[32, 32 + 11] == pytest.approx(half - 11, abs=1e-4)


@pytest.mark.parametrize("texture", ["striped", "checked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.09, 0.22])
def test_both_colors_of_a_texture_share_the_surface(size: float, shape: str, texture: str) -> None:
    clip = render(scene_of(item_of(size, shape=shape, texture=texture, color="blue")), 1, 256, 256)
    pixels = clip.video[0][:, clip.masks[0, 0] == 1]
    palette = torch.tensor([COLORS["blue"], second_color("blue")])
    light = (pixels - palette[0][:, None]).norm(dim=0) / (palette[1] - palette[0]).norm()
    assert float(light.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(((light < 0.02) | (light > 0.98)).float().mean()) > 0.75  # the rest are the edges between them


def test_stripes_are_horizontal_with_a_period_of_four_fifths_of_the_radius() -> None:
    video = render(scene_of(item_of(0.2, shape="square", texture="striped")), 1, 200, 200).video[0]
    inner = video[:, 66:134, 66:134]  # the radius is 40 px, and half the side 35.4 px
    torch.testing.assert_close(inner, inner[:, :, :1].expand_as(inner))
    torch.testing.assert_close(inner[:, :-32], inner[:, 32:], atol=1e-4, rtol=0)
    assert (inner[:, :-16] - inner[:, 16:]).abs().amax(0).min() > 0.4


def test_checks_alternate_both_ways() -> None:
    video = render(scene_of(item_of(0.2, shape="square", texture="checked")), 1, 200, 200).video[0]
    inner = video[:, 66:134, 66:134]
    for turned in (inner, inner.transpose(1, 2)):
        assert (turned[:, :-16] - turned[:, 16:]).abs().amax(0).min() > 0.4
        torch.testing.assert_close(turned[:, :-16, :-16], turned[:, 16:, 16:], atol=1e-4, rtol=0)


def test_textures_are_fixed_to_the_object() -> None:
    item = item_of(0.2, travel=0.2, texture="checked", motion="diagonally")
    video = render(scene_of(item), 3, 160, 160).video
    torch.testing.assert_close(video[0, :, 20:-16, 20:-16], video[1, :, 36:, 36:], atol=1e-3, rtol=0)


def test_a_texture_in_a_tiny_picture_is_a_mixture() -> None:
    x = torch.arange(8.0)[None, :]
    color = texture_color(ObjectWords("red", "circle", texture="checked"), x, x.T, 1e-3)
    mixed = (torch.tensor(COLORS["red"]) + torch.tensor(second_color("red"))) / 2
    torch.testing.assert_close(color, mixed.view(3, 1, 1).expand(3, 8, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_gradient_runs_evenly_from_darker_to_lighter(background: str) -> None:
    rows = backdrop(background, True, 128, 40)
    torch.testing.assert_close(rows, rows[:, :, :1].expand_as(rows))
    torch.testing.assert_close(rows.diff(dim=1), torch.full((3, 127, 40), 0.25 / 128), atol=1e-6, rtol=0)
    color = torch.tensor(BACKGROUNDS[background])
    assert (rows[:, 0, 0] < color + 0.001).all()
    assert (rows[:, -1, 0] > color).all()
    palette = torch.tensor(list(BACKGROUNDS.values()))
    nearest = (palette - rows.mean((1, 2))).norm(dim=1).argmin()
    assert list(BACKGROUNDS)[nearest] == background


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 40, 72), (2, 17, 90), (5, 64, 64), (129, 33, 24)])
@pytest.mark.parametrize("objects", [1, 3])
def test_any_length_and_size(objects: int, frames: int, height: int, width: int) -> None:
    rng = random.Random(frames)
    scene = sample_scene(rng, sample_words(rng, objects=objects))
    clip = render(scene, frames, height, width)
    assert clip.video.shape == (frames, 3, height, width)
    assert clip.masks.shape == (frames, objects, height, width)
    assert clip.centers.shape == (frames, objects, 2)
    assert clip.backdrop.shape == (3, height, width)
    assert all(part.dtype == torch.float32 for part in clip)
    assert 0 <= clip.video.min() <= clip.video.max() <= 1
    assert 0 <= clip.masks.min() <= clip.masks.max() <= 1


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_the_backdrop_is_what_the_masks_leave(objects: int) -> None:
    rng = random.Random(objects)
    clip = render(sample_scene(rng, sample_words(rng, objects=objects)), 5, 64, 80)
    covered = clip.masks.sum(1, keepdim=True)
    empty = clip.backdrop.expand_as(clip.video)
    assert torch.equal(torch.where(covered == 0, clip.video, empty), empty)
    difference = (clip.video - empty).norm(dim=1, keepdim=True)
    assert difference[covered > 0.5].min() > 0.1


def test_later_objects_hide_earlier_ones() -> None:
    below, above = item_of(0.3), item_of(0.2, (0.6, 0.5), color="blue", shape="square")
    clip, alone = (render(scene_of(*items), 1, 64, 64) for items in ((below, above), (below,)))
    assert clip.video[0, :, 32, 38].tolist() == pytest.approx(COLORS["blue"])
    torch.testing.assert_close(clip.masks[0, 0], alone.masks[0, 0] * (1 - clip.masks[0, 1]))


def test_the_same_scene_gives_the_same_clip() -> None:
    scene = sample_scene(random.Random(3), sample_words(random.Random(4), objects=2))
    for one, other in zip(render(scene, 3, 48, 48), render(scene, 3, 48, 48), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("texture", ["plain", "striped", "checked"])
def test_everything_is_drawn_on_the_chosen_device(texture: str) -> None:
    items = (item_of(texture=texture), item_of(0.1, shape="triangle", texture=texture))
    for part in render(scene_of(*items, gradient=True), 2, 16, 16, device="meta"):
        assert part.device.type == "meta"


@pytest.mark.parametrize("size", [(0, 8, 8), (1, 0, 8), (1, 8, -1)])
def test_an_empty_clip_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        render(scene_of(RED_LEFT), *size)


def test_an_unknown_outline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hexagon.*circle, square, triangle"):
        signed_distance("hexagon", torch.zeros(1), torch.zeros(1), 1.0)
