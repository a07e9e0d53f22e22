"""K-means for every head at once: tokens that are close to each other get the same label.

Lloyd's algorithm with Euclidean distances, a fixed number of rounds and no random numbers: centroids start at tokens
that are evenly spaced along the sequence, or where an earlier call left them.  So equal tokens give equal clusters,
and nothing waits for the device.  Sparse VideoGen 2 (arXiv 2505.18875) clusters queries and keys of a video so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..permute import inverse_order

# Distances held in memory at a time, in bytes.
_STRIP_BYTES = {"cpu": 8 << 20, "other": 256 << 20}


class Clusters(NamedTuple):
    """Tokens grouped by their nearest centroid.

    Attributes:
        labels: int64 `[B, H, N]`, the cluster of each token.
        centroids: float32 `[B, H, C, D]`, mean of each cluster's tokens; an empty cluster keeps the one it had.
        sizes: int64 `[B, H, C]`, tokens of each cluster.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor


def kmeans(x: Tensor, start: int | Tensor, iterations: int) -> Clusters:
    """Clusters the tokens of each batch item and head by themselves.

    Of equally near centroids a token takes the first, so repeated tokens leave clusters empty rather than split.

    Args:
        x: `[B, H, N, D]`, any floating dtype and strides.
        start: Number of clusters, at most N, or the centroids to start from, float32 `[B, H, C, D]`.
        iterations: Rounds of assignment and averaging, at least 1.

    Returns:
        The labels of the last assignment, and the means over them.

    Raises:
        ValueError: A number out of range, or centroids that do not fit to x.
    """
    _check(x, start, iterations)
    centroids = evenly_spaced(x, start) if isinstance(start, int) else start
    for _ in range(iterations):
        labels, sums, sizes = _assign(x, centroids)
        means = sums / sizes.clamp(min=1)[..., None]
        centroids = torch.where(sizes[..., None] > 0, means, centroids)
    return Clusters(labels, centroids, sizes.long())


def evenly_spaced(x: Tensor, clusters: int) -> Tensor:
    """The tokens in the middle of `clusters` equal parts of the sequence, float32 `[B, H, clusters, D]`."""
    tokens = x.shape[2]
    places = (2 * torch.arange(clusters, device=x.device) + 1) * tokens // (2 * clusters)
    return x.index_select(2, places).float()


def chained(clusters: Clusters) -> Clusters:
    """Numbers clusters anew, along a chain in which each is followed by the nearest one that is left.

    A block that holds the end of one cluster and the beginning of the next then holds similar tokens.  The chain
    starts at cluster 0 and takes one step after the other, so do it once and keep the centroids in that order.
    """
    centroids = clusters.centroids
    # Finite even where tokens are not, so that none of those left ties with one that is taken.
    distances = torch.cdist(centroids, centroids).nan_to_num_()
    taken = torch.zeros_like(centroids[..., 0])
    here = torch.zeros_like(clusters.sizes[..., :1])
    chain = [here]
    for _ in range(centroids.shape[2] - 1):
        taken.scatter_(-1, here, float("inf"))
        from_here = distances.gather(2, here[..., None].expand(-1, -1, -1, distances.shape[3]))[:, :, 0]
        here = (from_here + taken).argmin(-1, keepdim=True)
        chain.append(here)
    order = torch.cat(chain, -1)
    moved = centroids.gather(2, order[..., None].expand_as(centroids))
    return Clusters(inverse_order(order).gather(-1, clusters.labels), moved, clusters.sizes.gather(-1, order))


def _assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `[B, H, N]`, and per cluster the sum `[B, H, C, D]` and the number `[B, H, C]` of its tokens."""
    # |x - c|^2 without |x|^2, which is the same for all c, and halved.
    offset = centroids.square().sum(-1)[..., None, :] / 2
    sums, sizes = torch.zeros_like(centroids), torch.zeros_like(centroids[..., 0])
    row_bytes = 4 * centroids.shape[0] * centroids.shape[1] * centroids.shape[2]
    step = max(1, _STRIP_BYTES["cpu" if x.device.type == "cpu" else "other"] // row_bytes)
    labels = []
    for part in x.split(step, 2):
        tokens = part.float()
        nearest = (offset - tokens @ centroids.transpose(-1, -2)).argmin(-1)
        # Added up by a product rather than by atomics, whose order may differ from run to run.
        member = torch.zeros(*nearest.shape, centroids.shape[2], dtype=torch.float32, device=x.device)
        member.scatter_(-1, nearest[..., None], 1.0)
        sums += member.transpose(-1, -2) @ tokens
        sizes += member.sum(2)
        labels.append(nearest)
    return torch.cat(labels, 2), sums, sizes


def _check(x: Tensor, start: int | Tensor, iterations: int) -> None:
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floating [batch, heads, tokens, dim], none of them 0; got {tuple(x.shape)}.")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    if isinstance(start, int):
        if not 1 <= start <= x.shape[2]:
            raise ValueError(f"{x.shape[2]} tokens make 1 to {x.shape[2]} clusters, not {start}.")
        return
    fits = start.ndim == 4 and start.shape[:2] == x.shape[:2] and start.shape[3] == x.shape[3]
    if not fits or start.dtype != torch.float32 or start.device != x.device:
        raise ValueError(
            f"Centroids for x {tuple(x.shape)} must be float32 [batch, heads, clusters, dim] on {x.device}; got "
            f"{start.dtype} of {tuple(start.shape)} on {start.device}."
        )
