from __future__ import annotations

import math
import random

import pytest
import torch

from dit_accel.shapes.world import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    Attributes,
    Scene,
    all_attributes,
    held_out_attributes,
    parse_prompt,
    render,
    sample_scene,
    signed_distance,
    training_attributes,
    trajectory,
)

RED_LEFT = Attributes("red", "circle", "left", "gray")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_covers_the_area_of_its_circle(shape: str) -> None:
    clip = render(Scene(RED_LEFT._replace(shape=shape), 0.2, (0.5, 0.5), 0.0), 1, 256, 256)
    assert float(clip.mask.sum()) == pytest.approx(math.pi * (0.2 * 256) ** 2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_centre_is_the_centroid(shape: str) -> None:
    clip = render(Scene(RED_LEFT._replace(shape=shape), 0.2, (0.47, 0.53), 0.0), 1, 256, 256)
    mask, positions = clip.mask[0, 0], torch.arange(256) + 0.5
    centroid = torch.stack([(mask.sum(0) * positions).sum(), (mask.sum(1) * positions).sum()]) / mask.sum()
    torch.testing.assert_close(centroid, clip.centers[0], atol=0.1, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160), (200, 72)])
@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_travels_from_end_to_end(motion: str, height: int, width: int) -> None:
    scene = Scene(RED_LEFT._replace(motion=motion), 0.15, (0.5, 0.4), 0.3)
    clip = render(scene, 9, height, width)
    direction = torch.tensor(MOTIONS[motion]) * torch.tensor([width, height])
    middle = torch.tensor([0.5 * width, 0.4 * height])
    torch.testing.assert_close(clip.centers[0], middle - 0.15 * direction)
    torch.testing.assert_close(clip.centers[-1], middle + 0.15 * direction)
    torch.testing.assert_close(clip.centers[4], middle)
    assert clip.video.shape == (9, 3, height, width)
    assert clip.mask.shape == (9, 1, height, width)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_pixels_have_the_palette_colours(color: str, background: str) -> None:
    video = render(Scene(Attributes(color, "square", "up", background), 0.2, (0.5, 0.5), 0.3), 3, 64, 64).video
    assert video[1, :, 32, 32].tolist() == pytest.approx(COLORS[color])
    assert video[1, :, 0, 0].tolist() == pytest.approx(BACKGROUNDS[background])
    assert video.min() >= 0
    assert video.max() <= 1


def test_one_frame_shows_the_middle_of_the_way() -> None:
    scene = Scene(RED_LEFT, 0.2, (0.5, 0.4), 0.4)
    clip = render(scene, 1, 64, 96)
    assert clip.video.shape == (1, 3, 64, 96)
    torch.testing.assert_close(clip.centers, torch.tensor([[48.0, 25.6]]))
    torch.testing.assert_close(clip.centers, trajectory(scene, 3, 64, 96)[1:2])


def test_every_sentence_reads_back() -> None:
    everything = all_attributes()
    assert len(set(everything)) == len(COLORS) * len(SHAPES) * len(MOTIONS) * len(BACKGROUNDS)
    assert [parse_prompt(attributes.prompt) for attributes in everything] == everything


@pytest.mark.parametrize(
    "prompt", ["A Red circle  moving left\non a gray background.", "an red circle moving left on a gray background!"]
)
def test_small_liberties_are_allowed(prompt: str) -> None:
    assert parse_prompt(prompt) == RED_LEFT


@pytest.mark.parametrize(
    ("wrong", "choices"),
    [
        (RED_LEFT._replace(color="pink"), COLORS),
        (RED_LEFT._replace(shape="hexagon"), SHAPES),
        (RED_LEFT._replace(motion="north"), MOTIONS),
        (RED_LEFT._replace(background="red"), BACKGROUNDS),
    ],
)
def test_an_unknown_word_is_named_with_the_choices(wrong: Attributes, choices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="choose one of " + ", ".join(choices)):
        parse_prompt(wrong.prompt)


@pytest.mark.parametrize("prompt", ["", "a red circle", "two red circles moving left on a gray background"])
def test_another_sentence_is_refused_with_the_grammar(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"moving \{motion\} on a \{background\} background"):
        parse_prompt(prompt)


def test_an_unknown_outline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hexagon.*circle, square, triangle"):
        signed_distance("hexagon", torch.zeros(1), torch.zeros(1), 1.0)


def test_training_never_sees_the_held_out_prompts() -> None:
    held_out, training = held_out_attributes(), training_attributes()
    assert len(held_out) == len(set(held_out)) == 64
    assert set(held_out).isdisjoint(training)
    assert set(held_out) | set(training) == set(all_attributes())
    rng = random.Random(3)
    assert {sample_scene(rng).attributes for _ in range(2000)} <= set(training)


def test_the_held_out_prompts_are_the_same_everywhere() -> None:
    assert held_out_attributes() == held_out_attributes()
    assert held_out_attributes()[0].prompt == "a cyan triangle moving up on a white background"
    seen = [set(words) for words in zip(*held_out_attributes(), strict=True)]
    assert seen == [set(COLORS), set(SHAPES), set(MOTIONS), set(BACKGROUNDS)]


def test_scenes_depend_on_the_seed_alone() -> None:
    first, second, third = (sample_scene(random.Random(seed)) for seed in (5, 5, 6))
    assert first == second
    assert first != third
    assert torch.equal(render(first, 5, 48, 48).video, render(second, 5, 48, 48).video)
