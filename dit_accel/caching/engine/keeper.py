"""Keeps the values of units between calls, and predicts those that are skipped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..policies.measure import generated_part
from ..predictors.base import Kept, Place
from ..store import Demand, Store

if TYPE_CHECKING:
    from ...clock import StepClock
    from ..policies.base import Judge
    from ..predictors.base import Predictor
    from ..recipe import Cache
    from ..record import CacheRecord
    from ..unit import Unit
    from .track import OpenCall

Streams = tuple[Tensor | None, ...]
_Key = tuple[str, str, str]  # expert, branch, unit


@dataclass(frozen=True)
class _Form:
    """What a unit's value looks like.

    Attributes:
        present: which of its streams are tensors.
        rows: batch of the first of them.
        others: the leaves that are none, by place.
        spec: how to put leaves together, for outputs of modules and of the root.
    """

    present: tuple[bool, ...]
    rows: int = 0
    others: tuple[Any, ...] = ()
    spec: Any = None


class Keeper:
    """The values of one cache, under (expert, branch, unit).

    Args:
        cache: the recipe.
        clock: tells noise levels.
        record: takes note of memory.
    """

    def __init__(self, cache: Cache, clock: StepClock, record: CacheRecord) -> None:
        self._cache, self._clock, self._record = cache, clock, record
        self._store = Store(cache.max_bytes)
        self._forms: dict[_Key, _Form] = {}
        self._predictor: Predictor = cache.predictor
        self._planned: tuple[int, int] | None = None  # generation, branches
        self._judge_bytes = 0
        self.unit_counts: dict[str, int] = {}  # by expert

    def has(self, call: OpenCall) -> bool:
        """Whether anything is kept for the branch of a call."""
        state = call.state
        return any(key[:2] == (state.expert, state.branch) for key in self._forms)

    def has_unit(self, call: OpenCall, unit: Unit) -> bool:
        """Whether the value of a unit is kept for the branch of a call."""
        return _key(call, unit) in self._forms

    def rows(self, call: OpenCall, unit: Unit) -> int:
        """Batch of what is kept of a unit; 0 if nothing is."""
        form = self._forms.get(_key(call, unit))
        return 0 if form is None else form.rows

    def keep(self, call: OpenCall, unit: Unit, values: Streams, *, spec: Any = None, owned: bool = True) -> None:
        """Keeps what was computed.

        Args:
            call: the call it was computed in.
            unit: which unit.
            values: one tensor for each stream or leaf, kept without its graph; what is no tensor is kept as it is.
            spec: how leaves are put together again; None for streams.
            owned: whether nobody else holds the tensors.
        """
        values = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
        tensors = [value for value in values if isinstance(value, Tensor)]
        self._plan(call, tensors)
        key = _key(call, unit)
        present = tuple(isinstance(value, Tensor) for value in values)
        others = tuple(None if isinstance(value, Tensor) else value for value in values)
        probe = call.probe if self._predictor.needs_probe else None
        rows = next((len(value) for value in tensors if value.ndim), 0)
        if self.rows(call, unit) != rows and not self._predictor.any_rows:
            self._drop(key)  # only one branch of a batch was run
        ok = True
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                kept = Kept(self._place(call), value, probe)
                ok &= self._store.put((*key, place), kept, self._predictor.depth, owned=owned)
        if ok:
            self._forms[key] = _Form(present, rows, others, spec)
        else:  # of a part of its streams nobody could make a whole
            self._forms.pop(key, None)
            for place in range(len(values)):
                self._store.drop((*key, place))
            self._record.downgrades[:] = self._store.downgrades
        self._note_bytes()

    def predict(self, call: OpenCall, unit: Unit) -> Streams:
        """The value of a unit that is skipped, stream by stream; nobody may write into it."""
        key, at = _key(call, unit), self._place(call)
        if self._predictor.needs_pairs:
            at = replace(at, paired=call.is_paired(self._clock.is_guided()))
        form = self._forms[key]
        return tuple(
            self._predictor.predict(self._store.get((*key, place)), at, call.probe) if here else form.others[place]
            for place, here in enumerate(form.present)
        )

    def keep_tree(self, call: OpenCall, unit: Unit, output: Any) -> None:
        """Keeps a copy of what a module gave: any nest of tensors."""
        leaves, spec = pytree.tree_flatten(output)
        self.keep(call, unit, tuple(leaves), spec=spec, owned=False)

    def predicted_tree(self, call: OpenCall, unit: Unit) -> Any:
        """What a skipped module would give; tensors of the caller's own, since a model may write into them."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.predict(call, unit)]
        return pytree.tree_unflatten(leaves, self._forms[_key(call, unit)].spec)

    def keep_output(self, call: OpenCall, unit: Unit, output: Any, residual: bool) -> None:
        """Keeps what the root gave, less its latents if ``residual`` and if the shapes allow it."""
        leaves, spec = pytree.tree_flatten(output)
        base = [latents_like(leaf, call.latents) if residual else None for leaf in leaves]
        values = tuple(leaf if part is None else leaf - part for leaf, part in zip(leaves, base, strict=True))
        self.keep(call, unit, values, spec=spec, owned=False)

    def predicted_output(self, call: OpenCall, unit: Unit, residual: bool) -> Any:
        """What the root would give."""
        leaves = []
        for leaf in self.predict(call, unit):
            if isinstance(leaf, Tensor):
                part = latents_like(leaf, call.latents) if residual else None
                leaf = leaf.clone() if part is None else leaf + part
            leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self._forms[_key(call, unit)].spec)

    def drop(self, expert: str, branch: str) -> None:
        """Forgets one branch."""
        for key in [key for key in self._forms if key[:2] == (expert, branch)]:
            self._drop(key)
        self._note_bytes()

    def drop_unit(self, call: OpenCall, unit: Unit) -> None:
        """Forgets one unit of the branch of a call."""
        if self.has_unit(call, unit):
            self._drop(_key(call, unit))
            self._note_bytes()

    def clear(self) -> None:
        """Forgets everything."""
        self._forms.clear()
        self._store.clear()
        self._planned = None
        self._note_bytes()

    def count_judges(self, judges: Iterable[Judge]) -> None:
        """Takes note of what policies keep to compare with; the bound on memory is not on it."""
        self._judge_bytes = sum(judge.kept_bytes for judge in judges)
        self._note_bytes()

    def _note_bytes(self) -> None:
        self._record.keep(self._store.bytes + self._judge_bytes)

    def _drop(self, key: _Key) -> None:
        form = self._forms.pop(key, None)
        for place in range(len(form.present) if form is not None else 0):
            self._store.drop((*key, place))

    def _plan(self, call: OpenCall, tensors: list[Tensor]) -> None:
        """Asks the store how to keep values, when a generation begins and when another branch joins it."""
        state = call.state
        branches = {key[:2] for key in self._forms} | {(state.expert, state.branch)}
        generation, most = self._planned or (None, 0)
        if not tensors or (generation == state.generation and len(branches) <= most):
            return
        self._planned = (state.generation, len(branches))
        units, probe = self.unit_counts.get(state.expert, 1), call.probe
        demand = Demand.of(tuple(tensors), self._cache.predictor, units, len(branches), probe)
        self._predictor = self._store.plan(demand).predictor
        self._record.estimate = str(demand.estimate())
        self._record.downgrades[:] = self._store.downgrades

    def _place(self, call: OpenCall) -> Place:
        state, level = call.state, self._clock.level(call.state.step)
        return Place(state.step, level.sigma, state.steps, flow=level.flow)


def latents_like(output: Any, latents: Tensor) -> Tensor | None:
    """The part of the latents that has the shape of an output; None if there is none."""
    return generated_part(latents, output.shape) if isinstance(output, Tensor) else None


def _key(call: OpenCall, unit: Unit) -> _Key:
    return call.state.expert, call.state.branch, unit.key
