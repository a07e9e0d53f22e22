"""What skipping blocks saves, by counting: blocks cost the same, and everything outside them nothing."""

from __future__ import annotations

import math


def cost(layers: int, skipped: int, steps: int, computed: int) -> float:
    """Blocks that run, over those of dense sampling: ``(S_full L + S_reuse (L - |B|)) / (N L)`` (arXiv 2504.03140).

    Args:
        layers: blocks of the model, L.
        skipped: blocks that are skipped at a reusing step, ``|B|``.
        steps: sampling steps, N.
        computed: steps that run all blocks, ``S_full``.

    Raises:
        ValueError: for numbers that do not fit each other.
    """
    if layers < 1 or not 0 <= skipped <= layers:
        raise ValueError(f"of {layers} blocks 0 to {layers} can be skipped; got {skipped}")
    if steps < 1 or not 0 <= computed <= steps:
        raise ValueError(f"of {steps} steps 0 to {steps} can be computed in full; got {computed}")
    return 1 - (steps - computed) * skipped / (steps * layers)


def predicted_speedup(layers: int, skipped: int, steps: int, computed: int) -> float:
    """One over :func:`cost`; what is measured is less, since text encoding, embeddings and decoding stay."""
    share = cost(layers, skipped, steps, computed)
    if share == 0:
        raise ValueError("no step computes anything; the first one has to")
    return 1 / share


def blocks_for(speedup: float, layers: int, steps: int, computed: int) -> int:
    """The fewest blocks whose skipping is predicted to give a speed-up.

    Raises:
        ValueError: if it is below 1, or not reached even if all blocks are skipped.
    """
    most = predicted_speedup(layers, layers, steps, computed)
    if not 1 < speedup <= most * (1 + 1e-9):
        raise ValueError(
            f"with {computed} of {steps} steps computed in full the speed-up is above 1 and at most {most:.4g}; got "
            f"{speedup}; for more, compute fewer steps"
        )
    exact = (1 - 1 / speedup) * steps * layers / (steps - computed)
    return min(layers, math.ceil(exact - 1e-9))


def blocks_of_budget(budget: float, layers: int) -> int:
    """How many blocks a part of all blocks is: rounded, at least 1, and never all of them.

    Raises:
        ValueError: if the part is not within (0, 1), or the model has a single block.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
        raise ValueError(
            f"budget is the part of all blocks that may be skipped, in (0, 1), such as 0.7; got {budget!r}"
        )
    if layers < 2:
        raise ValueError("a model of one block has no foreground blocks beside it; skip the whole with another preset")
    return min(layers - 1, max(1, math.floor(budget * layers + 0.5)))
