"""A sheet of samples: middle frame, the tracks of its objects, and the prompt with its wrong words marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ..world import SceneWords
from .caption import marked_words, seen_instead
from .records import Record

COLUMNS = 4
SIDE = 224  # pixels of a cell's longer side
MARGIN, LINE, HEADING = 8, 15, 24
INK, FAINT, WRONG, EDGE = (20, 20, 20), (110, 110, 110), (200, 0, 0), (210, 210, 210)
MARK = 5  # radius of the marks at both ends of a track

Text = list[tuple[str, tuple[int, int, int]]]  # words and their inks


class Cell(NamedTuple):
    """A sample: its middle frame, what its prompt says, and what :func:`.judging.judged` said of it."""

    frame: Image.Image
    words: SceneWords
    judgement: Record


def middle_frame(video: torch.Tensor) -> Image.Image:
    """The middle frame of ``[frames, 3, height, width]`` in [0, 1]."""
    frame = (video[len(video) // 2].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(frame.cpu().numpy())


def draw_grid(parts: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """Draws one block of cells per part, each under its heading.

    A black dot marks where an object was first seen, a white one where it was last seen. Wrong words of the prompt are
    red, with what was seen instead below, or a question mark where the clip does not decide it.
    """
    blocks = [(heading, _draw_cells(cells)) for heading, cells in parts]
    width = max(block.width for _, block in blocks)
    sheet = Image.new("RGB", (width, sum(block.height + HEADING for _, block in blocks)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for heading, block in blocks:
        pen.text((MARGIN, top + MARGIN), heading, fill=INK, font=ImageFont.load_default(16))
        sheet.paste(block, (0, top + HEADING))
        top += HEADING + block.height
    return sheet


def _draw_cells(cells: Sequence[Cell]) -> Image.Image:
    width, height = _fitted(cells[0].frame)
    captions = [_caption(cell, width) for cell in cells]
    columns, rows = min(COLUMNS, len(cells)), -(-len(cells) // COLUMNS)
    step_x, step_y = width + MARGIN, height + max(map(len, captions)) * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (cell, lines) in enumerate(zip(cells, captions, strict=True)):
        x, y = MARGIN + index % COLUMNS * step_x, MARGIN + index // COLUMNS * step_y
        sheet.paste(_marked(cell, (width, height)), (x, y))
        pen.rectangle([x - 1, y - 1, x + width, y + height], outline=EDGE)
        for number, line in enumerate(lines):
            _write(pen, (x, y + height + 2 + number * LINE), line)
    return sheet


def _fitted(frame: Image.Image) -> tuple[int, int]:
    scale = SIDE / max(frame.size)
    return round(frame.width * scale), round(frame.height * scale)


def _marked(cell: Cell, size: tuple[int, int]) -> Image.Image:
    picture = cell.frame.resize(size, Image.Resampling.LANCZOS)
    pen, scale = ImageDraw.Draw(picture), size[0] / cell.frame.width
    for item in cell.judgement["seen"]["objects"]:
        if item["track"] is None:
            continue
        track = [(x * scale, y * scale) for x, y in item["track"]]
        for color, line in (("black", 4), ("white", 2)):  # white on black shows on every color
            pen.line(track, fill=color, width=line, joint="curve")
        for (x, y), fill, outline in ((track[0], "black", "white"), (track[-1], "white", "black")):
            pen.ellipse([x - MARK, y - MARK, x + MARK, y + MARK], fill=fill, outline=outline, width=1)
    return picture


def _caption(cell: Cell, width: int) -> list[Text]:
    """The lines below a picture."""
    said: Text = [
        (word.text, WRONG if word.wrong else FAINT if word.slot is None else INK)
        for word in marked_words(cell.words, cell.judgement)
    ]
    instead = seen_instead(cell.words, cell.judgement)
    seen: Text = [(word, WRONG) for word in f"seen: {', '.join(instead)}".split()] if instead else []
    return [line for text in (said, seen) if text for line in _wrapped(text, width)]


def _wrapped(words: Text, width: int) -> list[Text]:
    lines: list[Text] = [[]]
    for word, ink in words:
        line = " ".join([*(text for text, _ in lines[-1]), word])
        if lines[-1] and _font().getlength(line) > width:
            lines.append([])
        lines[-1].append((word, ink))
    return lines


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], line: Text) -> None:
    x, y = corner
    for word, ink in line:
        pen.text((x, y), word, fill=ink, font=_font())
        x += round(_font().getlength(word + " "))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
