"""Colors of the report: a ramp for quantities, and one color and one letter for each method."""

from __future__ import annotations

from collections.abc import Sequence

Color = tuple[int, int, int]

RAMP: tuple[Color, ...] = ((13, 8, 60), (66, 30, 126), (128, 50, 128), (196, 73, 104), (240, 130, 70), (252, 230, 150))
# Dark enough for white letters on each: at least 4.5 to 1.
METHODS = (
    "#1b6ca8",
    "#b8391f",
    "#2f7a3d",
    "#7b4bb3",
    "#8a5a00",
    "#b8267a",
    "#00727a",
    "#5b5f66",
    "#2b3a8c",
    "#5a3220",
)


def ramp(value: float) -> Color:
    """The color of a number in [0, 1]; numbers beyond are at the ends. Dark is little."""
    place = min(max(value, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    below, above = RAMP[low], RAMP[low + 1]
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(below, above, strict=True))
    return red, green, blue


def hexadecimal(color: Color) -> str:
    """As CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def ink(color: Color) -> str:
    """Black or white, whatever is easier to read on a color (WCAG's contrast)."""
    return "#000000" if luminance(color) > 0.179 else "#ffffff"


def luminance(color: Color) -> float:
    """Relative luminance of an sRGB color, as WCAG 2 defines it."""
    parts = [part / 255 for part in color]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def method_colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each method, in turn."""
    return {name: METHODS[index % len(METHODS)] for index, name in enumerate(names)}


def method_letters(names: Sequence[str]) -> dict[str, str]:
    """A short mark for each method, none twice, so that nobody has to tell colors apart."""
    marks: dict[str, str] = {}
    for name in names:
        initials = "".join(word[0] for word in name.split("_")).upper()
        tries = [initials, name[:2].capitalize(), name[:3].capitalize()]
        tries += [f"{initials}{number}" for number in range(2, len(names) + 3)]
        marks[name] = next(mark for mark in tries if mark not in marks.values())
    return marks
