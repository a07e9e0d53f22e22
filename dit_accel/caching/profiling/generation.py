"""Running a pipeline once for each prompt, each with noise of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Prompt = str | Mapping[str, Any]
"""Text, or the arguments of the pipeline's call that stand for it, such as ``{"prompt_embeds": ...}``."""
Generate = Callable[[Prompt, int], Any]
"""Runs one generation from a prompt and its place among all; returns what the pipeline does."""


def generator_of(pipe: Any, steps: int | None, seed: int, call: Mapping[str, Any]) -> Generate:
    """Calls the pipeline up to its latents; prompt number i has the noise of ``seed + i``.

    Args:
        pipe: a diffusers pipeline.
        steps: sampling steps; None for the pipeline's own.
        seed: of the noise of the first prompt.
        call: other arguments of the pipeline's call.
    """
    fixed = {**call, **({} if steps is None else {"num_inference_steps": steps})}

    def generate(prompt: Prompt, number: int) -> Any:
        given = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        noise = torch.Generator().manual_seed(seed + number)
        return pipe(**{"output_type": "latent", **fixed, **given}, generator=noise)

    return generate


def checked_prompts(prompts: Sequence[Prompt] | Prompt) -> list[Prompt]:
    """A list, also of a single one.

    Raises:
        ValueError: if there is none, or an empty text.
    """
    found = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    if not found or any(isinstance(prompt, str) and not prompt.strip() for prompt in found):
        raise ValueError("give one or more prompts, and no empty ones")
    return found


def final_latents(output: Any) -> Tensor:
    """The latents that a pipeline returned.

    Raises:
        ValueError: if it returned none: the call asked for pictures.
    """
    found = getattr(output, "frames", None)
    found = getattr(output, "images", None) if found is None else found
    found = output[0] if found is None else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f'the pipeline returned {type(found).__name__}, no latents; call it with output_type="latent"'
        )
    return found


def plain(value: Any) -> Any:
    """A setting as it can be written to a file: what is no number, text or list of these is told by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return type(value).__name__
