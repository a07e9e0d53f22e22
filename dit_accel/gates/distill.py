"""From a pipeline and some prompts to the gates of its model: record, train, measure on prompts kept apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..families import family_of
from ..roots import find_roots
from .data import GateRecorder, SiteKey, SiteSamples
from .files import Gates
from .train import GateTraining, levels_of, recalls, train_gates

Generate = Callable[[str, int], Any]
Tell = Callable[[str], None]


def distill(
    pipe: Any,
    prompts: Sequence[str],
    held_out: Sequence[str],
    generate: Generate,
    *,
    training: GateTraining,
    block: int = 64,
    samples: int | None = 5,
    rows: int | None = None,
    density: float = 0.25,
    tell: Tell = lambda message: None,
) -> Gates:
    """Trains the gates of a pipeline; its weights stay as they are.

    Args:
        pipe: a diffusers pipeline, or a bare transformer.
        prompts: to learn from.
        held_out: to measure recall on; none of them is learned from.
        generate: runs one generation of ``pipe``, from a prompt and its place among all.
        training: how they are trained.
        block: tokens per block, 64 or 128.
        samples: steps of each generation that are recorded, spread evenly; None for all.
        rows: query blocks that are kept of each call, spread evenly; None for all.
        density: part of the blocks for which recall is measured.
        tell: called with a line of progress now and then.

    Returns:
        The gates. Their record has prompts, settings, losses, seconds, and the recall of each site and on average.

    Raises:
        ValueError: for settings out of range, or if an attention module was never called at a recorded step.
    """
    _check(prompts, held_out, block, density)
    roots = find_roots(pipe)
    recorders = [GateRecorder(block, samples=samples, rows=rows) for _ in range(2)]
    started = time.perf_counter()
    _record(pipe, recorders, (prompts, held_out), generate, tell)
    learned, kept_apart = (_checked(recorder.sites, roots) for recorder in recorders)
    recorded = time.perf_counter()
    weights, losses = train_gates(learned, training, _every_tenth(training.steps, tell))
    record: dict[str, Any] = {
        "prompts": list(prompts),
        "held_out_prompts": list(held_out),
        "steps_recorded": samples,
        "grid": list(next(iter(learned.values())).layout.grid),
        **vars(training),
        "loss": {"first": losses[0], "last": sum(losses[-10:]) / len(losses[-10:])},
        "held_out_recall": _summed_up(recalls(kept_apart, weights, density), density),
        "seconds": {"recording": recorded - started, "training": time.perf_counter() - recorded},
    }
    layers = {samples.site.kind: samples.site.layers for samples in learned.values()}
    family = family_of(next(iter(roots.values()))).root_class
    sites = {_name(key): gate for key, gate in weights.items()}
    return Gates(family, layers, block, levels_of(learned), sites, record)


def _check(prompts: Sequence[str], held_out: Sequence[str], block: int, density: float) -> None:
    if not prompts or not held_out:
        raise ValueError("give at least one prompt to learn from and one that is held out")
    both = set(prompts) & set(held_out)
    if both:
        raise ValueError(f"{sorted(both)[0]!r} is both learned from and held out; leave it out of one of them")
    if block not in (64, 128):
        raise ValueError(f"gates work on blocks of 64 or 128 tokens; got {block!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density is the part of all blocks to keep, in (0, 1], such as 0.25; got {density!r}")


def _record(
    pipe: Any,
    recorders: Sequence[GateRecorder],
    prompts: tuple[Sequence[str], Sequence[str]],
    generate: Generate,
    tell: Tell,
) -> None:
    """Runs all generations, those to learn from and those held out, each kind with its own recorder."""
    from ..entry import accelerate

    number, count = 0, sum(map(len, prompts))
    for recorder, some in zip(recorders, prompts, strict=True):
        for prompt in some:
            with accelerate(pipe, controls=[recorder]):
                generate(prompt, number)
            number += 1
            tell(f"[{number}/{count}] recorded: {prompt}")


def _summed_up(found: Mapping[SiteKey, dict[str, float]], density: float) -> dict[str, Any]:
    """The recall of all sites, and on average, as plain values."""
    mean = {name: sum(of_site[name] for of_site in found.values()) / len(found) for name in ("gate", "pooled", "mass")}
    return {"density": density, **mean, "sites": {_name(key): of_site for key, of_site in found.items()}}


def _checked(sites: Mapping[SiteKey, SiteSamples], experts: Collection[str]) -> Mapping[SiteKey, SiteSamples]:
    """Refuses a recording in which a site is missing: a model of two experts, say, of which only one was seen."""
    absent = set(experts) - {expert for expert, _ in sites}
    if absent:
        raise ValueError(
            f"no self-attention or joint attention of {', '.join(sorted(absent))} ran at the recorded steps; record "
            "more of them"
        )
    counts = Counter((expert, samples.site.kind) for (expert, _), samples in sites.items())
    for (expert, _), samples in sites.items():
        found, there = counts[expert, samples.site.kind], samples.site.layers
        if found < there:
            raise ValueError(f"only {found} of {there} attention modules of {expert} ran at the recorded steps")
    return sites


def _name(key: SiteKey) -> str:
    return ":".join(key)


def _every_tenth(steps: int, tell: Tell) -> Callable[[int, float], None]:
    def progress(step: int, loss: float) -> None:
        if step % max(1, steps // 10) == 0:
            tell(f"step {step}/{steps}: loss {loss:.4f}")

    return progress
