"""K-means and the chain of clusters by their definitions, for the tokens of one head."""

from __future__ import annotations

import torch
from torch import Tensor


def start_of(x: Tensor, clusters: int) -> Tensor:
    """The middle tokens of as many equal parts."""
    return torch.stack([x[int((j + 0.5) * len(x) / clusters)] for j in range(clusters)])


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[list[int], Tensor]:
    """Labels and centroids of tokens `[N, D]`."""
    centroids = centroids.clone()
    labels: list[int] = []
    for _ in range(iterations):
        distances = [(centroids - token).square().sum(-1).tolist() for token in x]
        labels = [row.index(min(row)) for row in distances]
        for j in set(labels):
            centroids[j] = torch.stack([x[n] for n, label in enumerate(labels) if label == j]).mean(0)
    return labels, centroids


def chain_of(centroids: Tensor) -> list[int]:
    """Each cluster followed by the nearest one that is left, from cluster 0."""
    chain, left = [0], list(range(1, len(centroids)))
    while left:
        distances = [float((centroids[j] - centroids[chain[-1]]).norm()) for j in left]
        chain.append(left.pop(distances.index(min(distances))))
    return chain
