"""How much more often than by chance the tokens a block attends to most are foreground."""

from __future__ import annotations

import torch
from torch import Tensor


def enrichment(scores: Tensor, mask: Tensor) -> Tensor:
    """Enrichment ``E = R / rho`` of each frame.

    With ``rho = |fg| / N`` the part of the frame that is foreground, the threshold is the ``1 - rho`` quantile of the
    scores, so as many tokens lie above it as are foreground; ``R = |above and fg| / |fg|`` is rho by chance,
    and E is 1. Where scores at the threshold are equal, each of them is above it in part, so that equal scores give 1.

    Args:
        scores: ``[..., tokens]``, received attention of the tokens of a frame.
        mask: bool of the same shape, True where the foreground is.

    Returns:
        ``[...]`` float32, from 0 to ``1 / rho``; NaN for frames that are all foreground or have none.
    """
    size = mask.sum(-1)
    falling = scores.sort(-1, descending=True).values
    threshold = falling.gather(-1, (size - 1).clamp_min(0).unsqueeze(-1))
    above, level = scores > threshold, scores == threshold
    part = (size - above.sum(-1)) / level.sum(-1)
    both = (above & mask).sum(-1) + part * (level & mask).sum(-1)
    found = both / size.clamp_min(1) / (size / mask.shape[-1]).clamp_min(1e-12)
    is_useless = (size == 0) | (size == mask.shape[-1])
    return found.float().masked_fill(is_useless, torch.nan)
