"""What every cache has to pass on every pipeline, as functions that also run on the caches of others.

Each takes a case and ``apply``, which puts something on its pipeline for the time of a ``with``. Each first sees to it
that what is put on acts at all, since nothing is easier to pass for a cache that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.caching.recipe import Cache

from .subjects import STEPS, Branch, Case, Outputs, branch_of, dense_path, fresh, outputs_along

Apply = Callable[[Case], AbstractContextManager[Any]]
FAILS_AT = 3  # step in whose midst a generation fails


class Broken(Exception):
    """Stands for whatever can go wrong in the midst of a generation."""


def ours(cache: Cache | str, **settings: Any) -> Apply:
    """Puts one of our caches on."""
    return lambda case: dit_accel.accelerate(case.pipe, cache=cache, **settings)


def check_all_computed(case: Case, apply: Apply) -> None:
    """A cache that computes everything gives the very output of the plain pipeline, twice."""
    plain = case.run()
    with apply(case):
        assert torch.equal(case.run(), plain)
        assert torch.equal(case.run(), plain)


def check_acts(case: Case, apply: Apply) -> None:
    """A cache that may reuse does so: something is skipped, the output differs, and it is a number."""
    plain, calls = _counted(case)
    with apply(case):
        cached, fewer = _counted(case)
    assert fewer < calls
    assert not torch.equal(cached, plain)
    assert cached.isfinite().all()


def check_isolation(case: Case, apply: Apply) -> None:
    """What one branch gives does not depend on the prompt of the other, when both see the same latents."""
    path, plain = dense_path(case)
    branches: tuple[Branch, Branch] = ("cond", "uncond")
    for branch, other in (branches, branches[::-1]):
        with apply(case):
            outputs = outputs_along(case, path)
            changed = outputs_along(case, path, **case.other_prompt(other))
        assert _same(branch_of(outputs, branch), branch_of(changed, branch))
        assert not _same(branch_of(outputs, branch), branch_of(plain, branch))
        assert not _same(branch_of(outputs, other), branch_of(changed, other))


def check_branch_alone(case: Case, cache: Cache) -> None:
    """A branch gives the same whether the other one is cached, too, or computed throughout."""
    path, plain = dense_path(case)
    with ours(cache)(case):
        both = outputs_along(case, path)
    for branch in ("cond", "uncond"):
        with ours(replace(cache, branches=(branch,)))(case):
            alone = outputs_along(case, path)
        other: Branch = "uncond" if branch == "cond" else "cond"
        assert _same(branch_of(alone, branch), branch_of(both, branch))
        assert _same(branch_of(alone, other), branch_of(plain, other))
        assert not _same(branch_of(alone, branch), branch_of(plain, branch))


def check_generations(case: Case, apply: Apply) -> None:
    """Generations of other prompts and seeds, back to back, equal fresh ones."""
    _check_sequence(case, apply, [{}, {"seed": 2} | case.other_prompt(), {}])


def check_guidance(case: Case, apply: Apply) -> None:
    """Generations with and without guidance, in turns."""
    off = case.without_guidance
    _check_sequence(case, apply, [{}, off, {}, off | case.other_prompt(), off])


def check_sizes(case: Case, apply: Apply) -> None:
    """Generations of other sizes, in turns."""
    resized = case.resized
    _check_sequence(case, apply, [{}, resized, resized | {"seed": 2} | case.other_prompt(), {}])


def check_steps(case: Case, apply: Apply) -> None:
    """Generations of other numbers of steps, in turns."""
    counts = (STEPS, STEPS - 1, STEPS + 3, STEPS)
    _check_sequence(case, apply, [{"num_inference_steps": count} for count in counts])


def check_one_branch(case: Case, apply: Apply) -> None:
    """Where each branch is a call, the one that is left without guidance gives what it gives beside the other."""
    path, plain = dense_path(case)
    with apply(case):
        both = outputs_along(case, path)
        alone = outputs_along(case, path, **case.without_guidance)
    assert _same(branch_of(alone, "cond"), branch_of(both, "cond"))
    assert not _same(branch_of(alone, "cond"), branch_of(plain, "cond"))


def check_switch(case: Case, apply: Apply) -> None:
    """Guidance that ends within a generation leaves the other branch as it would be, or computes the new shape."""
    (path, _), last = dense_path(case), FAILS_AT - 1
    changes: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", *_switched_inputs(case)]}

    def switch(pipe: Any, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != last:
            return {}
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[1] for name in _switched_inputs(case)}

    plain = outputs_along(case, path, switch, **changes)
    with apply(case):
        through = outputs_along(case, path, **changes)
        switched = outputs_along(case, path, switch, **changes)
    assert (last, "uncond") in switched and (last + 1, "uncond") not in switched
    assert not _same(branch_of(switched, "cond"), branch_of(plain, "cond"))
    before, after = _split(switched, last), _split(through, last)
    assert _same(before[0], after[0])
    if case.calls == "sequential":
        assert _same(before[1], after[1])
    else:
        assert torch.equal(before[1][0], _split(plain, last)[1][0])


def check_failure_between(case: Case, apply: Apply) -> None:
    """A callback that raises leaves nothing behind."""

    def fail(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == FAILS_AT:
            raise Broken
        return tensors

    _check_failure(case, apply, lambda: case.run(callback_on_step_end=fail))


def check_failure_within(case: Case, apply: Apply) -> None:
    """A model that fails in the midst of a call, within the context of its branch, leaves nothing behind."""

    def run() -> None:
        count = 0

        def fail(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == 2 * FAILS_AT:
                raise Broken

        handles = [root.register_forward_hook(fail) for root in case.roots()]
        try:
            case.run()
        finally:
            for handle in handles:
                handle.remove()

    _check_failure(case, apply, run)


def check_late(name: str, apply: Apply) -> None:
    """A cache put on a pipeline that has run before acts as one that is put on at once."""
    results = []
    for ran_before in (False, True):
        case = fresh(name)
        if ran_before:
            plain = case.run()
        with apply(case):
            results.append(case.run())
    assert torch.equal(*results)
    assert not torch.equal(results[1], plain)


def check_values_told(case: Case, make: Callable[[float], Cache]) -> None:
    """What a threshold is compared with is told, so that one can be chosen which acts: just above, not just below."""
    with dit_accel.accelerate(case.pipe, cache=make(0.0)) as handle:
        case.run()
        cells = [cell for row in handle.report().caches[0].rows for cell in row.cells]
    told = [cell.value for cell in cells if cell.value is not None]
    assert told
    for factor, acts in ((0.999, False), (1.001, True)):
        plain = case.stock()
        with dit_accel.accelerate(case.pipe, cache=make(min(told) * factor)):
            assert torch.equal(case.run(), plain) is not acts


def check_removal(case: Case, apply: Apply) -> None:
    """What is taken off leaves the very output of before, and no attributes or hooks on any module."""
    plain, traces = case.run(), _traces(case)
    with apply(case):
        assert not torch.equal(case.run(), plain)
        assert _traces(case) != traces
    assert _traces(case) == traces
    assert torch.equal(case.run(), plain)


def _check_sequence(case: Case, apply: Apply, generations: list[dict[str, Any]]) -> None:
    alone = []
    for changes in generations:
        plain = case.stock(**changes)
        with apply(case):
            alone.append(case.run(**changes))
        assert not torch.equal(alone[-1], plain)
    with apply(case):
        together = [case.run(**changes) for changes in generations]
    assert _same(together, alone)


def _check_failure(case: Case, apply: Apply, run: Callable[[], object]) -> None:
    with apply(case):
        alone = case.run(seed=2, **case.other_prompt())
    with apply(case):
        with pytest.raises(Broken):
            run()
        assert torch.equal(case.run(seed=2, **case.other_prompt()), alone)
    assert not torch.equal(case.stock(seed=2, **case.other_prompt()), alone)


def _switched_inputs(case: Case) -> list[str]:
    """Tensors whose first half belongs to the branch that ends."""
    known = ("prompt_embeds", "pooled_prompt_embeds") if case.calls == "batched" else ()
    return [name for name in known if name in case.inputs and name in case.pipe._callback_tensor_inputs]


def _split(outputs: Outputs, last: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of cond up to a step, and behind it."""
    found = [(step, output) for (step, branch), output in sorted(outputs.items()) if branch == "cond"]
    return [each for step, each in found if step <= last], [each for step, each in found if step > last]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    assert len(some) == len(others) > 0
    return all(torch.equal(*pair) for pair in zip(some, others, strict=True))


def _counted(case: Case) -> tuple[Tensor, int]:
    """One generation, and how many times a layer with weights ran in it."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    modules = [module for root in case.roots() for module in root.modules() if isinstance(module, layers)]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        return case.run(), count
    finally:
        for handle in handles:
            handle.remove()


def _traces(case: Case) -> list[tuple[str, int, int, bool]]:
    """What a cache may leave on modules: hooks, and a forward of their own."""
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for root in case.roots()
        for name, module in root.named_modules()
    ]
