"""Follows the pieces of one hue from frame to frame."""

from __future__ import annotations

import math
from typing import NamedTuple

from .pieces import Piece

JUMP = 0.2  # of the shorter side; how far a piece may jump besides its motion
MOTION = 1.2  # of the longer side, spread over the clip; the world moves at most 0.5 (round an orbit: 1.4) per clip
LEAST_SEEN = 0.5  # share of the frames above which something is an object, not a flash


class Track(NamedTuple):
    """One object: the frames that show it, ascending, and its piece in each of them."""

    frames: list[int]
    pieces: list[Piece]


def find_tracks(pieces: list[list[Piece]], height: int, width: int) -> list[Track]:
    """Joins pieces of neighboring frames, nearest pairs first, and keeps what more than half of the frames show.

    Args:
        pieces: of every frame.
        height: of a frame, in pixels of the pieces.
        width: likewise.
    """
    jump, step = JUMP * min(height, width), MOTION * max(height, width) / max(1, len(pieces) - 1)
    tracks: list[Track] = []
    for frame, found in enumerate(pieces):
        pairs = sorted(
            (math.dist(track.pieces[-1].center, piece.center), old, new)
            for old, track in enumerate(tracks)
            for new, piece in enumerate(found)
            if math.dist(track.pieces[-1].center, piece.center) <= jump + step * (frame - track.frames[-1])
        )
        joined: dict[int, int] = {}  # new piece to old track
        for _, old, new in pairs:
            if new not in joined and old not in joined.values():
                joined[new] = old
        for new, piece in enumerate(found):
            if new in joined:
                tracks[joined[new]].frames.append(frame)
                tracks[joined[new]].pieces.append(piece)
            else:
                tracks.append(Track([frame], [piece]))
    return [track for track in tracks if len(track.frames) > LEAST_SEEN * len(pieces)]
