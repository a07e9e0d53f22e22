"""TeaCache (arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..limits import Limits
from ..policies.polynomial import Polynomial
from ..recipe import Cache
from ..scopes.blocks import Whole
from .coefficients import TEACACHE
from .models import published_for


def teacache(
    root: nn.Module | None = None,
    *,
    model: str | None = None,
    threshold: float | None = None,
    coefficients: Sequence[float] | None = None,
    signal: str = "default",
    warmup: int | float | None = None,
    cooldown: int | float | None = None,
) -> Cache:
    """Skips all blocks while a polynomial of the change of the modulated input, summed over steps, stays small.

    Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108. The
    residual of all blocks is reused.

    Args:
        root: the model, which chooses the published settings.
        model: name of a model whose settings are taken instead (:data:`.coefficients.TEACACHE`).
        threshold: larger reuses more; published: FLUX.1 0.6, HunyuanVideo 0.15, Wan 2.1 T2V 1.3B 0.08 and so on, for
            about twice the speed.
        coefficients: of a polynomial of one's own, highest power first; then ``threshold`` is needed as well.
        signal: which modulated input; Wan also has ``"projection"``, with coefficients of its own.
        warmup: first steps that are computed; published: 1, or 5 for ``"projection"``.
        cooldown: last steps that are computed; published: 1, or 0 for ``"projection"``.

    Raises:
        ValueError: if nothing was published for the model, naming the models there are.
    """
    if coefficients is not None:
        if threshold is None:
            raise ValueError("coefficients of one's own need a threshold of their own, too; try 0.1 first")
        first, last = 1 if warmup is None else warmup, 1 if cooldown is None else cooldown
        policy = Polynomial(tuple(coefficients), threshold, signal)
    else:
        rows = [row for row in TEACACHE if row.signal == signal]
        if not rows:
            known = ", ".join(repr(each) for each in sorted({row.signal for row in TEACACHE}))
            raise ValueError(f"no TeaCache coefficients were published for the signal {signal!r}; there are {known}")
        row = published_for(rows, root, model, "TeaCache coefficients", "give coefficients= and threshold=")
        first, last = row.warmup if warmup is None else warmup, row.cooldown if cooldown is None else cooldown
        policy = Polynomial(row.coefficients, row.threshold if threshold is None else threshold, signal)
    return Cache(Whole(), policy, limits=Limits(warmup=first, cooldown=last), name="teacache")
