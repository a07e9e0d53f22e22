"""Deliberate errors must be caught, each by its slot; what is unclear has no word; what is no clip is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dit_accel.shapes.evaluate import Observation, judge, observe, score
from dit_accel.shapes.world import BACKGROUNDS, COLORS, ObjectWords, Scene, SceneObject, SceneWords, render

RED = SceneObject(ObjectWords("red", "circle", "small", "plain", "right"), 0.09, (0.4, 0.25), 0.3)
BLUE = SceneObject(ObjectWords("blue", "square", "medium", "striped", "still"), 0.14, (0.6, 0.7))
PAIR = Scene((RED, BLUE), "gray")
SINGLE = Scene((BLUE,), "white")


def shown(scene: Scene, frames: int = 9, side: int = 128) -> torch.Tensor:
    return render(scene, frames, side, side).video


def changed(item: SceneObject, **words: str) -> SceneObject:
    return SceneObject(item.words._replace(**words), item.size, item.center, item.travel, item.phase)


def wrong_slots(video: torch.Tensor, words: SceneWords) -> set[str]:
    return {slot for slot, right in score(video, words).right.items() if not right}


def disk(video: torch.Tensor, center: tuple[float, float], radius: float, color: tuple[float, ...]) -> torch.Tensor:
    """The clip with a disk painted over every frame; all in fractions of the side."""
    places = (torch.arange(video.shape[-1]) + 0.5) / video.shape[-1]
    inside = (places - center[0]).square() + (places[:, None] - center[1]).square() < radius**2
    return torch.where(inside, torch.tensor(color).view(3, 1, 1), video)


FAULTS: dict[str, tuple[Scene, set[str]]] = {
    "wrong texture": (Scene((RED, changed(BLUE, texture="checked")), "gray"), {"texture"}),
    "no texture": (Scene((RED, changed(BLUE, texture="plain")), "gray"), {"texture"}),
    "wrong direction": (Scene((changed(RED, motion="left"), BLUE), "gray"), {"motion"}),
    "slanted": (Scene((changed(RED, motion="diagonally"), BLUE), "gray"), {"motion"}),
    "wrong color": (Scene((changed(RED, color="yellow"), BLUE), "gray"), {"color"}),
    "wrong shape": (Scene((changed(RED, shape="triangle"), BLUE), "gray"), {"shape"}),
    "wrong size": (Scene((RED, SceneObject(BLUE.words, 0.22, BLUE.center)), "gray"), {"size"}),
    "gradient for plain": (Scene(PAIR.objects, "gray", True), {"gradient"}),
    "wrong background": (Scene(PAIR.objects, "brown"), {"background"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_word_is_caught_alone(fault: str) -> None:
    scene, slots = FAULTS[fault]
    assert wrong_slots(shown(PAIR), PAIR.words) == set()
    assert wrong_slots(shown(scene), PAIR.words) == slots
    assert score(shown(scene), PAIR.words).bound == slots.isdisjoint({"color", "shape"})


def test_plain_for_gradient_is_caught() -> None:
    assert wrong_slots(shown(PAIR), PAIR.words._replace(gradient=True)) == {"gradient"}


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_every_background_has_its_word(background: str, gradient: bool) -> None:
    seen = observe(shown(Scene((RED,), background, gradient), 1))
    assert (seen.background, seen.gradient) == (background, gradient)


def test_swapped_colors_are_not_bound() -> None:
    swapped = Scene((changed(RED, color="blue"), changed(BLUE, color="red")), "gray")
    verdict = score(shown(swapped), PAIR.words)
    assert verdict.right["count"]
    assert not verdict.bound
    assert not verdict.all


def test_a_missing_object_is_caught() -> None:
    verdict = score(shown(Scene((RED,), "gray")), PAIR.words)
    assert [slot for slot, right in verdict.right.items() if right] == ["background", "gradient"]
    assert not verdict.bound


@pytest.mark.parametrize("color", ["green", "blue"])
def test_an_extra_object_is_caught_of_a_new_color_or_a_known_one(color: str) -> None:
    extra = SceneObject(ObjectWords(color, "circle", "small", motion="still"), 0.09, (0.2, 0.75))
    video = shown(Scene((RED, BLUE, extra), "gray"))
    assert observe(video).count == 3
    assert wrong_slots(video, PAIR.words) == {"count"}
    assert not score(video, PAIR.words).bound


def test_more_objects_than_the_world_has_are_counted() -> None:
    places = [(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8), (0.5, 0.5)]
    objects = tuple(
        SceneObject(ObjectWords(color, "circle"), 0.09, at) for color, at in zip(COLORS, places, strict=False)
    )
    seen = observe(shown(Scene(objects, "black"), 1))
    assert seen.count == 5
    assert len(seen.objects) == 3


@pytest.mark.parametrize("fill", [COLORS["red"], (0.5, 0.5, 0.5)], ids=["red", "gray"])
def test_a_hole_filled_with_the_wrong_color_is_caught(fill: tuple[float, ...]) -> None:
    video = shown(SINGLE)
    assert wrong_slots(video, SINGLE.words) == set()
    beside, inside = disk(video, (0.25, 0.3), 0.1, fill), disk(video, BLUE.center, 0.07, fill)
    assert wrong_slots(beside, SINGLE.words) == {"count"}
    assert "count" in wrong_slots(inside, SINGLE.words)


def test_a_ring_is_no_shape() -> None:
    circle = Scene((changed(BLUE, shape="circle", texture="plain"),), "white")
    (item,) = observe(disk(shown(circle), BLUE.center, 0.09, BACKGROUNDS["white"])).objects
    assert (item.color, item.shape, item.motion) == ("blue", None, "still")


def test_a_frozen_clip_stands_still() -> None:
    scene = Scene((RED,), "gray")
    frozen = shown(scene)[4:5].expand(9, -1, -1, -1)
    assert observe(frozen).objects[0].motion == "still"
    assert wrong_slots(frozen, scene.words) == {"motion"}


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [("right", "left"), ("down", "up"), ("diagonally", None), ("circling", None), ("still", "still")],
)
def test_a_clip_shown_backwards_moves_the_other_way(motion: str, backwards: str | None) -> None:
    item = SceneObject(RED.words._replace(motion=motion), 0.09, (0.5, 0.5), 0.25 if motion != "still" else 0.0)
    assert observe(shown(Scene((item,), "black")).flip(0)).objects[0].motion == backwards


def test_noise_shows_nothing() -> None:
    seen = observe(torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert (seen.objects, seen.count, seen.background, seen.gradient) == ((), 0, None, None)
    assert seen.residual is None
    assert not any(judge(seen, PAIR.words).right.values())


def test_an_empty_clip_shows_only_its_background() -> None:
    seen = observe(torch.full((9, 3, 64, 64), 0.5))
    assert (seen.objects, seen.count, seen.background, seen.gradient) == ((), 0, "gray", False)
    assert seen.residual == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("color", [(0.2, 0.35, 0.6), (0.7, 0.7, 0.1)])
def test_a_background_far_from_the_palette_has_no_word(color: tuple[float, ...]) -> None:
    video = torch.tensor(color).view(1, 3, 1, 1).expand(3, 3, 64, 64)
    assert observe(video).background is None
    assert observe(video).background_rgb == pytest.approx(color, abs=1e-3)


@pytest.mark.parametrize(
    ("top", "bottom"),
    [
        ((0.62, 0.62, 0.62), (0.38, 0.38, 0.38)),
        ((0.44, 0.44, 0.44), (0.56, 0.56, 0.56)),
        ((0.6, 0.3, 0.3), (0.4, 0.7, 0.7)),
    ],
    ids=["upside down", "half as steep", "from red to cyan"],
)
def test_another_gradient_is_undecided(top: tuple[float, ...], bottom: tuple[float, ...]) -> None:
    down = torch.linspace(0, 1, 64).view(1, 1, 64, 1).expand(1, 3, 64, 64)
    seen = observe(torch.tensor(top).view(3, 1, 1).lerp(torch.tensor(bottom).view(3, 1, 1), down))
    assert (seen.background, seen.gradient) == ("gray", None)


def test_an_object_that_turns_its_color_is_one_without_a_color_word() -> None:
    scene = Scene((RED,), "gray")
    video = torch.where(
        torch.arange(9).view(9, 1, 1, 1) < 5, shown(scene), shown(Scene((changed(RED, color="magenta"),), "gray"))
    )
    assert wrong_slots(video, scene.words) == {"color"}


def test_a_pale_object_has_no_color_word() -> None:
    pale = disk(torch.full((3, 3, 128, 128), 0.02), (0.5, 0.5), 0.15, (0.97, 0.6, 0.6))
    (item,) = observe(pale).objects
    assert (item.color, item.shape, item.texture) == (None, "circle", "plain")


def test_a_few_empty_frames_do_not_matter_but_most_do() -> None:
    scene = Scene((RED,), "gray")
    video = shown(scene).clone()
    video[[0, 3, 8]] = 0.5
    seen = observe(video)
    assert judge(seen, scene.words).all
    assert seen.objects[0].centers.isnan().any(1).nonzero()[:, 0].tolist() == [0, 3, 8]
    assert seen.objects[0].radius.isnan().nonzero()[:, 0].tolist() == [0, 3, 8]
    video[[1, 2]] = 0.5
    assert observe(video).objects == ()


def test_a_shape_that_jumps_once_still_moves_its_way() -> None:
    scene = Scene((RED,), "gray")
    video = shown(scene).clone()
    video[8] = video[0]
    assert score(video, scene.words).all


def test_dirt_trails_and_stains_are_no_objects() -> None:
    scene = Scene((RED,), "gray")
    video = shown(scene)
    trailing = video + 0.12 * (video[0] - video)
    stained = disk(trailing, (0.75, 0.75), 0.15, (0.4, 0.65, 0.5))
    assert score(disk(stained, (0.2, 0.8), 0.03, COLORS["green"]), scene.words).all


def test_touching_objects_of_two_colors_stay_two() -> None:
    beside = SceneObject(ObjectWords("yellow", "square", motion="still"), 0.13, (0.6 - 0.27 * 0.886, 0.7))
    scene = Scene((beside, changed(BLUE, texture="plain")), "brown")
    assert score(shown(scene), scene.words).all


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda seen: judge(seen, PAIR.words, ("colour",)), "slots must name some of color, shape.*colour"),
        (lambda seen: judge(seen, PAIR.words, ()), "slots must name"),
        (lambda seen: judge(seen, PAIR.words, "color"), "slots must name"),
        (
            lambda seen: judge(seen, SceneWords((ObjectWords("red", "circle"),), "gray"), ("motion",)),
            "no slot is left",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(call: Callable[[Observation], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Observation((), 0, "gray", False))
