"""Reads the surface of an object: its texture, and its color without the texture's light half."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..world import COLORS, RGB, second_color
from .outline import Fit, Window
from .working import erode

PERIOD = 0.8  # of the radius: one dark and one light stripe
PATTERN, PLAIN = 0.14, 0.10  # amplitudes; the world's stripes have 0.64, its checks 0.81, blurred ones a third of it
CLEAR = 1.4  # how much stronger the pattern must be than the next
MOST_SPREAD = 0.3  # standard deviation of the lightness of a plain surface; the world's patterns have 0.5
STEADY = 0.6  # share of the frames above which a color is that of the object
COLOR_TOLERANCE = 0.45  # RGB distance; the palette's colors are at least 0.7 apart


class Surface(NamedTuple):
    """What a surface shows.

    Attributes:
        color: word of ``COLORS``, or None if it is far from all of them or changes.
        texture: word of ``TEXTURES``, or None if the pattern is unclear.
        rgb: median color; of a pattern, of its darker half.
    """

    color: str | None
    texture: str | None
    rgb: RGB


def read_surface(pixels: torch.Tensor, view: Window, fit: Fit, hue: str | None) -> Surface:
    """Reads the surface of one object.

    Args:
        pixels: RGB of the window, ``[n, 3, height, width]``.
        view: the window, with the object's mask.
        fit: the outline in the same frames; gives the object its own coordinates.
        hue: the color word it was found by; without one there are no words.
    """
    inner = erode(view.mask, 1)
    inner = torch.where(inner.any((1, 2), keepdim=True), inner, view.mask)
    if hue is None:
        return Surface(None, None, _median(pixels, inner))
    first, second = (torch.tensor(color)[:, None, None] for color in (COLORS[hue], second_color(hue)))
    axis = second - first
    lightness = ((pixels - first) * axis).sum(1) / axis.square().sum()  # 0 for the color, 1 for its light half
    texture = name_texture(*pattern_amplitudes(lightness, inner, view, fit))
    if texture != "plain":
        mean = (lightness * inner).sum((1, 2), True) / inner.sum((1, 2), True)
        inner = inner & (lightness <= mean + 1e-6)
    words = [name_color(_median(frame[None], part[None])) for frame, part in zip(pixels, inner, strict=True)]
    color = _median(pixels, inner)
    steady = words.count(name_color(color)) > STEADY * len(words)
    return Surface(name_color(color) if steady else None, texture, color)


def pattern_amplitudes(
    lightness: torch.Tensor, inner: torch.Tensor, view: Window, fit: Fit
) -> tuple[float, float, float, float]:
    """How strongly a surface is striped across, striped upright and checked, and how uneven it is.

    Waves of the world's period are fitted by least squares inside the object, in coordinates of its own, together with
    an even slope (shading). Their place is free, so a pattern that is shifted counts too.

    Args:
        lightness: ``[n, height, width]``.
        inner: bool likewise, the pixels that count; some in every frame.
        view: the window.
        fit: center and radius in every frame.

    Returns:
        Amplitude of horizontal stripes, vertical stripes and checks, and the standard deviation; medians over frames.
    """
    u, v = (
        ((numbers + 0.5 - fit.centers[:, axis, None, None]) / fit.radius[:, None, None]).expand_as(lightness)
        for axis, numbers in enumerate((view.columns, view.rows))
    )
    across, down = (2 * math.pi / PERIOD * place for place in (u, v))
    waves = [down.cos(), down.sin(), across.cos(), across.sin()]
    checks = [wave * other for wave in waves[:2] for other in waves[2:]]
    design = torch.stack([torch.ones_like(u), u, v, *waves, *checks], -1).flatten(1, 2) * inner.flatten(1)[..., None]
    target = (lightness * inner).flatten(1)[..., None]
    gram = design.mT @ design + 1e-3 * inner.sum((1, 2)).view(-1, 1, 1) * torch.eye(design.shape[-1])
    weights = torch.linalg.solve(gram, design.mT @ target)[..., 0].square()
    count = inner.sum((1, 2))
    mean = target.sum((1, 2)) / count
    uneven = ((lightness - mean[:, None, None]).square() * inner).sum((1, 2)) / count
    strengths = torch.stack([weights[:, 3:5].sum(1), weights[:, 5:7].sum(1), weights[:, 7:].sum(1), uneven], 1).sqrt()
    stripes, upright, checked, spread = strengths.median(0).values.tolist()
    return stripes, upright, checked, spread


def name_texture(stripes: float, upright: float, checked: float, spread: float) -> str | None:
    """The word for amplitudes of :func:`pattern_amplitudes`; the world has no upright stripes."""
    strongest = max(stripes, upright, checked)
    if strongest < PLAIN:
        return "plain" if spread < MOST_SPREAD else None
    for word, own, others in (("striped", stripes, (upright, checked)), ("checked", checked, (upright, stripes))):
        if own >= PATTERN and own >= CLEAR * max(others):
            return word
    return None


def name_color(color: RGB) -> str | None:
    """The color word nearest to an RGB color, or None if it is far from all of them."""
    distances = {word: math.dist(color, rgb) for word, rgb in COLORS.items()}
    word = min(distances, key=lambda word: distances[word])
    return word if distances[word] <= COLOR_TOLERANCE else None


def _median(pixels: torch.Tensor, mask: torch.Tensor) -> RGB:
    red, green, blue = pixels.transpose(0, 1)[:, mask].median(1).values.tolist()
    return red, green, blue
