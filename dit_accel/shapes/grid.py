"""A sheet of sampled clips: middle frame, the track of the shape, and the prompt with its wrong words marked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from .journal import Record
from .world import Attributes

COLUMNS = 4
SIDE = 224  # pixels of a cell's longer side
MARGIN, LINE = 8, 18
INK, FAINT, WRONG, EDGE = (20, 20, 20), (110, 110, 110), (200, 0, 0), (210, 210, 210)
MARK = 5  # radius of the marks at both ends of the track

Cell = tuple[Image.Image, Attributes, Record]


def middle_frame(video: torch.Tensor) -> Image.Image:
    """The middle frame of ``[frames, 3, height, width]`` in [0, 1]."""
    frame = (video[len(video) // 2].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(frame.cpu().numpy())


def draw_grid(cells: Sequence[Cell]) -> Image.Image:
    """Draws one cell per clip: its middle frame, its attributes and what :func:`.sampling.judged` said of it.

    A black dot marks where the shape was first seen, a white one where it was last seen. Wrong words of the prompt are
    red, with what was seen instead below, or a question mark where the clip does not decide it.
    """
    width, height = _fitted(cells[0][0])
    rows = -(-len(cells) // COLUMNS)
    step_x, step_y = width + MARGIN, height + 3 * LINE + 2 * MARGIN
    columns = min(COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    for index, (frame, attributes, judgement) in enumerate(cells):
        corner = (MARGIN + index % COLUMNS * step_x, MARGIN + index // COLUMNS * step_y)
        sheet.paste(_marked(frame, judgement["track"], (width, height)), corner)
        pen = ImageDraw.Draw(sheet)
        pen.rectangle([corner[0] - 1, corner[1] - 1, corner[0] + width, corner[1] + height], outline=EDGE)
        _caption(pen, (corner[0], corner[1] + height + 2), attributes, judgement)
    return sheet


def _fitted(frame: Image.Image) -> tuple[int, int]:
    scale = SIDE / max(frame.size)
    return round(frame.width * scale), round(frame.height * scale)


def _marked(frame: Image.Image, track: list[list[float]] | None, size: tuple[int, int]) -> Image.Image:
    cell = frame.resize(size, Image.Resampling.LANCZOS)
    if track is None:
        return cell
    pen = ImageDraw.Draw(cell)
    scale = size[0] / frame.width
    first, last = ((x * scale, y * scale) for x, y in track)
    for color, line in (("black", 4), ("white", 2)):  # white on black shows on every colour
        pen.line([first, last], fill=color, width=line)
    for (x, y), fill, outline in ((first, "black", "white"), (last, "white", "black")):
        pen.ellipse([x - MARK, y - MARK, x + MARK, y + MARK], fill=fill, outline=outline, width=1)
    return cell


def _caption(pen: ImageDraw.ImageDraw, corner: tuple[int, int], attributes: Attributes, judgement: Record) -> None:
    right = judgement["right"]
    said = {slot: (word, INK if right[slot] else WRONG) for slot, word in attributes._asdict().items()}
    lines = [
        [("a", FAINT), said["color"], said["shape"], ("moving", FAINT), said["motion"]],
        [("on a", FAINT), said["background"], ("background", FAINT)],
    ]
    wrong = [judgement["seen"][slot] or "?" for slot in right if not right[slot]]
    if wrong:
        lines.append([("seen: " + ", ".join(wrong), WRONG)])
    for number, words in enumerate(lines):
        x, y = corner[0], corner[1] + number * LINE
        for word, ink in words:
            font = ImageFont.load_default(14 if number < 2 else 12)
            pen.text((x, y), word, fill=ink, font=font)
            x += round(pen.textlength(word + " ", font=font))
