"""Which sentences training never sees; the same on every machine."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator

from .grammar import say
from .words import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, TEXTURES, ObjectWords, SceneWords

SUBSETS: tuple[str, ...] = ("basic", "single", "pair")
BASIC_MOTIONS: tuple[str, ...] = ("left", "right", "up", "down")
BASIC_HELD_OUT = 64
_SALT = "held out: "
_CHOICE = 64  # sentences that the next one is chosen among, so that all words come about equally often


def is_held_out(words: SceneWords) -> bool:
    """Whether training must never see this sentence.

    64 of the 288 basic sentences are held out, and a tenth of all others: those whose SHA-256 is divisible by 10. The
    order in which a sentence names its objects does not count.
    """
    if is_basic(words):
        return words in _basic_held_out()
    ordered = words._replace(objects=tuple(sorted(words.objects, key=str)))
    return int.from_bytes(hashlib.sha256((_SALT + say(ordered)).encode()).digest(), "big") % 10 == 0


def is_basic(words: SceneWords) -> bool:
    """Whether the sentence is one of the 288: one medium plain object moving straight on a plain background."""
    if len(words.objects) != 1 or words.gradient:
        return False
    item = words.objects[0]
    return (item.size, item.texture) == ("medium", "plain") and item.motion in BASIC_MOTIONS


def held_out(subset: str, count: int, *, motion: bool) -> list[SceneWords]:
    """The first held-out sentences of a subset: distinct, and every word about equally often in its place.

    Args:
        subset: "basic" (see :func:`is_basic`), "single" (one object, any words) or "pair" (two objects).
        count: how many; fewer are the beginning of more.
        motion: sentences for clips, or for images, which say no motion.

    Raises:
        ValueError: if the subset is unknown, basic sentences are wanted without motion, or there are not so many.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}; choose one of {', '.join(SUBSETS)}")
    if subset == "basic" and not motion:
        raise ValueError("basic sentences say a motion; choose subset single or pair for images")
    source = iter(_basic_held_out()) if subset == "basic" else _balanced(_all_held_out(subset, motion))
    found = list(itertools.islice(source, max(count, 0)))
    if count < 1 or len(found) < count:
        raise ValueError(
            f"count must be at least 1 and at most the {len(found)} held-out sentences there are; got {count}"
        )
    return found


@functools.cache
def _basic_held_out() -> dict[SceneWords, None]:
    """The 64 held-out sentences of the world's first version, in its order."""
    everything = list(itertools.product(COLORS, SHAPES, BASIC_MOTIONS, BACKGROUNDS))
    random.Random("held out").shuffle(everything)
    return {
        SceneWords((ObjectWords(color, shape, motion=motion),), background): None
        for color, shape, motion, background in everything[:BASIC_HELD_OUT]
    }


def _balanced(source: Iterator[SceneWords]) -> Iterator[SceneWords]:
    """Reorders sentences so that in every beginning all words come about equally often in their place."""
    seen: Counter[tuple[int, object]] = Counter()
    window = list(itertools.islice(source, _CHOICE))
    while window:
        best = min(window, key=lambda words: sum(seen[slot] for slot in _slots(words)))
        seen.update(_slots(best))
        yield best
        window.remove(best)
        window.extend(itertools.islice(source, 1))


def _slots(words: SceneWords) -> list[tuple[int, object]]:
    return list(enumerate([*itertools.chain(*words.objects), words.background, words.gradient]))


def _all_held_out(subset: str, motion: bool) -> Iterator[SceneWords]:
    """Every held-out sentence of "single" or "pair" once, in a fixed order without a pattern.

    There are millions of pairs, so they are not listed: a step of about the golden ratio visits all numbers below
    their count.
    """
    sizes = SIZES if subset == "single" else ("small", "medium")
    slots = (COLORS, SHAPES, sizes, TEXTURES, MOTIONS if motion else (None,))
    objects = [ObjectWords(*words) for words in itertools.product(*slots)]
    scenes = list(itertools.product(BACKGROUNDS, (False, True)))
    count = 1 if subset == "single" else 2
    total = len(objects) ** count * len(scenes)
    step = next(n for n in itertools.count(round(total * 0.618)) if math.gcd(n, total) == 1)
    for number in range(total):
        rest, scene = divmod(number * step % total, len(scenes))
        items = tuple(objects[rest // len(objects) ** place % len(objects)] for place in range(count))
        words = SceneWords(items, *scenes[scene])
        if len({item.color for item in items}) == count and is_held_out(words):
            yield words
