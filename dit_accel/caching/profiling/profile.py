"""What profiling or searching found about the blocks of a model, and its file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...files import staged
from .cost import blocks_of_budget

FORMAT = "dit-accel block profile, version 1"
METHODS = ("profile", "search")
HOW_TO_MAKE = "make one for this model with dit-accel profile-blocks --model MODEL --prompt TEXT -o blocks.json"


@dataclass(frozen=True)
class BlockProfile:
    """Blocks of a model, ranked by how little harm it does to skip them.

    Attributes:
        model: root class.
        config: hash of the root's configuration, see :func:`config_hash`.
        layers: number of blocks.
        method: ``"profile"`` (received attention on the foreground) or ``"search"`` (measured error).
        scores: of each block: enrichment of the foreground, where 1 is chance; or the error of skipping it alone. The
            blocks with the smallest come first.
        blocks: those chosen as background, ascending.
        by_expert: the scores of each expert, where there are several.
        settings: how it was made, as plain values.
    """

    model: str
    config: str
    layers: int
    method: str
    scores: tuple[float, ...]
    blocks: tuple[int, ...]
    by_expert: dict[str, tuple[float, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}; got {self.method!r}")
        if self.layers < 1 or len(self.scores) != self.layers:
            raise ValueError(f"{len(self.scores)} scores are not those of {self.layers} blocks")
        rising = sorted({block for block in self.blocks if isinstance(block, int)})
        if not rising or list(self.blocks) != rising or rising[0] < 0 or rising[-1] >= self.layers:
            raise ValueError(f"blocks are indices from 0 to {self.layers - 1}, ascending; got {list(self.blocks)}")

    @property
    def order(self) -> tuple[int, ...]:
        """All blocks, those to skip first at the start; the lower index first among equals."""
        return tuple(sorted(range(self.layers), key=lambda block: (self.scores[block], block)))

    def with_budget(self, budget: float) -> BlockProfile:
        """The same scores with another part of the blocks chosen; a set that was searched is replaced, too.

        Raises:
            ValueError: if the budget is not within (0, 1).
        """
        return self.with_count(blocks_of_budget(budget, self.layers))

    def with_count(self, count: int) -> BlockProfile:
        """Likewise, with a number of blocks.

        Raises:
            ValueError: if the model has not so many.
        """
        if not 1 <= count <= self.layers:
            raise ValueError(f"of {self.layers} blocks 1 to {self.layers} can be skipped; got {count}")
        return replace(self, blocks=tuple(sorted(self.order[:count])))

    def check(self, root: Any, layers: int) -> None:
        """Refuses a model that it was not made for.

        Args:
            root: the transformer.
            layers: number of its blocks.

        Raises:
            ValueError: if class, block count or configuration differ.
        """
        made_for = f"the profile is for a {self.model} of {self.layers} blocks"
        if all(base.__name__ != self.model for base in type(root).__mro__):
            raise ValueError(f"{made_for}, not for a {type(root).__name__}; {HOW_TO_MAKE}")
        if layers != self.layers:
            raise ValueError(f"{made_for}, and this one has {layers}; {HOW_TO_MAKE}")
        if config_hash(root) != self.config:
            raise ValueError(f"{made_for} with another configuration than this one; {HOW_TO_MAKE}")

    def save(self, target: str | Path) -> None:
        """Writes a JSON file, which appears whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=False)
        with staged(Path(target).expanduser()) as (scratch,):
            scratch.write_text(text + "\n", encoding="utf-8")


def load_profile(source: str | Path) -> BlockProfile:
    """Reads what :meth:`BlockProfile.save` wrote.

    Raises:
        ValueError: if there is no such file, or it holds no profile or a damaged one; the message says what to do.
    """
    path = Path(source).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no block profile '{path}'; {HOW_TO_MAKE}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read as a block profile: {error}; {HOW_TO_MAKE}") from error
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ValueError(f"'{path}' is no block profile of this version; {HOW_TO_MAKE}")
    try:
        return _parsed(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}; {HOW_TO_MAKE}") from error


def config_hash(root: Any) -> str:
    """16 hex digits of the SHA-256 of a model's configuration, without names and versions of its files."""
    config: Mapping[str, Any] = getattr(root, "config", None) or {}
    plain = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parsed(found: dict[str, Any]) -> BlockProfile:
    by_expert = {name: _numbers(scores) for name, scores in found.pop("by_expert").items()}
    scores, blocks = _numbers(found.pop("scores")), tuple(found.pop("blocks"))
    return BlockProfile(**found, scores=scores, blocks=blocks, by_expert=by_expert)


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("its scores are not all finite")
    return numbers
