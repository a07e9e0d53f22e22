"""Searching: which blocks a model can do without, by the error that skipping them makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe import Cache
from .blocks import block_paths, experts_of
from .budget import Budget
from .generation import Generate, Prompt, checked_prompts, final_latents, generator_of, plain
from .profile import BlockProfile, config_hash
from .schedule import Schedule, schedule_of
from .search import Tell, find_subset, silent

OBJECTIVES = ("latents", "output")


def search_blocks(
    pipe: Any,
    prompts: Sequence[Prompt] | Prompt,
    *,
    steps: int | None = None,
    budget: float | Budget = 0.7,
    schedule: Schedule = "uniform",
    objective: str = "latents",
    trials: int = 50,
    seed: int = 0,
    generate: Generate | None = None,
    tell: Tell = silent,
    **call: Any,
) -> BlockProfile:
    """Chooses the background blocks by measured error: the best single blocks, then random swaps.

    It measures ``layers + 1 + trials`` sets of blocks at most, each by one generation per prompt. The same arguments
    give the same list, as far as the device is deterministic.

    Args:
        pipe: a diffusers pipeline, not accelerated.
        prompts: texts, or arguments of the call that stand for them.
        steps: sampling steps; None for the pipeline's own.
        budget: part of the blocks chosen as background, in (0, 1), or a :class:`.budget.Budget` for a predicted
            speed-up.
        schedule: at which steps the background is computed, see :func:`.schedule.schedule_of`.
        objective: ``"latents"``: relative error ``|cached - dense| / |dense|`` (L2) of the final latents;
            ``"output"``: of the model's output (L1) at every call, given the inputs of the dense run, which needs no
            sampling of its own.
        trials: swaps that are drawn.
        seed: of the noise and of the draws.
        generate: runs one generation and returns what the pipeline does, with latents; by default the pipeline is
            called with ``call``.
        tell: called with a line of progress now and then.
        **call: arguments of the pipeline's call, such as ``height`` and ``guidance_scale``.

    Returns:
        single errors as scores, and the chosen blocks.

    Raises:
        ValueError: for settings out of range, or a model without a stack of blocks.
    """
    from ..presets.profiling import profiling  # which imports this package

    if objective not in OBJECTIVES:
        raise ValueError(f"objective is one of {', '.join(OBJECTIVES)}; got {objective!r}")
    asked, roots = checked_prompts(prompts), experts_of(pipe)
    first = next(iter(roots.values()))
    layers = len(block_paths(first))
    count, policy = Budget.of(budget).count(layers, steps), schedule_of(schedule)
    run = generate or generator_of(pipe, steps, seed, call)
    measure = (_latents_error if objective == "latents" else _output_error)(pipe, roots, asked, run)
    found = find_subset(
        lambda blocks: measure(profiling(blocks, schedule=policy)), layers, count, trials=trials, seed=seed, tell=tell
    )
    settings = {
        "prompts": [prompt if isinstance(prompt, str) else plain(prompt) for prompt in asked],
        "steps": steps,
        "budget": plain(budget) if isinstance(budget, float) else repr(budget),
        "schedule": repr(policy),
        "objective": objective,
        "trials": found.trials,
        "seed": seed,
        "call": plain(call),
        "error": found.error,
        "error_before_swaps": found.start,
        "accepted": found.accepted,
        "evaluations": found.evaluations,
    }
    scores = tuple(min(error, sys.float_info.max) for error in found.singles)  # a file has no infinity
    return BlockProfile(
        type(first).__name__, config_hash(first), layers, "search", scores, found.blocks, settings=settings
    )


Measure = Callable[[Cache], float]


def _latents_error(pipe: Any, roots: dict[str, nn.Module], prompts: list[Prompt], generate: Generate) -> Measure:
    """Relative error of the final latents, averaged over the prompts."""
    from ...entry import accelerate

    dense = [final_latents(generate(prompt, number)).float() for number, prompt in enumerate(prompts)]

    def measure(cache: Cache) -> float:
        errors = []
        with accelerate(pipe, cache=cache):
            for number, prompt in enumerate(prompts):
                found = final_latents(generate(prompt, number)).float()
                errors.append((found - dense[number]).norm() / dense[number].norm())
        return float(torch.stack(errors).mean())

    return measure


@dataclass(frozen=True)
class _Call:
    """One call of a model in a dense run."""

    expert: str
    step: int
    steps: int | None
    branch: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _output_error(pipe: Any, roots: dict[str, nn.Module], prompts: list[Prompt], generate: Generate) -> Measure:
    """Relative error of the outputs when the model is given the inputs of the dense run, averaged over all calls."""
    from ...entry import accelerate

    runs = _recorded(pipe, roots, prompts, generate)

    @torch.no_grad()
    def measure(cache: Cache) -> float:
        errors = []
        with accelerate(pipe, cache=cache) as handle:
            for calls in runs:
                handle.clock.reset()
                for call in calls:
                    handle.clock.set_step(call.step, call.steps, call.branch)
                    found = roots[call.expert](*call.args, **call.kwargs)[0].float()
                    errors.append((found - call.output).abs().mean() / call.output.abs().mean())
        return float(torch.stack(errors).mean())

    return measure


def _recorded(pipe: Any, roots: dict[str, nn.Module], prompts: list[Prompt], generate: Generate) -> list[list[_Call]]:
    """The calls of each dense generation. Tensors among the inputs are copied: schedulers write into some."""
    from ...entry import accelerate

    runs: list[list[_Call]] = []
    with ExitStack() as stack:
        handle = stack.enter_context(accelerate(pipe))

        def recorder(expert: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                state = handle.clock.state
                assert state is not None  # the clock is told before
                kept = {name: _own(value) for name, value in kwargs.items()}
                given = tuple(_own(value) for value in args)
                place = (expert, state.step, state.steps, state.branch)
                runs[-1].append(_Call(*place, given, kept, output[0].float()))

            return after

        for expert, root in roots.items():
            stack.callback(root.register_forward_hook(recorder(expert), with_kwargs=True).remove)
        for number, prompt in enumerate(prompts):
            runs.append([])
            generate(prompt, number)
    return runs


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
