"""Just enough of Gluon, in Python threads, to run the Hopper kernel on a CPU.

Triton's interpreter cannot run Gluon.  What compiling does not show is whether the kernel's warps wait for each
other rightly, so this stands in for the modules it imports and runs its very source: barriers with phases and byte
counts as the hardware has, and memory that behaves as badly as it may.  A product reads its operands only when it is
waited for, so a slot that is freed too early gives a wrong result.  One partition runs at a time; `gluon_turns`
chooses whose turn it is and when a load arrives, from a seed and not from the clock, so every run meets the same
orders.  Layouts mean nothing here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels import gluon_turns
else:  # the runner finds modules beside itself
    import gluon_turns

_here = threading.local()


class Pointer:
    """An address in a flat tensor, or a tensor of addresses."""

    class _Type:
        def __init__(self, element_ty: torch.dtype) -> None:
            self.element_ty = element_ty

    def __init__(self, memory: Tensor, at: Any) -> None:
        self.memory, self.at = memory, torch.as_tensor(at)
        self.dtype = Pointer._Type(memory.dtype)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """Address of a tensor's first element."""
        return cls(torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()), tensor.storage_offset())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at - offset)


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    """Reads what the mask allows; an address outside it is not touched."""
    keep = torch.as_tensor(mask).expand(pointer.at.shape)
    return torch.where(keep, pointer.memory[torch.where(keep, pointer.at, 0)], other)


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    """Writes what the mask allows."""
    keep = mask.expand(pointer.at.shape)
    pointer.memory[pointer.at[keep]] = value.expand(pointer.at.shape)[keep]


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are there."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        """Sets the arrivals of a phase."""
        self.count = self.missing = count

    def move(self, arrivals: int, size: int) -> None:
        """Counts arrivals, and bytes that are announced (positive) or there (negative)."""
        self.missing -= arrivals
        self.bytes += size
        assert self.missing >= 0, "more arrivals than the barrier was set up for"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def arrive(self, count: int) -> None:
        """Arrives, and lets others go on."""
        self.move(count, 0)
        gluon_turns.give_turn()

    def wait(self, parity: int) -> None:
        """Waits until the phase of this parity is over; the one before the first counts as over."""
        gluon_turns.give_turn(lambda: self.phase & 1 != int(parity))


class Shared:
    """Shared memory, or a slot of it; holds NaN until something is loaded."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.dtype = memory, memory.dtype

    def index(self, slot: int) -> Shared:
        """One slot."""
        return Shared(self.memory[slot])

    def permute(self, order: Sequence[int]) -> Shared:
        """A transposed view."""
        return Shared(self.memory.permute(*order))


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, n: int) -> None:
        self.all = [Barrier() for _ in range(n)]

    def index(self, slot: int) -> Barrier:
        """One barrier."""
        return self.all[slot]


class Descriptor:
    """A tensor descriptor: reads blocks, zeros outside."""

    class _BlockType:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

    def __init__(self, base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any) -> None:
        size = base.memory.element_size()
        assert strides[1] == 1 and int(base.at) * size % 16 == 0 and strides[0] * size % 16 == 0, "unaligned"
        self.base, self.shape, self.strides, self.block = base, shape, strides, block_shape
        self.block_type = Descriptor._BlockType(block_shape[0] * block_shape[1] * size)

    def read(self, row: int) -> Tensor:
        """A block from the row on."""
        rows, dims = row + torch.arange(self.block[0])[:, None], torch.arange(self.block[1])[None, :]
        return load(self.base + rows * self.strides[0] + dims, (rows < self.shape[0]) & (dims < self.shape[1]))


