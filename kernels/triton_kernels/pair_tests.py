"""The pair tests of PARTIAL blocks inside Triton kernels: `keeps` of kernels/pair_tests.py for one tile.

A kernel takes two pointers, `Table` and `Lookup`, and six numbers, `n0` to `n5`, from `test_arguments`, and the kind
as the compile-time constant PREDICATE; without a test none of them is read.
"""

# Kernel arguments are device values, for which Python has no types.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bitmap import Bitmap
from ..pair_tests import Band, Neighborhood, PairKind, PairTest, encode

NO_TEST = tl.constexpr(int(PairKind.NONE))
BAND = tl.constexpr(int(PairKind.BAND))
BITMAP = tl.constexpr(int(PairKind.BITMAP))
PERMUTED_NEIGHBORHOOD = tl.constexpr(int(PairKind.PERMUTED_NEIGHBORHOOD))


@triton.jit
def pair_keeps(
    q_start,
    q_pos,
    kv_start,
    kv_pos,
    batch,
    head,
    Table,
    Lookup,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    q_len,
    kv_len,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PREDICATE: tl.constexpr,
):
    """Which pairs of a tile are kept: the broadcast shape of `q_pos` and `kv_pos`, [M, 1] and [1, N] or the reverse.

    The tile begins at `q_start` and `kv_start` and lies inside one block.  Positions behind the end get any answer.
    """
    if PREDICATE == BAND:
        return _band_keeps(q_pos, kv_pos, Table, n0, n1, n2, n3)
    elif PREDICATE == BITMAP:
        slots = Table + batch.to(tl.int64) * n0 + head.to(tl.int64) * n1
        columns = (kv_len + BLOCK_KV - 1) // BLOCK_KV
        slot = tl.load(slots + (q_start // BLOCK_Q).to(tl.int64) * columns + kv_start // BLOCK_KV).to(tl.int64)
        WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
        column = kv_pos % BLOCK_KV
        words = tl.load(Lookup + slot * (BLOCK_Q * WORDS) + (q_pos % BLOCK_Q) * WORDS + column // 32)
        return ((words >> (column % 32)) & 1) != 0
    else:
        if PREDICATE == PERMUTED_NEIGHBORHOOD:
            q_pos = tl.load(Lookup + q_pos, mask=q_pos < q_len, other=0)
            kv_pos = tl.load(Lookup + kv_pos, mask=kv_pos < kv_len, other=0)
        return _neighborhood_keeps(q_pos, kv_pos, Table, n0, n1, n2, n3, n4, n5)


@triton.jit
def _band_keeps(q_pos, kv_pos, widths, frames, frame_tokens, video_len, sink_tokens):
    """`Band.keeps`."""
    distance = tl.minimum(tl.abs(q_pos // frame_tokens - kv_pos // frame_tokens), frames - 1)
    offset = tl.abs(q_pos % frame_tokens - kv_pos % frame_tokens)
    free_kv = (kv_pos >= video_len) | (kv_pos < sink_tokens)
    return (offset <= tl.load(widths + distance)) | free_kv | (q_pos >= video_len)


@triton.jit
def _neighborhood_keeps(q, kv, ranges, frames, height, width, frame_step, height_step, width_step):
    """`Neighborhood.keeps` for raster indices.  What depends on the query alone is looked up once per query."""
    video_len = frames * height * width
    q_text, kv_text = q >= video_len, kv >= video_len
    q_t, q_h, q_w = q // (height * width), q // width % height, q % width
    kv_t, kv_h, kv_w = kv // (height * width), kv // width % height, kv % width
    # Dilation splits the grid into groups; both tokens must be in the same one.
    q_group = (q_t % frame_step * height_step + q_h % height_step) * width_step + q_w % width_step
    kv_group = (kv_t % frame_step * height_step + kv_h % height_step) * width_step + kv_w % width_step
    near = q_group == kv_group
    near &= _in_range(kv_t, ranges + 2 * q_t, q_text)
    near &= _in_range(kv_h, ranges + 2 * (frames + q_h), q_text)
    near &= _in_range(kv_w, ranges + 2 * (frames + height + q_w), q_text)
    return near | q_text | kv_text


@triton.jit
def _in_range(coordinate, bounds, skip):
    first = tl.load(bounds, mask=skip == 0, other=0)
    return (coordinate >= first) & (coordinate <= tl.load(bounds + 1, mask=skip == 0, other=0))


def test_arguments(test: PairTest | None, unused: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """What a kernel takes for a pair test: `(Table, Lookup)` and `(n0, ..., n5)`.

    Args:
        test: The test of the plan.
        unused: Any int32 tensor, passed where nothing is read.
    """
    if isinstance(test, Band):
        numbers = test.widths.numel(), test.frame_tokens, test.video_len, test.sink_tokens
        return (test.widths.contiguous(), unused), (*numbers, 1, 1)
    if isinstance(test, Neighborhood):
        lookup = unused if test.raster is None else test.raster.contiguous()
        return (test.ranges.contiguous(), lookup), (*test.grid, *test.dilation)
    if isinstance(test, Bitmap):
        slots = test.slots.contiguous()
        steps = (stride * (size > 1) for stride, size in zip(slots.stride()[:2], slots.shape[:2], strict=True))
        return (slots, test.words.contiguous()), (*steps, 1, 1, 1, 1)
    return (unused, unused), (1, 1, 1, 1, 1, 1)


def predicate(test: PairTest | None) -> int:
    """The compile-time constant PREDICATE of a pair test, a `PairKind`."""
    return encode(test).kind
