"""Profiling: runs a pipeline densely, and looks at which blocks attend to the foreground."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from .blocks import block_paths, experts_of
from .budget import Budget
from .generation import Generate, Prompt, checked_prompts, generator_of, plain
from .looking import Looking
from .masks import MaskSource, source_of
from .profile import BlockProfile, config_hash
from .received import ReceivedAttentionRecorder
from .search import Tell, silent


def profile_blocks(
    pipe: Any,
    prompts: Sequence[Prompt] | Prompt,
    *,
    steps: int | None = None,
    budget: float | Budget = 0.7,
    rows: int = 256,
    mask: MaskSource | Tensor | None = None,
    at: Collection[int] | None = None,
    branches: Collection[str] | None = None,
    seed: int = 0,
    generate: Generate | None = None,
    tell: Tell = silent,
    **call: Any,
) -> BlockProfile:
    """Ranks the blocks of a model by how much they attend to the foreground (ProfilingDiT, arXiv 2504.03140).

    For each block, step, branch and prompt: the attention every video token receives from a sample of queries, the
    tokens that receive most, and the enrichment of the foreground among them (:func:`.enrichment.enrichment`),
    averaged over frames, steps, branches and prompts. The blocks with the smallest enrichment are the background.

    Args:
        pipe: a diffusers pipeline, not accelerated.
        prompts: texts, or arguments of the call that stand for them.
        steps: sampling steps; None for the pipeline's own.
        budget: part of the blocks chosen as background, in (0, 1), or a :class:`.budget.Budget` for a predicted
            speed-up.
        rows: queries looked at in each call.
        mask: where the foreground is: a tensor ``[(frames,) height, width]`` at the size of the token grid or larger,
            a function of a :class:`.masks.Scene` (such as :class:`.masks.SubjectWords`), or None for saliency.
        at: steps to look at; None for all.
        branches: branches to look at; None for all.
        seed: of the noise.
        generate: runs one generation; by default the pipeline is called with ``call``.
        tell: called with a line of progress now and then.
        **call: arguments of the pipeline's call, such as ``height`` and ``guidance_scale``.

    Returns:
        scores and chosen blocks.

    Raises:
        ValueError: for settings out of range, a model without a stack of blocks, a mask that does not fit, or if no
            frame had both foreground and background.
    """
    from ...entry import accelerate

    asked, roots = checked_prompts(prompts), experts_of(pipe)
    first = next(iter(roots.values()))
    layers = len(block_paths(first))
    count = Budget.of(budget).count(layers, steps)
    looking = Looking(roots, source_of(mask), ReceivedAttentionRecorder(rows, at, branches), at)
    run = generate or generator_of(pipe, steps, seed, call)
    with ExitStack() as stack:
        handle = stack.enter_context(accelerate(pipe, controls=looking.controls))
        for expert in roots:
            stack.callback(looking.attach(expert, handle.clock, getattr(pipe, "scheduler", None)))
        for number, prompt in enumerate(asked):
            run(prompt, number)
            tell(f"[{number + 1}/{len(asked)}] profiled: {prompt if isinstance(prompt, str) else 'prompt'}")
    scores, by_expert = looking.scores()
    settings = {
        "prompts": [prompt if isinstance(prompt, str) else plain(prompt) for prompt in asked],
        "steps": steps,
        "budget": plain(budget) if isinstance(budget, float) else repr(budget),
        "rows": rows,
        "mask": type(mask).__name__ if isinstance(mask, Tensor) else repr(source_of(mask)),
        "at": None if at is None else sorted(at),
        "seed": seed,
        "call": plain(call),
        **looking.facts(),
    }
    profile = BlockProfile(
        type(first).__name__, config_hash(first), layers, "profile", scores, (0,), by_expert, settings
    )
    return profile.with_count(count)
