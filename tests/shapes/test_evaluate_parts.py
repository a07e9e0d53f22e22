"""The parts of the evaluator, each against answers that are known without it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dit_accel.shapes.evaluate.backdrop import fit_backdrop
from dit_accel.shapes.evaluate.motion import fit_circle, name_motion
from dit_accel.shapes.evaluate.outline import fit_shape, is_clear, name_size, rank_shapes, window
from dit_accel.shapes.evaluate.pieces import Piece, find_pieces, label_pieces, nearest_hue, split
from dit_accel.shapes.evaluate.texture import name_color, read_surface
from dit_accel.shapes.evaluate.tracks import find_tracks
from dit_accel.shapes.evaluate.working import dilate, erode, moments, working_copy
from dit_accel.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    ObjectWords,
    Scene,
    SceneObject,
    backdrop,
    render,
    second_color,
)

STEPS = torch.arange(33.0)


def straight(x: float, y: float) -> torch.Tensor:
    """A straight track of 33 frames over a part of 128 pixels, to the right and down."""
    return torch.stack([64 + x * 128 * (STEPS / 32 - 0.5), 64 + y * 128 * (STEPS / 32 - 0.5)], 1)


def orbit(turns: float, radius: float = 20, frames: int = 33) -> torch.Tensor:
    angles = 0.7 + 2 * math.pi * turns * torch.arange(frames) / max(1, frames - 1)
    return 64 + radius * torch.stack([angles.cos(), angles.sin()], 1)


TRACKS = {
    "right": (straight(0.3, 0.0), "right"),
    "up, 15 degrees off": (straight(0.08, -0.3), "up"),
    "between left and up": (straight(-0.3, -0.3), None),
    "between right and lower right": (straight(0.3, 0.124), None),
    "lower right": (straight(0.3, 0.25), "diagonally"),
    "far too slow": (straight(0.065, 0.0), None),
    "still, trembling": (64 + 2 * torch.stack([(9 * STEPS).sin(), (7 * STEPS).cos()], 1), "still"),
    "still but for two frames": (torch.where((STEPS % 20 == 5)[:, None], 90.0, straight(0, 0)), "still"),
    "there and back": (64 + torch.stack([30 - (STEPS - 16).abs() * 2, 0 * STEPS], 1), None),
    "clockwise": (orbit(1), "circling"),
    "three quarters": (orbit(0.75), "circling"),
    "half a turn": (orbit(0.5), None),
    "two turns": (orbit(2), None),
    "counter-clockwise": (orbit(-1), None),
    "trembling on the spot": (orbit(1, radius=1.5), "still"),
    "clockwise, one frame far off": (torch.where((STEPS == 7)[:, None], 10.0, orbit(1)), "circling"),
}


@pytest.mark.parametrize("name", TRACKS)
def test_motion_of_tracks(name: str) -> None:
    track, word = TRACKS[name]
    assert name_motion(STEPS, track, 32, 128, 128) == word


def test_motion_counts_in_fractions_of_each_side() -> None:
    wide = straight(0.3, 0.3) * torch.tensor([2.4, 1.0])
    assert name_motion(STEPS, wide, 32, 128, 307) == "diagonally"
    assert name_motion(STEPS, wide, 32, 307, 307) is None


@pytest.mark.parametrize(("frames", "word"), [(2, "still"), (3, None), (4, "circling")])
def test_a_turn_needs_four_frames(frames: int, word: str | None) -> None:
    assert name_motion(torch.arange(float(frames)), orbit(1, frames=frames), frames - 1, 128, 128) == word


def test_motion_of_half_a_clip_is_scaled_to_all_of_it() -> None:
    assert name_motion(STEPS[:20], orbit(1)[:20], 32, 128, 128) == "circling"
    assert name_motion(STEPS[:4], straight(0.5, 0)[:4], 32, 128, 128) == "right"
    assert name_motion(STEPS[:1], straight(0.5, 0)[:1], 32, 128, 128) is None


def test_a_circle_is_fitted_exactly_and_strays_are_dropped() -> None:
    track = orbit(0.6)
    track[5] += 100
    middle, radius = fit_circle(track)
    assert middle.tolist() == pytest.approx([64, 64], abs=0.5)
    assert radius == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("center", [(0.52, 0.47), (0.95, 0.5)], ids=["inside", "cut"])
def test_a_fit_finds_center_and_radius(shape: str, center: tuple[float, float]) -> None:
    clip = render(Scene((SceneObject(ObjectWords("red", shape), 0.2, center),), "black"), 2, 128, 128)
    view = window(clip.masks[:, 0] > 0.5)
    ranks = rank_shapes(view)
    assert ranks[0][1] == shape
    assert is_clear(ranks)
    fit = fit_shape(view, shape)
    torch.testing.assert_close(fit.centers, clip.centers[:, 0], atol=0.6, rtol=0)
    torch.testing.assert_close(fit.radius, torch.full((2,), 0.2 * 128), atol=0.4, rtol=0)


def test_what_lies_between_two_shapes_is_neither() -> None:
    x, y = torch.arange(64) - 31.5, (torch.arange(64) - 31.5)[:, None]
    rounded = [(x.abs() ** power + y.abs() ** power) < 20**power for power in (2, 3.7, 6)]
    ranks = [rank_shapes(window(mask[None])) for mask in rounded]
    assert [rank[0][1] if is_clear(rank) else None for rank in ranks] == ["circle", None, "square"]


def test_a_square_on_its_corner_is_no_circle() -> None:
    x, y = torch.arange(64) - 31.5, (torch.arange(64) - 31.5)[:, None]
    turned = [((x + y).abs() ** power + (y - x).abs() ** power) < 28.0**power for power in (2, 3.7, 6, 20)]
    ranks = [rank_shapes(window(mask[None])) for mask in turned]
    assert [rank[0][1] if is_clear(rank) else None for rank in ranks] == ["circle", None, None, None]


@pytest.mark.parametrize(
    ("radius", "word"),
    [
        (0.04, None),
        (0.07, "small"),
        (0.114, "small"),
        (0.116, "medium"),
        (0.176, "medium"),
        (0.179, "large"),
        (0.4, None),
    ],
)
def test_sizes_meet_half_way(radius: float, word: str | None) -> None:
    assert name_size(radius) == word


def test_every_size_has_its_word() -> None:
    for word, limits in SIZES.items():
        assert {name_size(limit) for limit in limits} == {word}


def surface_of(pattern: torch.Tensor, color: str = "green") -> tuple[str | None, str | None]:
    """Color and texture of a circle of radius 24 with a lightness ``[64, 64]``."""
    first, second = (torch.tensor(rgb)[:, None, None] for rgb in (COLORS[color], second_color(color)))
    places = torch.arange(64) - 31.5
    view = window(((places.square() + places[:, None].square()) < 24**2)[None])
    pixels = view.cut((first + pattern * (second - first))[None], torch.tensor([0]))
    surface = read_surface(pixels, view, fit_shape(view, "circle"), color)
    return surface.color, surface.texture


def waves(period: float, begin: float = 0.0) -> torch.Tensor:
    """A square wave of 0 and 1 over 64 places; ``period`` in radii of 24."""
    return (torch.remainder((torch.arange(64) - begin) / (24 * period), 1) < 0.5).float()


@pytest.mark.parametrize("begin", [0.0, 5.0, 11.0])
@pytest.mark.parametrize("period", [0.7, 0.8, 0.9])
def test_textures_count_wherever_they_begin(begin: float, period: float) -> None:
    wave = waves(period, begin)
    checks = (wave[:, None] - waves(period)).abs()
    assert surface_of(wave[:, None].expand(64, 64)) == ("green", "striped")
    assert surface_of(checks) == ("green", "checked")
    assert surface_of(0.3 + 0.4 * checks) == ("green", "checked")  # washed out


def test_other_patterns_have_no_texture_word() -> None:
    wave, half = waves(0.8), (torch.arange(64) < 32).float()
    assert surface_of(wave.expand(64, 64))[1] is None  # upright stripes
    assert surface_of((wave[:, None] + wave) / 2)[1] is None  # a grid
    assert surface_of(half.expand(64, 64))[1] is None  # two halves
    assert surface_of(0.15 * wave[:, None].expand(64, 64)) == ("green", "plain")
    assert surface_of(torch.linspace(-0.3, 0.3, 64).expand(64, 64)) == ("green", "plain")  # shaded


def test_colors_far_from_the_palette_have_no_name() -> None:
    assert name_color((0.85, 0.2, 0.15)) == "red"
    assert name_color((0.5, 0.5, 0.5)) is None


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_mixing_with_white_or_the_background_keeps_the_hue(color: str, background: str) -> None:
    empty = torch.tensor(BACKGROUNDS[background])
    surfaces = [torch.tensor(rgb) for rgb in (COLORS[color], second_color(color))]
    difference = torch.stack([cover * (surface - empty) for cover in (1.0, 0.5) for surface in surfaces])
    found = nearest_hue(difference.T.reshape(1, 3, 1, 4), empty)
    assert found.unique().tolist() == [list(COLORS).index(color)]
    assert nearest_hue(torch.full((1, 3, 1, 1), 0.3), empty).item() == len(COLORS)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_backdrop_is_found_behind_large_objects(background: str, gradient: bool) -> None:
    truth = backdrop(background, gradient, 96, 128)
    video = truth.expand(4, 3, 96, 128).clone()
    video[:, :, 20:60, 10:110] = torch.tensor(COLORS["red"])[:, None, None]  # most of 40 rows
    found = fit_backdrop(video)
    assert found is not None
    torch.testing.assert_close(found.rows(96), truth[:, :, 0], atol=0.01, rtol=0)


def test_there_is_no_backdrop_if_most_is_something_else() -> None:
    video = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    video[:, :, :20] = 0.5
    assert fit_backdrop(video) is None


@pytest.mark.parametrize(("color", "background"), [("blue", "brown"), ("yellow", "black"), ("cyan", "white")])
def test_outlines_lie_half_way_between_object_and_background(color: str, background: str) -> None:
    clip = render(Scene((SceneObject(ObjectWords(color, "circle"), 0.15, (0.5, 0.5)),), background), 1, 128, 128)
    inside = torch.tensor(COLORS[color]).view(1, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(clip.video, (3, 3, 3, 3), mode="replicate"), 7, stride=1)
    trail = clip.masks.roll(12, 3).maximum(clip.masks.roll(30, 3)) * (1 - clip.masks)  # as large as the object
    trailing = clip.video.lerp(inside, 0.27 * trail)
    for video in (blurred, trailing):
        ((found,),) = find_pieces(video, clip.backdrop[:, :, 0])
        assert found.hue == color
        assert found.area == pytest.approx(math.pi * (0.15 * 128) ** 2, rel=0.03)
        assert found.center == pytest.approx((64, 64), abs=0.5)


PICTURE = [
    "######....####",
    "######....####",
    "######....####",
    "######....####",
    "##########....",
    "..............",
    "##############",
]


def test_pieces_are_told_apart_and_lines_dropped() -> None:
    mask = torch.tensor([[mark == "#" for mark in row for _ in range(2)] for row in PICTURE for _ in range(2)])
    (pieces, nothing) = split(torch.stack([mask, torch.zeros_like(mask)]), least=20)
    assert [round(moments(piece[None].float())[1][0, 0].item()) for piece in pieces] == [6, 24]
    assert nothing == []
    assert [len(found) for found in split(mask[None], least=70)] == [1]


def test_a_drifting_hue_is_one_piece_and_two_that_meet_are_two() -> None:
    cyan, blue = (torch.tensor(rgb).view(3, 1, 1) for rgb in ((0.1, 0.8, 0.9), (0.15, 0.4, 0.95)))
    video, empty = torch.full((2, 3, 96, 96), 0.98), torch.full((3, 96), 0.98)
    video[:, :, 30:60, 20:70] = cyan.lerp(blue, torch.linspace(0, 1, 50))
    video[1, :, 30:60, 45:70] = torch.tensor(COLORS["blue"]).view(3, 1, 1)
    video[1, :, 30:60, 20:45] = torch.tensor(COLORS["cyan"]).view(3, 1, 1)
    drifting, parted = find_pieces(video, empty)
    assert [(round(found.center[0]), found.area, found.hue) for found in drifting] == [(45, 1500, "cyan")]
    assert sorted((round(found.center[0]), found.hue) for found in parted) == [(32, "cyan"), (58, "blue")]


def test_pieces_are_labeled_apart() -> None:
    picture = ["##...#", "..#..#", "#....#", "#.#..."]
    mask = torch.tensor([[character == "#" for character in row] for row in picture])
    labels = label_pieces(torch.stack([mask, ~mask]))
    first = labels[0]
    assert torch.equal(first > 0, mask)
    assert first[0, 0] == first[0, 1] == first[1, 2]
    assert len({int(first[0, 0]), int(first[0, 5]), int(first[3, 0]), int(first[3, 2])}) == 4
    assert int(first[0, 5]) == int(first[2, 5])
    assert len(labels[1].unique()) == 2  # the rest hangs together


def piece(x: float, y: float, hue: str = "red") -> Piece:
    return Piece((x, y), 100.0, torch.zeros(1, 1, dtype=torch.bool), hue)


def test_tracks_follow_the_nearest_piece() -> None:
    pieces = [[piece(10 + 2 * t, 20), piece(90 - 2 * t, 50)] for t in range(33)]
    for found in pieces[::2]:
        found.reverse()
    tracks = find_tracks(pieces, 128, 128)
    assert sorted([*{piece.center[1] for piece in track.pieces}] for track in tracks) == [[20], [50]]
    assert all(track.frames == list(range(33)) for track in tracks)


def test_tracks_keep_to_one_hue_if_they_can() -> None:
    crossing = [[piece(10 + 3 * t, 60), piece(106 - 3 * t, 62, "blue")] for t in range(33)]
    tracks = find_tracks(crossing, 128, 128)
    assert sorted({found.hue for found in track.pieces} for track in tracks) == [{"red"}, {"blue"}]
    turning = [[piece(10 + 3 * t, 60, "red" if t < 20 else "magenta")] for t in range(33)]
    (track,) = find_tracks(turning, 128, 128)
    assert (len(track.frames), track.hue) == (33, "red")
    elsewhere = [[piece(10, 60)] if t < 20 else [piece(30, 60, "magenta")] for t in range(33)]
    assert [len(track.frames) for track in find_tracks(elsewhere, 128, 128)] == [20]


def test_tracks_bridge_gaps_and_flashes_are_dropped() -> None:
    gap = range(4, 16)
    pieces = [[] if t in gap else [piece(10 + 3 * t, 20)] for t in range(33)]
    for t in range(10, 26):
        pieces[t].append(piece(100, 100))
    (track,) = find_tracks(pieces, 128, 128)
    assert track.frames == [t for t in range(33) if t not in gap]
    pieces[26].append(piece(100, 100))
    assert len(find_tracks(pieces, 128, 128)) == 2


@pytest.mark.parametrize(
    ("size", "small", "scale"),
    [
        ((256, 256), (128, 128), 2),
        ((480, 832), (160, 277), 3),
        ((100, 60), (300, 180), 1 / 3),
        ((200, 128), (200, 128), 1),
    ],
)
def test_clips_are_read_near_one_size(size: tuple[int, int], small: tuple[int, int], scale: float) -> None:
    copy, found = working_copy(torch.rand(1, 3, *size))
    assert (tuple(copy.shape[-2:]), found) == (small, scale)


def test_masks_grow_and_shrink_by_squares() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 3:6, 0:5] = True
    assert int(dilate(mask, 1).sum()) == 5 * 6
    assert int(erode(mask, 1).sum()) == 1 * 3
    area, center = moments(mask.float())
    assert (area.tolist(), center.tolist()) == ([15.0], [[2.5, 4.5]])