def load_tile(descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    """Starts a load that arrives when it is its turn."""
    row = int(at[0])

    def arrive() -> None:
        target.memory.copy_(descriptor.read(row))
        barrier.move(0, -descriptor.block_type.nbytes)

    gluon_turns.start_load(arrive)


class Product:
    """A product under way: it reads its operands when it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Tensor | None = None

    def finish(self) -> None:
        """Computes it."""
        a = self.a.memory if isinstance(self.a, Shared) else self.a
        product = a.float() @ self.b.memory.float()
        self.value = self.acc + product if self.use_acc else product


def warpgroup_mma(a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Product:
    """Starts a product."""
    assert is_async
    if not hasattr(_here, "under_way"):
        _here.under_way = []
    _here.under_way.append(Product(a, b, acc, use_acc))
    return _here.under_way[-1]


def warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    """Finishes all products but the latest."""
    gluon_turns.give_turn()
    while len(_here.under_way) > outstanding:
        _here.under_way.pop(0).finish()
    found = tuple(x.value if isinstance(x, Product) else x for x in deps)
    assert all(x is not None for x in found), "a product is used before it is waited for"
    return found if len(found) > 1 else found[0]


def warp_specialize(partitions: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
    """Runs the partitions in turns; behind it the program ends."""
    assert len(warps) == len(registers) == len(partitions) - 1
    left = gluon_turns.run(partitions)
    assert not left, "the program ends with loads under way, and their memory goes to the next one"


class Kernel:
    """A function that Gluon would compile; launched over a grid, one program after the other."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, num_stages: int, enable_fp_fusion: bool, **constants: Any) -> None:
            arguments = tuple(Pointer.to(x) if isinstance(x, Tensor) else x for x in arguments)
            for x in range(grid[0]):
                for y in range(grid[1]):
                    _here.program = (x, y)
                    self.function(*arguments, **constants)

        return launch


class _Layout:
    """Any layout; all that counts is that it can be made."""

    def __init__(self, *_: Any) -> None: ...

    @staticmethod
    def get_default_for(shape: Any, dtype: Any) -> None:
        """Of a shape."""


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))


def install() -> None:
    """Puts the stand-ins where Triton would be imported from; for processes that do nothing else."""
    language: dict[str, Any] = {
        "constexpr": lambda x: x,
        "int64": torch.int64,
        "float32": torch.float32,
        "program_id": lambda axis: torch.tensor(_here.program[axis]),
        "load": load,
        "store": store,
        "where": lambda mask, a, b: torch.where(mask, torch.as_tensor(a), torch.as_tensor(b)),
        "arange": lambda start, stop, layout=None: torch.arange(start, stop),
        "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        "max": torch.amax,
        "sum": torch.sum,
        "maximum": torch.maximum,
        "exp2": torch.exp2,
        "log2": torch.log2,
        "static_range": range,
        "convert_layout": lambda x, layout: x,
        "allocate_shared_memory": _allocate,
        "warp_specialize": warp_specialize,
        **dict.fromkeys(("NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout", "DotOperandLayout"), _Layout),
    }
    tl, gl = _module("triton.language", **language), _module("triton.experimental.gluon.language", **language)
    mbarrier = _module(
        "mbarrier",
        MBarrierLayout=_Layout,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, size: barrier.move(1, size),
        arrive=lambda barrier, count: barrier.arrive(count),
        wait=lambda barrier, phase: barrier.wait(phase),
    )
    hopper = _module(
        "triton.experimental.gluon.language.nvidia.hopper",
        fence_async_shared=lambda: None,
        mbarrier=mbarrier,
        tma=_module("tma", async_load=load_tile, make_tensor_descriptor=Descriptor),
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )
    triton: dict[str, Any] = {
        "jit": lambda function: function,
        "language": tl,
        "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
        "set_allocator": lambda allocator: None,
    }
    gluon = _module("triton.experimental.gluon", jit=Kernel, language=gl)
    for module in (_module("triton", **triton), tl, gluon, gl, hopper):
        sys.modules[module.__name__] = module
    for name in ("triton.experimental", "triton.experimental.gluon.language.nvidia"):
        sys.modules[name] = _module(name)
