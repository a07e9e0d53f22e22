"""MagCache (arXiv 2506.09045)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..limits import Limits
from ..policies.magnitude import Magnitude
from ..recipe import Cache
from ..scopes.blocks import Whole
from .models import published_for
from .ratios import MAGCACHE


def magcache(
    root: nn.Module | None = None,
    *,
    model: str | None = None,
    ratios: Sequence[float] | None = None,
    threshold: float | None = None,
    max_skips: int | None = None,
    retention: int | float | None = None,
) -> Cache:
    """Skips all blocks while calibrated ratios say that their residual keeps its size.

    Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045. The residual of all
    blocks is reused.

    Args:
        root: the model, which chooses the published settings.
        model: name of a model whose settings are taken instead (:data:`.ratios.MAGCACHE`).
        ratios: of a calibration of one's own, one for each of its steps
            (:class:`dit_accel.caching.magnitudes.MagnitudeRecorder`). Another scheduler, shift or guidance wants one.
        threshold: on the summed error of size; larger reuses more. Published: FLUX.1 0.24, Wan 2.1 0.12 and 0.24; for
            ratios of one's own 0.06, as in diffusers.
        max_skips: steps in a row that may be skipped. Published: 2 to 6; for ratios of one's own 3.
        retention: first steps that are computed, or their share. Published: 0.1 to 0.4; for ratios of one's own 0.2.

    Raises:
        ValueError: if nothing was published for the model, naming the models there are.
    """
    always: tuple[int, ...] = ()
    if ratios is not None:
        settings = (0.06, 3, 0.2)
    else:
        row = published_for(MAGCACHE, root, model, "MagCache ratios", "calibrate: MagnitudeRecorder makes ratios=")
        ratios, always, settings = row.ratios, row.always, (row.threshold, row.max_skips, row.retention)
    policy = Magnitude(
        tuple(ratios),
        settings[0] if threshold is None else threshold,
        settings[1] if max_skips is None else max_skips,
        always,
    )
    limits = Limits(warmup=settings[2] if retention is None else retention)
    return Cache(Whole(), policy, limits=limits, name="magcache")
