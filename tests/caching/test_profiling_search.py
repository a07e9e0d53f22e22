"""Searching the background: where the best set is known, and on a tiny pipeline against errors measured by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import dit_accel
from dit_accel.caching.policies.static import Interval
from dit_accel.caching.presets.profiling import profiling
from dit_accel.caching.profiling import find_subset, search_blocks
from dit_accel.caching.profiling.budget import Budget

from .test_profiling_pipeline import wan


def additive(weights):
    """Errors add up."""
    return lambda blocks: sum(weights[block] for block in blocks)


def test_additive_errors_are_solved_without_a_swap():
    weights = [0.5, 0.1, 0.9, 0.2, 0.4]
    found = find_subset(additive(weights), 5, 3, trials=0)
    assert found.blocks == (1, 3, 4) and found.error == pytest.approx(0.7) and found.singles == tuple(weights)
    assert found.evaluations == 6 and found.accepted == 0


def paired(blocks):
    """Alone 0 and 1 are the best, but they do not go together; 2 and 3 cancel."""
    alone = (0.1, 0.2, 0.5, 0.6, 0.7)
    return sum(alone[block] for block in blocks) + 2 * ({0, 1} <= set(blocks)) - 1 * ({2, 3} <= set(blocks))


def test_swaps_leave_a_greedy_set_for_a_better_one():
    best = min(itertools.combinations(range(5), 2), key=paired)
    found = find_subset(paired, 5, 2, trials=80, seed=1)
    assert best == (2, 3) and found.blocks == best and found.error == pytest.approx(paired(best))
    assert found.start == pytest.approx(paired((0, 1))) and found.accepted >= 2 and found.trials == 80


def test_the_same_seed_gives_the_same_search_and_no_set_is_measured_twice():
    seen = []

    def error(blocks):
        seen.append(blocks)
        return paired(blocks)

    first, lines = find_subset(error, 5, 2, trials=40, seed=7), []
    assert len(seen) == len(set(seen)) == first.evaluations <= 5 + 1 + 40
    assert find_subset(paired, 5, 2, trials=40, seed=7, tell=lines.append) == first
    assert len(lines) == 5 + 1 + first.accepted
    draws = {find_subset(paired, 5, 2, trials=1, seed=seed).blocks for seed in range(20)}
    assert len(draws) > 1, "another seed draws other swaps"


def test_errors_that_are_no_numbers_never_win():
    found = find_subset(lambda blocks: math.nan if 1 in blocks else float(sum(blocks)), 4, 2, trials=30)
    assert found.blocks == (0, 2) and found.singles[1] == math.inf
    with pytest.raises(ValueError, match="not finite"):
        find_subset(lambda blocks: math.nan, 3, 1)


@pytest.mark.parametrize(
    ("size", "trials", "words"), [(0, 1, "1 to 4"), (5, 1, "1 to 4"), (2, -1, "trials"), (2, 1.5, "trials")]
)
def test_numbers_out_of_range_are_refused(size, trials, words):
    with pytest.raises(ValueError, match=words):
        find_subset(additive([1] * 4), 4, size, trials=trials)


def test_all_blocks_leave_nothing_to_swap():
    found = find_subset(additive([1, 2]), 2, 2, trials=9)
    assert found.blocks == (0, 1) and found.trials == 0


LAYERS = 3
SCHEDULE = Interval(3, start=1)


def search(subject, **changes):
    inputs = dict(subject.inputs)
    steps = inputs.pop("num_inference_steps")
    settings = {"steps": steps, "seed": 3, "budget": 0.6, "schedule": SCHEDULE, "trials": 4}
    return search_blocks(subject.pipe, [{}], **(settings | inputs | changes))


def toy(guidance=1.0):
    """A model whose last block adds nothing, so that skipping it makes no error."""
    subject = wan(LAYERS)
    subject.inputs |= {"num_inference_steps": 4, "guidance_scale": guidance}
    still = subject.root.blocks[2]
    with torch.no_grad():
        for layer in (still.attn1.to_out[0], still.attn2.to_out[0], still.ffn.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    return subject


def test_errors_of_final_latents_are_those_of_real_runs():
    subject = toy()
    made = search(subject)
    dense = subject.run(seed=3)
    want = {}
    for size in (1, 2):
        for blocks in itertools.combinations(range(LAYERS), size):
            with dit_accel.accelerate(subject.pipe, cache=profiling(blocks, schedule=SCHEDULE)):
                found = subject.run(seed=3)
            want[blocks] = float((found - dense).norm() / dense.norm())
    assert made.scores == pytest.approx([want[(block,)] for block in range(LAYERS)], rel=1e-4, abs=1e-9)
    assert want[(2,)] == 0 and 2 in made.blocks and min(made.scores[:2]) > 0
    assert made.settings["error"] == pytest.approx(want[made.blocks], rel=1e-4)
    assert made.method == "search" and made.settings["trials"] == 4 and made.settings["objective"] == "latents"
    assert search(subject) == made, "the same again"
    assert dit_accel.acceleration_of(subject.pipe) is None


def test_errors_of_outputs_are_those_with_the_inputs_of_the_dense_run():
    """Every call is given what it was given in the dense run, so nothing but the reuse itself makes an error."""
    subject = toy(guidance=3.0)
    calls = []
    hook = subject.root.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, dict(kwargs), output[0].clone())), with_kwargs=True
    )
    subject.run(seed=3)
    hook.remove()
    made = search(subject, objective="output", trials=0)
    errors, kept = [], {}
    block = subject.root.blocks[1]
    stock = block.forward
    for number, (args, kwargs, output) in enumerate(calls):
        step, branch = number // 2, number % 2

        def forward(hidden, *rest, step=step, branch=branch, **given):
            if step in (0, 1):  # the first, and each third from 1 on
                kept[branch] = stock(hidden, *rest, **given) - hidden
            return hidden + kept[branch]

        block.forward = forward
        with torch.no_grad():
            found = subject.root(*args, **kwargs)[0]
        errors.append(float((found - output).abs().mean() / output.abs().mean()))
    del block.forward
    assert made.scores[1] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert made.scores[2] == pytest.approx(0, abs=1e-9) and 2 in made.blocks
    assert not subject.root._forward_hooks


def test_two_experts_are_searched_together():
    subject = wan(2, "two-experts")
    for objective in ("latents", "output"):
        made = search(subject, objective=objective, schedule=[2], trials=0)
        assert len(made.blocks) == 1 and len(made.scores) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "video"}, "latents, output"),
        ({"budget": 0}, r"in \(0, 1\)"),
        ({"budget": Budget(speedup=9.0)}, "at most"),
        ({"trials": -1}, "trials"),
        ({"schedule": "growing"}, "uniform, shrinking"),
        ({"output_type": "np"}, "output_type"),
    ],
)
def test_bad_settings_say_what_to_do(changes, words):
    subject = wan(2)
    with pytest.raises(ValueError, match=words):
        search(subject, **changes)
    assert dit_accel.acceleration_of(subject.pipe) is None
