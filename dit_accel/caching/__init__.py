"""Feature caching: parts of a model are skipped at some steps, and what they would have given is predicted.

A :class:`Cache` is a scope (what is skipped), a policy (when), a predictor (what stands in for it) and limits.
:mod:`dit_accel.caching.presets` has the methods of the papers::

    dit_accel.accelerate(pipe, cache="teacache", cache_settings={"threshold": 0.1})
    dit_accel.accelerate(pipe, attention="radial", cache=Cache(Whole(), ProbeDiff(0.08, blocks=1)))
"""

from .limits import Limits
from .recipe import Audit, Cache
from .together import Anchor
from .unit import Unit

__all__ = ["Anchor", "Audit", "Cache", "Limits", "Unit"]
