"""Constructed heads, and the figures worked out pair by pair from the whole matrix."""

from __future__ import annotations

import math

import torch

from dit_accel.clock import StepState
from dit_accel.controls import AttentionCall, SiteInfo
from dit_accel.layout import TokenLayout


def video(grid, before=0, after=0):
    """A layout of text, visual tokens, text."""
    start, stop = before, before + math.prod(grid)
    text = (stop, stop + after) if after else (0, before) if before else None
    return TokenLayout(grid, (start, stop), text=text)


def call_for(layout, layer=0, layers=1, path="blocks.0.attn1"):
    """An attention call at step 3 of 10."""
    site = SiteInfo(path, "self", layer, layers, "transformer")
    return AttentionCall(site, StepState(0, 3, 10, "cond", "transformer", 0, layout, None), layout)


def vectors(weights):
    """Queries and keys whose softmax attention, at the usual scale, is in proportion to a positive matrix."""
    scores = weights.double().clamp_min(1e-30).log()
    return (scores * len(weights) ** 0.5).float(), torch.eye(len(weights))


def softmax(query, key):
    """The whole matrix, float64."""
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1)


def places(grid):
    """Frame, row and column of each visual token."""
    frames, height, width = grid
    return [(f, y, x) for f in range(frames) for y in range(height) for x in range(width)]
