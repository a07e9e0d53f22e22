"""What a clip shows and which words of its prompt are right, as JSON values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import permutations

import torch

from ...metrics import flicker, motion_ratio
from ..evaluate import ObservedObject, judge, observe
from ..world import ObjectWords, SceneWords
from .records import Record

TRACK_POINTS = 9  # of a clip's frames; enough to draw a circle
OBJECT_SLOTS = ObjectWords._fields


def judged(video: torch.Tensor, words: SceneWords, slots: Sequence[str]) -> Record:
    """What a clip shows, and which words of its prompt are right.

    Args:
        video: ``[frames, 3, height, width]`` in [0, 1]; an image is a clip of one frame.
        words: what its prompt says.
        slots: which words count.

    Returns:
        ``seen`` (at most three objects, each with its words, overlap with the best outline and track; how many there
        are; background and gradient), ``match`` (for each object of the prompt the index of the one seen, or None),
        ``right`` (by slot), ``all``, with several objects ``bound`` (each has its own color and shape), ``residual``.
    """
    seen = observe(video)
    score = judge(seen, words, slots)
    return {
        "seen": {
            "objects": [_object(item) for item in seen.objects],
            "count": seen.count,
            "background": seen.background,
            "gradient": seen.gradient,
        },
        "match": best_match(words.objects, seen.objects, tuple(score.right)),
        "right": score.right,
        "all": score.all,
        **({"bound": score.bound} if len(words.objects) > 1 else {}),
        "residual": _rounded(seen.residual),
    }


def accuracy(judgements: Sequence[Record]) -> Record:
    """Right words over all clips, by slot, for whole prompts and, with several objects, for their binding."""
    slots = dict.fromkeys(slot for judgement in judgements for slot in judgement["right"])
    verdicts = {slot: [each["right"][slot] for each in judgements if slot in each["right"]] for slot in slots}
    for name in ("all", "bound"):
        verdicts[name] = [each[name] for each in judgements if name in each]
    return {
        name: {"right": sum(values), "of": len(values), "share": sum(values) / len(values)}
        for name, values in verdicts.items()
        if values
    }


def best_match(said: Sequence[ObjectWords], seen: Sequence[ObservedObject], slots: Sequence[str]) -> list[int | None]:
    """For each object of a sentence the index of the one seen that :func:`.judge` compares it with; None if missing.

    As there, most objects have their own color and shape, and then most words of the slots judged are right.
    """
    own = [slot for slot in OBJECT_SLOTS if slot in slots]
    indices: list[int | None] = [*range(len(seen)), *[None] * max(0, len(said) - len(seen))]

    def agreement(order: Iterable[int | None]) -> tuple[int, int]:
        pairs = [(item, seen[index]) for item, index in zip(said, order, strict=True) if index is not None]
        bound = sum(_agree(*pair, "color") and _agree(*pair, "shape") for pair in pairs)
        return bound, sum(_agree(*pair, slot) for pair in pairs for slot in own)

    return list(max(permutations(indices, len(said)), key=agreement))


def median_seconds(values: Sequence[float]) -> float:
    """Median, rounded to milliseconds; robust against the slow first call."""
    return round(statistics.median(values), 3)


def decibels(value: float) -> float | str:
    """PSNR as a JSON value; ``"bit-equal"`` stands for infinity, which JSON lacks."""
    return "bit-equal" if math.isinf(value) else round(value, 2)


def temporal(video: torch.Tensor, dense: torch.Tensor) -> Record:
    """How much of the motion is kept, and how much flicker is added; nothing for images."""
    if len(dense) == 1:
        return {}
    ratio = motion_ratio(video, dense)
    moves = {} if math.isinf(ratio) else {"motion_ratio": round(ratio, 4)}
    return {**moves, "flicker": round(flicker(video, dense), 5)}


def _agree(said: ObjectWords, seen: ObservedObject, slot: str) -> bool:
    return bool(getattr(seen, slot) == getattr(said, slot))


def _object(item: ObservedObject) -> Record:
    return {
        **{slot: getattr(item, slot) for slot in OBJECT_SLOTS},
        "overlap": _rounded(item.overlap),
        "track": _track(item.centers),
    }


def _track(centers: torch.Tensor) -> list[list[float]] | None:
    """Some points of the path, first and last among them; None for images, and where the object was hardly seen."""
    found = centers[~centers.isnan().any(1)]
    if len(centers) == 1 or not len(found):
        return None
    chosen = torch.linspace(0, len(found) - 1, min(TRACK_POINTS, len(found))).round().long()
    return [[round(value, 1) for value in point] for point in found[chosen].tolist()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
