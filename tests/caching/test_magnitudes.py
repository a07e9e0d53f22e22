"""The calibration of MagCache on tiny models, against hooks of torch on their first and last blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.caching.magnitudes import MagnitudeRecorder

from ..seams.conftest import Subject, build_flux, build_subject


def residuals(subject: Subject, first: nn.Module, last: nn.Module, place: int | None) -> list[Tensor]:
    """What all blocks added in each call of the model; ``place`` of the main stream in the last block's output."""
    entered: list[Tensor] = []
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output if place is None else output[place]) - entered[-1])

    hooks = [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]
    try:
        subject.run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def ratios_by_hand(found: list[Tensor]) -> list[float]:
    expected = [1.0]
    for before, now in pairwise(found):
        tokens = zip(now.flatten(0, 1), before.flatten(0, 1), strict=True)
        lengths = [float((a * a).sum().sqrt() / (b * b).sum().sqrt()) for a, b in tokens]
        expected.append(sum(lengths) / len(lengths))
    return expected


def recorded(subject: Subject, branch: str | None = None) -> tuple[float, ...]:
    recorder = MagnitudeRecorder(subject.pipe, branch)
    with dit_accel.accelerate(subject.pipe, block_hooks=[recorder]):
        subject.run(seed=7)
        subject.run()
    return recorder.ratios()


def test_ratios_of_wan_are_of_one_branch_and_the_latest_generation(make_tiny_wan: Callable[[int], Any]) -> None:
    subject = build_subject(make_tiny_wan, "t2v")
    calls = residuals(subject, subject.root.blocks[0], subject.root.blocks[-1], None)
    assert recorded(subject) == pytest.approx(ratios_by_hand(calls[0::2]), rel=1e-4)
    assert recorded(subject, "uncond") == pytest.approx(ratios_by_hand(calls[1::2]), rel=1e-4)


def test_ratios_of_flux_are_of_the_image() -> None:
    """Two streams, the text first, and two lists of blocks."""
    torch.manual_seed(0)
    subject = build_flux()
    subject.inputs["num_inference_steps"] = 3
    root = subject.root
    calls = residuals(subject, root.transformer_blocks[0], root.single_transformer_blocks[-1], 1)
    assert recorded(subject) == pytest.approx(ratios_by_hand(calls[0::2]), rel=1e-4)


def test_ratios_are_what_the_preset_wants(make_tiny_wan: Callable[[int], Any]) -> None:
    subject = build_subject(make_tiny_wan, "t2v")
    settings = {"ratios": recorded(subject), "threshold": 1e9, "max_skips": 99, "retention": 1}
    with dit_accel.accelerate(subject.pipe, cache="magcache", cache_settings=settings) as handle:
        subject.run()
        decisions = handle.caches.engines[0].record.decisions
    assert {each.step for each in decisions if each.computed} == {0}


def test_nothing_recorded_is_an_error(make_tiny_wan: Callable[[int], Any]) -> None:
    with pytest.raises(ValueError, match="no whole generation"):
        MagnitudeRecorder(make_tiny_wan(0)).ratios()
