"""Whether a branch that nobody names still has the prompt of its last call."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: How many numbers of a prompt are kept on the device.
_MOST = 64


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What tells the embeddings of one prompt from those of another; compare with :meth:`same_as`.

    It holds a weak reference to the memory of the tensor and never its address alone: addresses are recycled, so that
    the next prompt may well lie where the last one lay. The tensor itself is not kept alive.

    Attributes:
        memory: the storage of the tensor, while it lives.
        layout: how the tensor lies in it: offset, shape, strides, dtype, device.
        version: counts writes into it; None for tensors of inference mode, which have no such counter.
        sample: at most 64 numbers, on its device.
        parts: fingerprints of the tensors in a list or mapping of them; None for a single tensor or none.
    """

    memory: ReferenceType[torch.UntypedStorage] | None = None
    layout: tuple[object, ...] = ()
    version: int | None = None
    sample: Tensor | None = None
    parts: tuple[Fingerprint, ...] | None = None

    @classmethod
    def of(cls, prompt: Any) -> Fingerprint:
        """Takes the fingerprint; does not wait for the device.

        Args:
            prompt: ``encoder_hidden_states`` ``[batch, tokens, channels]`` or ``pooled_projections`` ``[batch,
                channels]``; a list or mapping with such tensors; None where the model is given none, which is the same
                as None only. What holds no tensor at all is never the same.
        """
        if prompt is None:
            return cls()
        if not isinstance(prompt, Tensor):
            return cls(parts=tuple(cls.of(leaf) for leaf in tree_leaves(prompt) if isinstance(leaf, Tensor)))
        layout = (prompt.storage_offset(), prompt.shape, prompt.stride(), prompt.dtype, prompt.device)
        version = None if prompt.is_inference() else prompt._version
        return cls(ref(prompt.untyped_storage()), layout, version, _sample(prompt.detach()))

    def same_as(self, other: Fingerprint) -> bool:
        """Whether both are of the same prompt.

        The same memory without a write in between is the same prompt. Else the samples are compared, which waits for
        the device once. NaN in a prompt makes it differ from every other memory.
        """
        if self.parts is not None or other.parts is not None:
            pairs = list(zip_longest(self.parts or (), other.parts or (), fillvalue=Fingerprint()))
            return bool(pairs) and all(mine.same_as(others) for mine, others in pairs)
        if self.sample is None or other.sample is None:
            return self.sample is other.sample
        if self._is_untouched(other):
            return True
        mine, others = self.sample, other.sample
        fits = (self.layout[1], *self.layout[3:]) == (other.layout[1], *other.layout[3:])
        return fits and torch.equal(mine, others)

    def _is_untouched(self, other: Fingerprint) -> bool:
        """Whether both are of one living memory, at the same place in it, with no write in between."""
        if self.memory is None or other.memory is None or self.version is None:
            return False
        memory = self.memory()
        is_shared = memory is not None and memory is other.memory()
        return is_shared and self.layout == other.layout and self.version == other.version


def _sample(prompt: Tensor) -> Tensor:
    """Channels summed over tokens, thinned out evenly: no token and no row of a batch goes unseen, padding or not."""
    summed = prompt.sum(-2, dtype=torch.float32) if prompt.dim() > 2 else prompt.float()
    return summed[tuple(slice(None, None, step) for step in _strides(tuple(summed.shape)))].clone()


def _strides(shape: tuple[int, ...]) -> list[int]:
    """How far apart to take numbers along each axis, 64 in all at most; early axes (rows of a batch) come first."""
    left, strides = _MOST, []
    for length in shape:
        strides.append(max(1, -(-length // left)))
        left //= max(1, -(-length // strides[-1]))
    return strides
