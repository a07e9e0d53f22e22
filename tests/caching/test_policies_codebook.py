"""AdaCache's rule against its formula, on random sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.caching.policies import CODEBOOKS, Codebook, MotionRegularization

from .sequences import RANDOM, STEPS, UNIT, Vectors, decisions, forced_steps, mean_difference, rel, sights, walk


def frame_motion(frames: Vectors) -> float:
    """Of an output ``[1, 1, frames, 1, size]``."""
    later = [value for frame in frames[1:] for value in frame]
    earlier = [value for frame in frames[:-1] for value in frame]
    size = sum(map(abs, later)) / len(later) + sum(map(abs, earlier)) / len(earlier)
    return mean_difference(later, earlier) / size


@RANDOM
@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(CODEBOOKS)), with_motion=st.booleans())
def test_adacache_looks_up_the_distance_of_the_next_step(seed: int, name: str, with_motion: bool) -> None:
    outputs, forced = walk(seed, STEPS, size=12, pace=0.1), forced_steps(seed, STEPS)
    codebook = CODEBOOKS[name]
    expected, latest, distance, factor = [], -1, 1, 1.0
    for step in range(STEPS):
        computes = step == 0 or step in forced or step >= latest + distance
        if computes and latest >= 0:
            passed = step - latest
            change = rel(outputs[step], outputs[latest]) / passed
            if with_motion:
                before, factor = factor, 1.0
                if 0.1 * STEPS <= step + 1 <= 0.9 * STEPS:
                    factor = (frame_motion([outputs[step][at : at + 3] for at in range(0, 12, 3)]) / 0.385) ** 8
                change *= factor + 10 * abs(factor - before) / passed
            distance = codebook[-1][1]
            for most, found in reversed(codebook):
                distance = found if change < most else distance
        latest = step if computes else latest
        expected.append(computes)
    policy = Codebook(codebook, MotionRegularization() if with_motion else None)
    shaped = [torch.tensor(output, dtype=torch.float64).reshape(1, 1, 4, 1, 3) for output in outputs]
    assert decisions(policy.judge(UNIT, STEPS), sights(STEPS), forced, shaped) == expected


def test_adacache_tightened_takes_the_distance_of_a_larger_change() -> None:
    outputs = [torch.full((1, 4), value) for value in (1.0, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07, 1.07)]
    judge = Codebook().judge(UNIT, 8)
    assert decisions(judge, sights(8), frozenset(), outputs) == [True, True, *[False] * 5, True]
    judge = Codebook().judge(UNIT, 8)
    judge.tighten(0.5)  # 0.14 instead of 0.07: 5 steps instead of 6
    assert decisions(judge, sights(8), frozenset(), outputs) == [True, True, *[False] * 4, True, False]


def test_adacache_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="rising"):
        Codebook(((0.2, 2), (0.1, 3)))
    with pytest.raises(ValueError, match="distance in a codebook"):
        Codebook(((0.2, 0),))
    with pytest.raises(ValueError, match="several frames"):
        MotionRegularization().motion(torch.ones(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="set_step"):
        Codebook(motion=MotionRegularization()).judge(UNIT, None)
    with pytest.raises(ValueError, match="needs the model's output"):
        Codebook().judge(UNIT, 4).note(sights(1)[0], True, None)
