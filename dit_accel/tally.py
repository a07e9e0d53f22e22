"""Counts what the attention modules did, for the report."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .densities import StepDensities
from .report import SiteReport

if TYPE_CHECKING:
    from .clock import StepState
    from .install import Site


class Tally:
    """The calls of every site since installation, and what fell back.

    Attributes:
        fallbacks: site path to reason, for calls that should have been sparse and ran dense.
        densities: of the latest generation, call by call of the model.
    """

    def __init__(self) -> None:
        self.fallbacks: dict[str, str] = {}
        self.densities = StepDensities()
        self._sites: dict[Site, SiteReport] = {}
        self._unread: dict[Site, torch.Tensor] = {}  # what has yet to be added to `kept`, still on the device

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __len__(self) -> int:
        return len(self._sites)

    def add(self, site: Site) -> None:
        """Counts the calls of a site from now on."""
        self._sites[site] = SiteReport(f"{site.info.expert}:{site.info.path}", site.info.kind)

    def count(self, site: Site, state: StepState) -> None:
        """Takes note of the call that has just ended; of sites that were not added, of nothing."""
        tally = self._sites.get(site)
        if tally is None:
            return
        density = site.settle(state)
        if density is None and site.is_unused:
            return  # a hook stood in for its block, or guidance leaves the layer out
        self.densities.count(state, 1.0 if density is None else density)
        if density is None:
            tally.dense_calls += 1
            tally.kept += 1.0
        else:
            tally.sparse_calls += 1
            self._keep(site, tally, density)
        if site.refusal is not None:
            self._note_refusal(tally.path, site.refusal)
            site.refusal = None

    def read(self) -> list[SiteReport]:
        """A copy of all counts; waits for the device if densities are on it."""
        for site, kept in self._unread.items():
            self._sites[site].kept += float(kept)
        self._unread.clear()
        return [replace(tally) for tally in self._sites.values()]

    def reset(self) -> None:
        """Starts counting anew."""
        for tally in self._sites.values():
            tally.sparse_calls, tally.dense_calls, tally.kept = 0, 0, 0.0
        self._unread.clear()
        self.fallbacks.clear()
        self.densities.reset()

    def _keep(self, site: Site, tally: SiteReport, density: float | torch.Tensor) -> None:
        if isinstance(density, torch.Tensor):
            before = self._unread.get(site)
            self._unread[site] = density if before is None else before.to(density.device) + density
        else:
            tally.kept += density

    def _note_refusal(self, path: str, reason: str) -> None:
        if path not in self.fallbacks:
            warnings.warn(f"dit_accel: {path} runs dense: {reason}", stacklevel=2)
        self.fallbacks[path] = reason


def sparse_density(sites: list[SiteReport]) -> float | None:
    """Kept share of (query, key) pairs over the sparse calls; None if there were none."""
    sparse, dense = sum(site.sparse_calls for site in sites), sum(site.dense_calls for site in sites)
    return (sum(site.kept for site in sites) - dense) / sparse if sparse else None
