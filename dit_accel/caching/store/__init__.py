"""Where computed values wait until they are reused, within a bound on memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..predictors.base import Kept, Place
from .budget import Demand, Estimate, StorePlan, make_plan, size_text
from .codec import Codec, Held, ValueSpec, decode, encode
from .transfer import Transfer

__all__ = ["Demand", "Estimate", "Store", "StorePlan", "ValueSpec"]


@dataclass(frozen=True)
class _Entry:
    """One :class:`Kept` as it is held."""

    place: Place
    value: Held
    probe: Held | None

    @property
    def held(self) -> tuple[Held, ...]:
        return (self.value,) if self.probe is None else (self.value, self.probe)


_Fetched = tuple[tuple[Tensor, "torch.cuda.Event | None"], ...]


class Store:
    """Keeps the newest computed values under keys; one for each cache of an acceleration.

    Call :meth:`plan` once the first value of a generation is known; it says how many values to keep and how. Without a
    plan values are kept as they are, where they are. Nothing here waits for the device.

    Whoever puts a value away gives it up with ``owned=True`` or has it copied. What :meth:`get` gives may be the kept
    tensor itself, so nobody may write into it: hand a copy to code that works in place.

    Args:
        max_bytes: bound on what is kept on the model's device (main memory if the model is there); None for none.
            Decoded values that a prediction is working on come on top.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        if max_bytes is not None and (isinstance(max_bytes, bool) or max_bytes < 1):
            raise ValueError(f"max_bytes is a positive number of bytes, or None for no bound; got {max_bytes!r}")
        self.max_bytes = max_bytes
        #: What gave way to the bound, and why: one line each, since the latest :meth:`plan`.
        self.downgrades: list[str] = []
        #: Most bytes that were kept at a time, in all and on the model's device.
        self.peak_bytes = 0
        self.peak_device_bytes = 0
        self._plan: StorePlan | None = None
        self._entries: dict[Hashable, list[_Entry]] = {}
        self._fetched: dict[int, tuple[Held, _Fetched]] = {}
        self._uses: Counter[int] = Counter()  # by id: how many values a held tensor belongs to
        self._bytes = self._device_bytes = self._fetched_bytes = 0
        self._latest_probe: tuple[ReferenceType[Tensor], ReferenceType[Held]] | None = None
        self._transfer = Transfer()

    def plan(self, demand: Demand) -> StorePlan:
        """Decides how values are kept from here on; what is kept already stays as it is.

        Raises:
            ValueError: if they cannot be kept within the bound, naming one that would do.
        """
        self._plan, self.downgrades = make_plan(demand, self.max_bytes)
        return self._plan

    def put(self, key: Hashable, kept: Kept, depth: int, *, owned: bool = False) -> bool:
        """Keeps a value in front of the older ones of its key, of which ``depth - 1`` stay.

        Args:
            key: any; such as ``(expert, branch, unit, stream)``.
            kept: value and place. A probe that several values share is kept once if they are put one after another.
            depth: how many values of that key to keep.
            owned: whether nobody else holds the value (nor a view of it), so that it need not be copied. The probe
                is always copied.

        Returns:
            whether it was kept. Where more comes than was planned and the bound would be exceeded, the value is
            not kept, those of its key are forgotten, so that it is computed next time, and :attr:`downgrades` says so.

        Raises:
            ValueError: if depth is below 1.
        """
        if depth < 1:
            raise ValueError(f"depth counts kept values, from 1; got {depth}")
        codec: Codec = self._plan.codec if self._plan is not None else "plain"
        entries = self._entries.setdefault(key, [])
        while len(entries) >= depth:
            self._release(entries.pop())
        entry = _Entry(kept.place, self._held(kept.value, codec, owned), self._held_probe(kept.probe, codec))
        entries.insert(0, entry)
        self._count(entry)
        if self.max_bytes is not None and self.device_bytes > self.max_bytes:
            note = f"{key} is not kept: with it {size_text(self.device_bytes)} would exceed max_bytes={self.max_bytes}"
            if note not in self.downgrades:
                self.downgrades.append(note)
            self.drop(key)
            return False
        self._note_peak()
        return True

    def get(self, key: Hashable) -> list[Kept]:
        """What is kept under a key, newest first; empty if nothing is. Nobody may write into these tensors.

        Where values are in main memory, those of the next key are on their way afterwards: units are skipped in the
        order in which they were first computed.
        """
        entries = self._entries.get(key, [])
        is_away = any(held.is_away for entry in entries for held in entry.held)
        found = [
            Kept(entry.place, self._tensor(entry.value), None if entry.probe is None else self._tensor(entry.probe))
            for entry in entries
        ]
        if is_away:
            keys = list(self._entries)
            self.prefetch(keys[(keys.index(key) + 1) % len(keys)])
        return found

    def prefetch(self, key: Hashable) -> None:
        """Starts to bring a key's values back from main memory, if they fit; :meth:`get` takes them."""
        held_here = _distinct(self._entries.get(key, []))
        away = [held for held in held_here if held.is_away and id(held) not in self._fetched]
        needed = sum(held.nbytes for held in away)
        if self.max_bytes is not None and self.device_bytes + needed > self.max_bytes:
            return
        for held in away:
            self._fetched[id(held)] = (held, tuple(self._transfer.to_device(part, held.home) for part in held.parts))
            self._fetched_bytes += held.nbytes
        self._note_peak()

    def drop(self, key: Hashable) -> None:
        """Forgets the values of a key, if there are any."""
        for entry in self._entries.pop(key, ()):
            self._release(entry)

    def clear(self) -> None:
        """Forgets all values and the plan; peaks and :attr:`downgrades` stay to be read."""
        for key in list(self._entries):
            self.drop(key)
        self._plan = self._latest_probe = None

    @property
    def bytes(self) -> int:
        """Bytes kept now, wherever they lie."""
        return self._bytes + self._fetched_bytes

    @property
    def device_bytes(self) -> int:
        """Those on the model's device: the ones that the bound is on."""
        return self._device_bytes + self._fetched_bytes

    def _count(self, entry: _Entry) -> None:
        for held in entry.held:
            self._uses[id(held)] += 1
            if self._uses[id(held)] == 1:
                self._bytes += held.nbytes
                self._device_bytes += 0 if held.is_away else held.nbytes

    def _release(self, entry: _Entry) -> None:
        """Takes an entry that is kept no longer off the count, and what was fetched for it."""
        for held in entry.held:
            self._uses[id(held)] -= 1
            if not self._uses[id(held)]:
                del self._uses[id(held)]
                self._bytes -= held.nbytes
                self._device_bytes -= 0 if held.is_away else held.nbytes
                self._take_fetched(held)

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def _held(self, value: Tensor, codec: Codec, owned: bool) -> Held:
        held = encode(value, codec)
        if self._plan is not None and self._plan.device.type == "cpu" and value.device.type != "cpu":
            return held.moved([self._transfer.to_host(part) for part in held.parts])
        is_whole = value.untyped_storage().nbytes() == value.numel() * value.itemsize  # else a view keeps more alive
        if codec == "plain" and not (owned and is_whole):
            return replace(held, data=held.data.clone())
        return held

    def _held_probe(self, probe: Tensor | None, codec: Codec) -> Held | None:
        if probe is None:
            return None
        if self._latest_probe is not None and self._latest_probe[0]() is probe:
            known = self._latest_probe[1]()
            if known is not None:
                return known
        held = self._held(probe, codec, owned=False)
        self._latest_probe = (ref(probe), ref(held))
        return held

    def _tensor(self, held: Held) -> Tensor:
        if not held.is_away:
            return decode(held)
        copies = self._take_fetched(held) or tuple(self._transfer.to_device(part, held.home) for part in held.parts)
        return decode(held.moved([self._transfer.wait(copy, event) for copy, event in copies]))

    def _take_fetched(self, held: Held) -> _Fetched:
        """The copies of a tensor that are on their way, which are then the caller's; empty if there are none."""
        if id(held) not in self._fetched:
            return ()
        self._fetched_bytes -= held.nbytes
        return self._fetched.pop(id(held))[1]


def _distinct(entries: Iterable[_Entry]) -> list[Held]:
    """Every held tensor once: a probe may belong to several values."""
    return list({id(held): held for entry in entries for held in entry.held}.values())
