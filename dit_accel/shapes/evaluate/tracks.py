"""Follows pieces from frame to frame."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from .pieces import Piece

JUMP = 0.2  # of the shorter side; how far a piece may jump besides its motion
MOTION = 1.2  # of the longer side, spread over the clip; the world moves at most 0.5 (round an orbit: 1.4) per clip
LEAST_SEEN = 0.5  # share of the frames above which something is an object, not a flash


class Track(NamedTuple):
    """One object: the frames that show it, ascending, and its piece in each of them."""

    frames: list[int]
    pieces: list[Piece]

    @property
    def hue(self) -> str | None:
        """The hue of most of its pieces."""
        return Counter(piece.hue for piece in self.pieces).most_common(1)[0][0]


def find_tracks(pieces: list[list[Piece]], height: int, width: int) -> list[Track]:
    """Joins pieces of neighboring frames and keeps what more than half of the frames show.

    Pairs of one hue go first, the nearest of them before others. What changes its hue is only followed without a jump.

    Args:
        pieces: of every frame.
        height: of a frame, in pixels of the pieces.
        width: likewise.
    """
    jump, step = JUMP * min(height, width), MOTION * max(height, width) / max(1, len(pieces) - 1)
    tracks: list[Track] = []
    for frame, found in enumerate(pieces):
        pairs = []
        for old, track in enumerate(tracks):
            last, reach = track.pieces[-1], step * (frame - track.frames[-1])
            for new, piece in enumerate(found):
                other, distance = piece.hue != last.hue, math.dist(last.center, piece.center)
                if distance <= reach + (0 if other else jump):
                    pairs.append((other, distance, old, new))
        _join(tracks, frame, found, sorted(pairs))
    return [track for track in tracks if len(track.frames) > LEAST_SEEN * len(pieces)]


def _join(tracks: list[Track], frame: int, found: list[Piece], pairs: list[tuple[bool, float, int, int]]) -> None:
    """Adds a frame's pieces to tracks, best pairs first; what finds none begins a new one."""
    joined: dict[int, int] = {}  # new piece to old track
    for _, _, old, new in pairs:
        if new not in joined and old not in joined.values():
            joined[new] = old
    for new, piece in enumerate(found):
        if new not in joined:
            joined[new] = len(tracks)
            tracks.append(Track([], []))
        tracks[joined[new]].frames.append(frame)
        tracks[joined[new]].pieces.append(piece)
