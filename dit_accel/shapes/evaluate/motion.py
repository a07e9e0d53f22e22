"""Names the motion of a track."""

from __future__ import annotations

import math

import torch

from ..world import DIRECTIONS

STILL = 0.05  # of the sides; a still object stays within it
LEAST_TRAVEL = 0.08  # of the side moved along; the world moves 0.2 and more
AXIS = math.radians(20)  # farthest from a direction of the world; they are 45 degrees apart
MOST_BEND = 0.15  # of the distance moved: median distance from the straight line
LEAST_TURN, MOST_TURN = 0.6, 1.4  # of a full turn
LEAST_ORBIT, MOST_ORBIT = 0.05, 0.5  # radius, of the shorter side
MOST_WOBBLE = 0.3  # of the orbit's radius: median distance from it
TURN_FRAMES = 4  # fewer do not tell a turn from a way back


def name_motion(times: torch.Tensor, centers: torch.Tensor, span: int, height: int, width: int) -> str | None:
    """The word for a track, or None if none is clear.

    Args:
        times: ``[n]`` frame numbers, ascending.
        centers: ``[n, 2]`` (x, y) in pixels.
        span: frame steps of the whole clip.
        height: of the frame, in pixels.
        width: of the frame, in pixels.
    """
    if len(times) < 2:
        return None
    if circles(times, centers, span, min(height, width)):
        return "circling"
    return _straight(times, centers / torch.tensor([width, height]), span)


def circles(times: torch.Tensor, centers: torch.Tensor, span: int, side: int) -> bool:
    """Whether a track is about one clockwise turn on one circle.

    Clockwise on screen: y points down, so the angle grows. Turns are counted from the steps between frames.

    Args:
        times: ``[n]`` frame numbers, ascending.
        centers: ``[n, 2]`` (x, y) in pixels.
        span: frame steps of the whole clip.
        side: the shorter side of the frame, in pixels.
    """
    if len(times) < TURN_FRAMES:
        return False
    middle, radius = fit_circle(centers)
    arms = centers - middle
    wobble = float((arms.norm(dim=1) - radius).abs().median())
    if not LEAST_ORBIT * side <= radius <= MOST_ORBIT * side or wobble > MOST_WOBBLE * radius:
        return False
    angles = torch.atan2(arms[:, 1], arms[:, 0])
    steps = torch.remainder(angles.diff() + math.pi, 2 * math.pi) - math.pi
    turned = float(steps.sum()) / (2 * math.pi) * span / float(times[-1] - times[0])
    return LEAST_TURN <= turned <= MOST_TURN


def fit_circle(points: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Center ``[2]`` and radius of the circle nearest to most of the points ``[n, 2]``, at least three.

    The median of the circles through points a third of the track apart finds strays; the others are fitted by least
    squares, linear in x, y and x^2 + y^2 (Kasa's fit).
    """
    rough = _circles_through_three(points).median(0).values
    arms = (points - rough).norm(dim=1)
    off = (arms - arms.median()).abs()
    near = points[off <= 3 * off.median() + 1e-3]
    origin = near.mean(0)  # well conditioned only around it
    design = torch.cat([near - origin, torch.ones(len(near), 1)], 1).double()
    target = (near - origin).double().square().sum(1, keepdim=True)
    a, b, c = torch.linalg.lstsq(design, target, driver="gelsd").solution[:, 0].tolist()
    return origin + torch.tensor([a, b]) / 2, math.sqrt(max(0.0, c + (a * a + b * b) / 4))


def _circles_through_three(points: torch.Tensor) -> torch.Tensor:
    """Centers ``[n, 2]`` of circles through three points each; far away where these lie on a line."""
    third = len(points) // 3
    first = points[: len(points) - 2 * third]
    second, last = points[third : len(points) - third] - first, points[2 * third :] - first
    cross = 2 * (second[:, 0] * last[:, 1] - second[:, 1] * last[:, 0])
    cross = torch.where(cross.abs() < 1e-3, 1e-3, cross)
    squares = torch.stack([second.square().sum(1), last.square().sum(1)])
    x = squares[0] * last[:, 1] - squares[1] * second[:, 1]
    y = squares[1] * second[:, 0] - squares[0] * last[:, 0]
    return first + torch.stack([x, y], 1) / cross[:, None]


def _straight(times: torch.Tensor, places: torch.Tensor, span: int) -> str | None:
    """Names straight motion from places in fractions of width and height.

    The slope is the median over all pairs of frames (Theil-Sen), so a few bad frames do not turn it.
    """
    first, second = torch.triu_indices(len(times), len(times), offset=1)
    slopes = (places[second] - places[first]) / (times[second] - times[first])[:, None]
    travel = slopes.median(0).values * span
    length = float(travel.norm())
    around = places - places.median(0).values
    if length < STILL and float(around.norm(dim=1).mean()) < STILL / 2:
        return "still"
    x, y = (travel / max(length, 1e-6)).tolist()
    sideways = (around[:, 0] * y - around[:, 1] * x).abs().median()
    if length < LEAST_TRAVEL or float(sideways) > MOST_BEND * length:
        return None
    return _direction(math.atan2(y, x))


def _direction(angle: float) -> str | None:
    for word, (x, y) in DIRECTIONS.items():
        difference = math.remainder(angle - math.atan2(y, x), 2 * math.pi)
        if (x or y) and abs(difference) <= AXIS:
            return word
    return None
