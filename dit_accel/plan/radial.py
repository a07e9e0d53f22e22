"""Radial Attention plans: fewer keys the farther a frame is away (arXiv 2506.19852).

Attention weights of video models fall off exponentially with the distance in time and in space.  So every pair of
frames keeps a diagonal band of token pairs, `|k - l| <= width(|i - j|)` for raster positions k, l in frames i, j, and
the width halves each time the distance between the frames doubles.  Two rules for the widths are in use, the one of
the paper and the one of the code its authors released; they differ, so the caller chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.pair_tests import Band
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

RULES = ("authors", "paper")
MASKS = ("block", "element")

# Column counts held at once; small enough to stay in a CPU cache, which is what makes building fast.
_CHUNK_ELEMENTS = 1 << 20
# Block length that the authors' thinning of far frames is written for, whatever block is used.
_THINNING_LENGTH = 128


def radial_plan(
    grid: tuple[int, int, int],
    *,
    block: int = 128,
    decay: float = 0.2,
    rule: str = "authors",
    sink: bool = True,
    text_tokens: int = 0,
    mask: str = "block",
    device: torch.device | str = "cpu",
) -> SparsePlan:
    """Builds the plan of Radial Attention for one token grid.

    The sequence is `[video, text]`, video in raster order, frame after frame.  Any grid works: frames may straddle
    blocks and the last block may be short.  The plan depends on nothing but its arguments, so build it once per grid.

    With `mask="block"` every listed block is computed whole.  The authors' rule then decides per block, see
    `authors_blocks`; the paper gives no block rule, so a block is kept if the band touches it.  With `mask="element"`
    a block is kept if the band touches it, under both rules, and blocks that the band cuts are PARTIAL.

    Args:
        grid: Video tokens as (frames, height, width), after patching.
        block: Tokens per query block and per key block.
        decay: Factor on the widths, authors' rule only.  Published: 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for
            HunyuanVideo.
        rule: "authors" for `authors_widths`, "paper" for `paper_widths`.
        sink: Let every query see the whole first frame.  Published: yes for Wan, no for HunyuanVideo, whose text
            tokens have that role.
        text_tokens: Text tokens behind the video.  They see everything and everything sees them.
        mask: "block" or "element".
        device: Where the plan is built and kept.

    Returns:
        The plan, shared by all batch items and heads.

    Raises:
        ValueError: An argument is out of range or unknown.
    """
    _check(grid, block, decay, rule, text_tokens, mask)
    frames, frame_tokens = grid[0], grid[1] * grid[2]
    video_len = frames * frame_tokens
    length = video_len + text_tokens
    widths = (
        authors_widths(frames, frame_tokens, block, decay) if rule == "authors" else paper_widths(frames, frame_tokens)
    )
    band = Band(
        frame_tokens=frame_tokens,
        widths=torch.tensor(widths, dtype=torch.int32, device=device),
        video_len=video_len,
        sink_tokens=frame_tokens if sink else 0,
    )
    details: dict[str, Any] = {"grid": tuple(grid), "block": block, "rule": rule, "sink": sink, "mask": mask}
    if rule == "authors":
        details["decay"] = decay
    text = ((video_len, length),) if text_tokens else ()
    return plan_from_blocks(
        _blocks(band, length, block, rule, mask),
        q_len=length,
        kv_len=length,
        block_q=block,
        block_kv=block,
        pair_test=band if mask == "element" else None,
        always_q=text,
        always_kv=(((0, frame_tokens),) if sink else ()) + text,
        method="radial",
        details=details,
    )


def authors_widths(frames: int, frame_tokens: int, block: int, decay: float) -> list[int]:
    """Gives the band half-width for each frame distance as the authors' code has it.

    Frames at distance 0 and 1 see each other whole.  Farther ones get `decay * P / 2**bits(d)`, at least one block,
    where P is the smallest power of two above the tokens per frame and `bits` the bit length.  Once `P / 2**bits(d)`
    falls below 128, only every `floor(128 * 2**bits(d) / P)`-th distance is kept at all.  Frames of fewer than 128
    tokens therefore lose even their neighbours; the rule was made for large frames.

    Returns:
        One width per distance `0 .. frames - 1`, in tokens; -1 keeps nothing.
    """
    power = 1 << frame_tokens.bit_length()
    widths = []
    for distance in range(frames):
        group = 1 << distance.bit_length()
        thinned = power < _THINNING_LENGTH * group and distance % (_THINNING_LENGTH * group // power)
        whole = distance <= 1 or max(block, decay * power / group) >= frame_tokens
        widths.append(-1 if thinned else frame_tokens if whole else int(max(block, decay * power / group)))
    return widths


def paper_widths(frames: int, frame_tokens: int) -> list[int]:
    """Gives the band half-width for each frame distance by the formula of the paper.

    With `2**r` the largest power of two up to the distance, a pair is kept if `|k - l| + 1 <= frame_tokens / 2**r`.
    Where `2**r` exceeds the tokens per frame, only equal positions are kept, at every
    `ceil(2**r / frame_tokens)`-th distance.

    Returns:
        One width per distance `0 .. frames - 1`, in tokens; -1 keeps nothing.
    """
    widths = []
    for distance in range(frames):
        power = 1 << (max(distance, 1).bit_length() - 1)
        if power <= frame_tokens:
            widths.append(frame_tokens // power - 1)
        else:
            widths.append(-1 if distance % math.ceil(power / frame_tokens) else 0)
    return widths


def authors_blocks(band: Band, length: int, block: int) -> Tensor:
    """Decides which blocks to keep as the authors' code does, for frames that need not align with blocks.

    Of the columns of a block that the band touches at all, more than 60 % must have more than a third of their rows
    kept.  The authors apply this to each pair of frames by itself and unite the results.  Where frames end inside a
    block, that misjudges it: each pair fills only a part of the rows, so a block may be dropped though the pairs
    together fill it.  Here the band of all pairs of frames is laid on the block first, and the rule is applied once.
    If blocks divide frames, a block belongs to one pair of frames and both ways agree.

    Blocks that hold text, and blocks that hold tokens of the sink frame, are always kept.

    Args:
        band: Widths, sink and video length.
        length: Tokens in all, video and text.
        block: Tokens per block.

    Returns:
        bool `[ceil(length / block), ceil(length / block)]`.
    """

    def dense_enough(kept: Tensor, height: Tensor) -> Tensor:
        high = (3 * kept > height).sum(-1, dtype=torch.int32)
        touched = (kept > 0).sum(-1, dtype=torch.int32)
        return 5 * high > 3 * touched

    keep = _decide_blocks(band, length, block, dense_enough)
    keep[:, : -(-band.sink_tokens // block)] = True
    return keep


def touched_blocks(band: Band, length: int, block: int) -> Tensor:
    """Keeps every block that holds at least one pair of the band; arguments and result as `authors_blocks`."""
    return _decide_blocks(band, length, block, lambda kept, height: (kept > 0).any(-1))


def _decide_blocks(band: Band, length: int, block: int, decide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Builds a block mask from the rows kept in each column; blocks that hold text are kept.

    `decide` gets the kept rows, int32 `[rows, key blocks, block]`, and the height of the blocks, `[rows, 1, 1]`.
    """
    device = band.widths.device
    count = -(-length // block)
    first_text = band.video_len // block if band.video_len < length else count
    keep = torch.zeros(count, count, dtype=torch.bool, device=device)
    segments, columns = _Segments.cut(band, block), _columns(band, block)
    step = max(1, _CHUNK_ELEMENTS // columns.frame.numel())
    for start in range(0, first_text, step):
        stop = min(start + step, first_text)
        kept = _kept_rows(band, segments, columns, start, stop).unflatten(-1, (-1, block))
        height = (length - torch.arange(start, stop, device=device) * block).clamp(max=block)
        keep[start:stop, : kept.shape[1]] = decide(kept, height[:, None, None])
    keep[first_text:] = True
    keep[:, first_text:] = True
    return keep


class _Segments(NamedTuple):
    """Runs of video rows that lie in one block and one frame; all tensors int32 `[segments]`."""

    row_block: Tensor
    frame: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def cut(cls, band: Band, block: int) -> _Segments:
        device, end = band.widths.device, band.video_len
        edges = torch.cat(
            [
                torch.arange(0, end, block, device=device),
                torch.arange(0, end, band.frame_tokens, device=device),
                torch.tensor([end], device=device),
            ]
        ).unique()
        starts, stops = edges[:-1], edges[1:]
        frame = starts // band.frame_tokens
        low = starts - frame * band.frame_tokens
        return cls(*(t.to(torch.int32) for t in (starts // block, frame, low, low + stops - starts)))


class _Columns(NamedTuple):
    """Frame and raster position of each column, int32 `[n]`, n padded to whole blocks; padding has frame -1."""

    frame: Tensor
    position: Tensor


def _columns(band: Band, block: int) -> _Columns:
    padded = -(-band.video_len // block) * block
    index = torch.arange(padded, dtype=torch.int32, device=band.widths.device)
    frame = torch.where(index < band.video_len, index // band.frame_tokens, -1)
    return _Columns(frame, index % band.frame_tokens)


def _kept_rows(band: Band, segments: _Segments, columns: _Columns, start: int, stop: int) -> Tensor:
    """Counts, for row blocks `[start, stop)`, the rows that the band keeps in each column: int32 `[stop - start, n]`.

    Inside one segment the kept rows of a column are an interval, so they are counted without being listed.
    """
    chosen = (segments.row_block >= start) & (segments.row_block < stop)
    row_block, frame, low, high = (t[chosen] for t in segments)
    distance = (frame[:, None] - columns.frame).abs_().clamp_(max=band.widths.numel() - 1)
    width = band.widths[distance]
    first = torch.maximum(columns.position - width, low[:, None])
    past = torch.minimum(width.add_(columns.position + 1), high[:, None])
    kept = past.sub_(first).clamp_(min=0)
    kept.masked_fill_(columns.frame < 0, 0)
    if band.sink_tokens:
        kept[:, : band.sink_tokens] = (high - low)[:, None]
    if kept.shape[0] == stop - start:
        return kept
    out = torch.zeros(stop - start, kept.shape[1], dtype=torch.int32, device=kept.device)
    return out.index_add_(0, row_block - start, kept)


def _blocks(band: Band, length: int, block: int, rule: str, mask: str) -> Tensor:
    if mask == "element":
        # plan_from_blocks drops what the band leaves empty.
        count = -(-length // block)
        return torch.ones(count, count, dtype=torch.bool, device=band.widths.device)
    if rule == "authors":
        return authors_blocks(band, length, block)
    return touched_blocks(band, length, block)


def _check(grid: tuple[int, int, int], block: int, decay: float, rule: str, text_tokens: int, mask: str) -> None:
    if len(grid) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
        raise ValueError(f"grid must be three positive integers (frames, height, width), got {grid!r}.")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}. Usual are 64 and 128.")
    if not (math.isfinite(decay) and decay > 0):
        raise ValueError(f"decay must be a positive number, got {decay}. Published values are 0.2, 0.8 and 0.95.")
    if text_tokens < 0:
        raise ValueError(f"text_tokens must not be negative, got {text_tokens}. Use 0 if there is no text.")
    for name, value, known in (("rule", rule, RULES), ("mask", mask, MASKS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
