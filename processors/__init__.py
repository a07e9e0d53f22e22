"""Attention methods, one file each: ``from dit_accel.processors import RadialAttnProcessor``."""

from __future__ import annotations

from typing import Any

from .adaspa import AdaSpaAttnProcessor
from .agent import AgentAttnProcessor
from .base import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor
from .block_routing import BlockRoutingAttnProcessor
from .cluster import ClusterAttnProcessor
from .compensated import CompensatedAttnProcessor
from .grid import GridAttnProcessor
from .learned_gate import LearnedGateAttnProcessor
from .neighborhood import NeighborhoodAttnProcessor
from .operator import OperatorAttnProcessor
from .radial import RadialAttnProcessor
from .vmoba import VMOBA_PRESETS, VMoBAAttnProcessor

ATTENTION: dict[str, type[SparseAttnProcessor]] = {
    "radial": RadialAttnProcessor,
    "adaspa": AdaSpaAttnProcessor,
    "neighborhood": NeighborhoodAttnProcessor,
    "block_routing": BlockRoutingAttnProcessor,
    "compensated": CompensatedAttnProcessor,
    "cluster": ClusterAttnProcessor,
    "vmoba": VMoBAAttnProcessor,
    "agent": AgentAttnProcessor,
    "grid": GridAttnProcessor,
    "learned_gate": LearnedGateAttnProcessor,
}


def processor_by_name(name: str, **settings: Any) -> SparseAttnProcessor:
    """Builds a method by its short name, as ``accelerate(pipe, attention="radial")`` does.

    Raises:
        ValueError: for an unknown name or setting, or a setting out of range.
    """
    if name not in ATTENTION:
        raise ValueError(f"unknown attention method {name!r}; choose one of {', '.join(ATTENTION)}")
    try:
        return ATTENTION[name](**settings)
    except TypeError as error:
        raise ValueError(f"attention method {name!r}: {str(error).split('()', 1)[-1].strip()}") from error


__all__ = [
    "ATTENTION",
    "VMOBA_PRESETS",
    "AdaSpaAttnProcessor",
    "AgentAttnProcessor",
    "BlockRoutingAttnProcessor",
    "ClusterAttnProcessor",
    "CompensatedAttnProcessor",
    "DynamicAttnProcessor",
    "GridAttnProcessor",
    "LearnedGateAttnProcessor",
    "NeighborhoodAttnProcessor",
    "OperatorAttnProcessor",
    "RadialAttnProcessor",
    "SparseAttnProcessor",
    "StaticAttnProcessor",
    "VMoBAAttnProcessor",
    "processor_by_name",
]
