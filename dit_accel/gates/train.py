"""Training of block gates by self-distillation: the model's own attention maps are the teacher, its weights stay.

Source: SeerAttention, arXiv 2410.13276: Kullback-Leibler divergence from the teacher's row to the gate's, AdamW
without weight decay, learning rate 1e-3 with warm-up and a cosine decay. Beyond the paper: gates begin as scores of
mean vectors, and by default learn the mass of blocks instead of their greatest weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels.gate.gate import EMBEDDING, GateWeights, at_level, gate_logits
from ..kernels.gate.teacher import teacher
from ..kernels.search.inputs import tokens_per_block
from .data import SiteKey, SiteSamples

WARM_UP = 20  # steps
TEACHERS = ("mass", "max")

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained.

    Attributes:
        teacher: which map of blocks is learned: ``"mass"``, the share of the softmax in a block, which is what blocks
            that are left out lose; ``"max"``, the greatest weight in it, as published.
        steps: of the optimizer.
        d_gate: channels in which queries and keys are compared.
        batch: recorded calls of each site in a step.
        learning_rate: at its height.
        seed: of the first weights and of the order of calls.

    Raises:
        ValueError: if a number is out of range.
    """

    teacher: Literal["mass", "max"] = "mass"
    steps: int = 300
    d_gate: int = 32
    batch: int = 16
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.teacher not in TEACHERS:
            raise ValueError(f"unknown teacher {self.teacher!r}; choose 'mass' or 'max'")
        for name in ("steps", "d_gate", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1; got {value!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is a number above 0, such as 0.001; got {self.learning_rate!r}")


class Calls(NamedTuple):
    """All recorded calls of a site, float32; see :class:`SiteSamples`.

    Attributes:
        queries: ``[calls, heads, rows, head_dim]``.
        keys: ``[calls, heads, columns, 3 * head_dim]``, of the blocks without text only.
        teacher: ``[calls, heads, rows, columns]``; rows sum to 1.
        share: likewise, but rows sum to what is not text.
        level: noise level ``[calls]``.
    """

    queries: Tensor
    keys: Tensor
    teacher: Tensor
    share: Tensor
    level: Tensor

    @classmethod
    def of(cls, samples: SiteSamples, levels: float, teacher_map: Literal["mass", "max"] = "mass") -> Calls:
        """Gathers the calls of a site.

        Args:
            samples: of the site.
            levels: the timestep at which there is nothing but noise.
            teacher_map: which map the teacher is made of.

        Raises:
            ValueError: if none were recorded, or nothing but text is there.
        """
        if not samples.queries or not samples.rows.numel():
            raise ValueError("nothing was recorded to learn from; record at least one call with blocks without text")
        keys, greatest, share = (torch.stack(part).float() for part in (samples.keys, samples.greatest, samples.share))
        return cls(
            torch.stack(samples.queries).float(),
            keys[:, :, samples.columns],
            teacher((share if teacher_map == "mass" else greatest)[..., samples.columns]),
            share[..., samples.columns],
            torch.tensor(samples.timesteps) / levels,
        )

    def pick(self, index: Tensor) -> Calls:
        """Some of the calls."""
        return Calls(*(part[index] for part in self))


def levels_of(samples: Mapping[SiteKey, SiteSamples]) -> float:
    """The timestep at which there is nothing but noise: 1 for models that are given sigmas (Flux), else 1000."""
    return 1.0 if all(max(site.timesteps, default=0.0) <= 1 for site in samples.values()) else 1000.0


def train_gates(
    samples: Mapping[SiteKey, SiteSamples], training: GateTraining, progress: Progress | None = None
) -> tuple[dict[SiteKey, GateWeights], list[float]]:
    """Trains the gates of all sites side by side.

    Args:
        samples: what was recorded, by site.
        training: settings.
        progress: called after every step with its number, from 1, and its loss.

    Returns:
        The gates, in numbers that 16 bits hold so that a file keeps them exactly, and the loss of each step, averaged
        over sites.

    Raises:
        ValueError: if there is nothing to learn from, or the loss is no longer finite.
    """
    if not samples:
        raise ValueError("nothing was recorded to learn from; record at least one call")
    levels = levels_of(samples)
    calls = {key: Calls.of(site, levels, training.teacher) for key, site in samples.items()}
    generator = torch.Generator().manual_seed(training.seed)
    with torch.inference_mode(False), torch.enable_grad():
        gates = {key: initial_gate(site, training.d_gate, generator) for key, site in calls.items()}
        losses = []
        for step, loss in _steps(gates, calls, training, generator):
            losses.append(loss)
            if not math.isfinite(loss):
                raise ValueError(f"the loss was {loss} at step {step}; lower the learning rate")
            if progress is not None:
                progress(step, loss)
    return {key: GateWeights(*(part.detach().half().float() for part in gate)) for key, gate in gates.items()}, losses


def distillation_loss(gate: GateWeights, calls: Calls) -> Tensor:
    """Kullback-Leibler divergence from the teacher to the gate, in nats, averaged over rows, heads and calls."""
    logits = gate_logits(calls.queries, calls.keys, at_level(gate, calls.level))
    difference = calls.teacher.clamp(min=1e-30).log() - logits.log_softmax(-1)
    return (calls.teacher * difference).sum(-1).mean()


def initial_gate(calls: Calls, d_gate: int, generator: torch.Generator) -> GateWeights:
    """Maps whose gate is the softmax of scaled scores of mean vectors, as nearly as so few channels allow.

    Among all maps of rank ``d_gate`` these err least on queries and keys spread as those of the calls are. The noise
    level has no effect at first.
    """
    heads, width = calls.queries.shape[1], calls.queries.shape[-1]
    means = calls.keys[..., -width:]
    spread_q, back_q = _spread(calls.queries)
    spread_k, back_k = _spread(means - means.mean((0, 2), keepdim=True))
    left, size, right = torch.linalg.svd(spread_q @ spread_k)
    rank = min(d_gate, width)
    root = (size[:, None, :rank] * (d_gate / width) ** 0.5).sqrt()
    query = torch.randn(heads, width, d_gate, generator=generator) * width**-0.5
    key = torch.zeros(heads, 3 * width, d_gate)
    query[..., :rank] = back_q @ left[..., :rank] * root
    key[:, -width:, :rank] = back_k @ right.transpose(-1, -2)[..., :rank] * root
    return GateWeights(*(part.requires_grad_() for part in (query, key, torch.zeros(heads, EMBEDDING, 2 * d_gate))))


def _spread(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Root of the second moments of ``[calls, heads, blocks, width]``, and its inverse: ``[heads, width, width]``."""
    flat = vectors.transpose(0, 1).flatten(1, 2)
    values, directions = torch.linalg.eigh(flat.transpose(-1, -2) @ flat / flat.shape[1])
    roots = values.clamp(min=1e-6 * float(values.max().clamp(min=1e-6))).sqrt()[:, None]
    return directions * roots @ directions.transpose(-1, -2), directions / roots @ directions.transpose(-1, -2)


def block_recall(scores: Tensor, share: Tensor, density: float) -> float:
    """Part of the softmax that the best blocks of each row hold, averaged over rows, heads and calls.

    Args:
        scores: ``[..., columns]``, by which blocks are chosen.
        share: likewise, the share of the softmax in each block.
        density: part of the blocks that is chosen, rounded up.
    """
    best = scores.topk(math.ceil(density * scores.shape[-1] - 1e-9), -1).indices
    return float((share.gather(-1, best).sum(-1) / share.sum(-1).clamp(min=1e-30)).mean())


def recalls(
    samples: Mapping[SiteKey, SiteSamples], gates: Mapping[SiteKey, GateWeights], density: float
) -> dict[SiteKey, dict[str, float]]:
    """Recall of every site by its gate, by the scores of mean vectors, and by the blocks' own mass, the best there is.

    Args:
        samples: what was recorded, best of prompts that the gates were not trained on.
        gates: by site.
        density: part of the blocks that is chosen.
    """
    found, levels = {}, levels_of(samples)
    for key, site in samples.items():
        calls = Calls.of(site, levels)
        width = calls.queries.shape[-1]
        means = calls.keys[..., -width:] * width**-0.5
        sizes = tokens_per_block(site.layout.length, site.block, site.columns.numel(), torch.device("cpu"))
        scores = {
            "gate": gate_logits(calls.queries, calls.keys, at_level(gates[key], calls.level)),
            "pooled": calls.queries @ means.transpose(-1, -2) + sizes[site.columns].log(),
            "mass": calls.share,
        }
        found[key] = {name: block_recall(score, calls.share, density) for name, score in scores.items()}
    return found


def _steps(
    gates: Mapping[SiteKey, GateWeights],
    calls: Mapping[SiteKey, Calls],
    training: GateTraining,
    generator: torch.Generator,
) -> Iterator[tuple[int, float]]:
    """Runs the optimizer, and gives each step and its loss."""
    parameters = [part for gate in gates.values() for part in gate]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, training.steps))
    for step in range(1, training.steps + 1):
        total = torch.zeros(())
        for key, gate in gates.items():
            count = calls[key].queries.shape[0]
            index = torch.randperm(count, generator=generator)[: training.batch]
            total = total + distillation_loss(gate, calls[key].pick(index))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rate.step()
        yield step, float(total.detach()) / len(gates)


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over the first steps, a tenth of all at most, then half a cosine down to 0; steps count from 0."""
    warm_up = max(1, min(WARM_UP, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
