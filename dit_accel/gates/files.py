"""Block gates of a model, in one safetensors file that says what they fit and how they were trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import staged
from ..kernels.gate.gate import EMBEDDING, GateWeights

if TYPE_CHECKING:
    from ..controls import SiteInfo

FORMAT = "dit-accel block gates, version 1"
CONDITIONING = "timestep"  # over its largest value, see `Gates.levels`
SHIPPED = {"shapes-wan": Path(__file__).parent / "weights" / "shapes-wan.safetensors"}
HOW_TO_TRAIN = (
    "train gates for this model with dit-accel train-gate --model MODEL --prompt-file prompts.txt --out "
    "gates.safetensors"
)
_PARTS = GateWeights._fields


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of one model.

    Attributes:
        family: root class of the model.
        layers: number of attention sites of each kind that have gates, such as ``{"self": 6}``.
        block: tokens per block.
        levels: the timestep at which there is nothing but noise; a timestep over this is the noise level.
        sites: gate of each attention module by ``"expert:path"``, such as ``"transformer:blocks.0.attn1"``.
        training: how they were trained, as plain values: prompts, steps, loss, recall.
    """

    family: str
    layers: dict[str, int]
    block: int
    levels: float
    sites: dict[str, GateWeights]
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def d_gate(self) -> int:
        """Channels in which queries and keys are compared."""
        return next(iter(self.sites.values())).query.shape[-1]

    def gate_of(self, site: SiteInfo) -> GateWeights:
        """The gate of one attention module.

        A bare transformer is taken for the only expert that the gates are of.

        Raises:
            ValueError: if the model of the module is not the one the gates were trained on.
        """
        found = self.sites.get(f"{site.expert}:{site.path}")
        experts = {name.partition(":")[0] for name in self.sites}
        if found is None and site.expert == "model" and len(experts) == 1:
            found = self.sites.get(f"{experts.pop()}:{site.path}")
        if found is None or self.layers.get(site.kind) != site.layers:
            raise ValueError(
                f"these gates are for {self._made_for()}; this model has {site.layers} sites of kind {site.kind}, and "
                f"{site.expert}:{site.path} among them; {HOW_TO_TRAIN}"
            )
        return found

    def check_heads(self, site: SiteInfo, heads: int, head_dim: int) -> None:
        """Refuses a module that has no gate, or other heads than its gate: more or fewer, wider or narrower.

        Raises:
            ValueError: if it is so.
        """
        gate = self.gate_of(site)
        if (gate.heads, gate.head_dim) != (heads, head_dim):
            raise ValueError(
                f"the gate of {site.path} is for {gate.heads} heads of {gate.head_dim} channels, this model has "
                f"{heads} of {head_dim} there; {HOW_TO_TRAIN}"
            )

    def check_family(self, root_class: str) -> None:
        """Refuses models of another class.

        Raises:
            ValueError: if the root class is not that of the gates.
        """
        if root_class != self.family:
            raise ValueError(f"these gates are for {self._made_for()}, not for a {root_class}; {HOW_TO_TRAIN}")

    def _made_for(self) -> str:
        sites = " and ".join(f"{count} of kind {kind}" for kind, count in self.layers.items())
        return f"a {self.family} with {sites} attention sites"


def save_gates(gates: Gates, target: Path) -> None:
    """Writes a file, in 16 bits; it appears whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        f"{name}.{part}": getattr(gate, part).half().contiguous().cpu()
        for name, gate in gates.sites.items()
        for part in _PARTS
    }
    heads = {name: [gate.heads, gate.head_dim] for name, gate in gates.sites.items()}
    facts = {"family": gates.family, "layers": gates.layers, "heads_and_head_dim": heads, "block": gates.block}
    facts |= {"d_gate": gates.d_gate, "conditioning": CONDITIONING, "levels": gates.levels, "training": gates.training}
    metadata = {"format": FORMAT} | {name: json.dumps(value) for name, value in facts.items()}
    with staged(target) as (scratch,):
        scratch.write_bytes(save(tensors, metadata))  # save_file would give it rights of its own


def load_gates(source: str | Path) -> Gates:
    """Reads the gates of a shipped model, or a file.

    Args:
        source: ``"shapes-wan"``, or the path of a file that ``dit-accel train-gate`` wrote.

    Raises:
        ValueError: if there is no such file, or it holds no gates, or damaged ones; the message says what to do.
    """
    path = SHIPPED.get(str(source), Path(source).expanduser())
    if not path.is_file():
        raise ValueError(
            f"no gates at '{source}'; give {' or '.join(map(repr, SHIPPED))} or a file of gates, or {HOW_TO_TRAIN}"
        )
    try:
        tensors, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        return _gates(tensors, {name: json.loads(text) for name, text in metadata.items() if name != "format"})
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read gates from '{path}': {reason}; {HOW_TO_TRAIN}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _gates(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Gates:
    missing = {"family", "layers", "heads_and_head_dim", "block", "d_gate", "conditioning", "levels"} - set(facts)
    if missing:
        raise ValueError(f"it does not say its {', '.join(sorted(missing))}")
    if facts["conditioning"] != CONDITIONING:
        raise ValueError(f"its gates are conditioned on {facts['conditioning']!r}, not on the {CONDITIONING}")
    sites = {}
    for name, (heads, head_dim) in facts["heads_and_head_dim"].items():
        gate = GateWeights(*(tensors.pop(f"{name}.{part}") for part in _PARTS))
        _check_shapes(name, gate, heads, head_dim, facts["d_gate"])
        sites[name] = gate
    if tensors or not sites:
        raise ValueError(f"its tensors are not those of its sites: {sorted(tensors) or 'none'}")
    given = (facts["family"], facts["layers"], facts["block"], facts["levels"])
    return Gates(*given, sites=sites, training=facts.get("training", {}))


def _check_shapes(name: str, gate: GateWeights, heads: int, head_dim: int, d_gate: int) -> None:
    wanted = ((heads, head_dim, d_gate), (heads, 3 * head_dim, d_gate), (heads, EMBEDDING, 2 * d_gate))
    if tuple(tuple(part.shape) for part in gate) != wanted:
        raise ValueError(f"{name} has weights of shapes {[tuple(part.shape) for part in gate]}, not {list(wanted)}")
    if not all(bool(torch.isfinite(part).all()) for part in gate):
        raise ValueError(f"{name} has weights that are not finite")
