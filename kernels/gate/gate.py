"""The block gate: guesses from one vector for each block which blocks of keys a block of queries attends to.

Source: SeerAttention, arXiv 2410.13276, without its causal mask: `softmax(qg . kg / sqrt(d_gate))` over the blocks of
keys, where qg and kg are linear maps of pooled queries and keys, apart for each head.  Ours is told the noise level as
well, which scales and shifts qg (feature-wise linear modulation, arXiv 1709.07871), since diffusion models attend
otherwise at the beginning than at the end.  The paper pools before the rotary embedding and applies it to the blocks;
here queries and keys come with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EMBEDDING = 8  # numbers that describe the noise level
_LEAST = 2.0**-10  # noise levels closer to 0 and 1 than this are not told apart


class GateWeights(NamedTuple):
    """The weights of one attention module, float32.

    Attributes:
        query: `[H, D, d_gate]`.
        key: `[H, 3 * D, d_gate]`, for the greatest, the least and the mean key of a block.
        step: `[H, EMBEDDING, 2 * d_gate]`, from the noise level to scale and shift.
    """

    query: Tensor
    key: Tensor
    step: Tensor

    @property
    def heads(self) -> int:
        """H."""
        return self.query.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.query.shape[1]


class StepGate(NamedTuple):
    """A gate at one noise level: the maps, and scale and shift of the mapped queries, `[..., H, d_gate]`."""

    query: Tensor
    key: Tensor
    scale: Tensor
    shift: Tensor


def noise_embedding(level: Tensor) -> Tensor:
    """Describes noise levels by cosines of their log-odds, in which a flow's levels are about evenly spread.

    Args:
        level: `[...]`, from 0 (no noise) to 1.

    Returns:
        float32 `[..., EMBEDDING]`; the first number is always 1.
    """
    level = level.float().clamp(_LEAST, 1 - _LEAST)
    place = (level / (1 - level)).log() / (2 * math.log(1 / _LEAST - 1)) + 0.5
    return torch.cos(math.pi * place[..., None] * torch.arange(EMBEDDING, device=level.device))


def at_level(weights: GateWeights, level: Tensor) -> StepGate:
    """What a noise level makes of a gate.

    Args:
        weights: of the gate.
        level: `[...]`, from 0 to 1.

    Returns:
        The gate, with scale and shift `[..., H, d_gate]`.
    """
    # No matrix product, which autocast would round to 16 bits.
    scale, shift = (noise_embedding(level)[..., None, :, None] * weights.step).sum(-2).chunk(2, -1)
    return StepGate(weights.query, weights.key, 1 + scale, shift)


def gate_logits(queries: Tensor, keys: Tensor, gate: StepGate) -> Tensor:
    """The logarithm of the gate, up to a constant of each row.

    Args:
        queries: mean queries, float32 `[..., H, rows, D]`.
        keys: pooled keys, float32 `[..., H, columns, 3 * D]`.
        gate: at the noise level of the call.

    Returns:
        float32 `[..., H, rows, columns]`.
    """
    mapped = (queries @ gate.query) * gate.scale[..., None, :] + gate.shift[..., None, :]
    return mapped @ (keys @ gate.key).transpose(-1, -2) * mapped.shape[-1] ** -0.5
