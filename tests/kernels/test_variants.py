"""Variants of the Triton kernel: which one takes a call, the self-check before it does, and what the compiler made."""

from __future__ import annotations

import contextvars
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel.acceleration import Acceleration
from dit_accel.clock import StepClock
from dit_accel.kernels import ops, support
from dit_accel.kernels.attend import attend, choose_backend
from dit_accel.kernels.search.inputs import search_backend
from dit_accel.kernels.sparse_plan import plan_from_blocks
from dit_accel.kernels.support import Call, check, choose
from dit_accel.kernels.triton_kernels import self_check, variants
from dit_accel.kernels.triton_kernels.self_check import KernelHangError, Outcome

from .interpreter_runner import interpreted
from .variant_cases import CASES

CALL = Call("cuda", torch.bfloat16, 128, 128, 128, device_index=0)
RIGHT = Outcome(True, 1e-3, "self-check passed")
WRONG = Outcome(False, 0.5, "its results are wrong")
ON_HOPPER = torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] == 9
Answer = Outcome | Exception


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Results of variant_cases.py."""
    pytest.importorskip("triton")
    return interpreted("variant_cases")


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_interpreted_kernel(case: str, results: dict[str, str]) -> None:
    assert results[case] == "ok", results[case]


class Machine:
    """A machine that claims to have GPUs, on which self-checks end as they are told to.

    Attributes:
        answers: How the self-check of a (variant, device index) ends; right where nothing is said.
        runs: How often each was run.
        capability: Of all GPUs.
        capturing: Whether a CUDA graph is being captured.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], Answer] = {}
        self.runs: Counter[tuple[str, int]] = Counter()
        self.capability: tuple[int, int] | None = (9, 0)
        self.capturing = False

    def examine(self, variant: str, device: torch.device) -> Outcome:
        """Stands in for `self_check.examine`."""
        assert device.index is not None
        self.runs[variant, device.index] += 1
        answer = self.answers.get((variant, device.index), RIGHT)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two Hopper GPUs with Triton and Gluon, nothing checked yet."""
    made = Machine()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(support, "_triton_installed", lambda: True)
    monkeypatch.setattr(variants, "_capability", lambda index: made.capability)
    monkeypatch.setattr(variants, "_gluon_problem", lambda: None)
    monkeypatch.setattr(self_check, "examine", made.examine)
    monkeypatch.setattr(self_check, "_outcomes", {})
    monkeypatch.setattr(variants, "_gpu_there", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


def test_auto_takes_tma_once_its_self_check_passed(machine: Machine) -> None:
    for _ in range(3):
        answer = choose(CALL)
        assert (answer.backend, answer.variant, answer.ok) == ("triton", "tma", True)
        assert "the tma variant (self-check passed)" in answer.reason
    assert machine.runs == {("tma", 0): 1}
    assert check("triton", CALL).variant == "tma"


def test_a_variant_can_be_refused_for_the_process(machine: Machine) -> None:
    self_check.refuse("tma", torch.device("cuda", 0), "it hangs")
    answer = choose(CALL)
    assert answer.variant == "pointer" and "not tma: it hangs" in answer.reason
    assert machine.runs == {("pointer", 0): 1}


def test_the_report_of_an_accelerated_model_names_the_variant(machine: Machine) -> None:
    weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    module = SimpleNamespace(parameters=lambda: iter([weight]), inner_dim=256, heads=2)
    processor: Any = SimpleNamespace(block=128, backend="auto")
    handle: Any = SimpleNamespace(clock=StepClock())
    name, reason = Acceleration._choose_backend(handle, module, processor)
    assert name == "triton" and "the tma variant" in reason and "pointer variant for plans with a pair test" in reason
    machine.answers["gluon", 0] = WRONG
    processor.backend = "triton:gluon"
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="triton:gluon backend cannot run here"):
        Acceleration._choose_backend(handle, module, processor)


FAILURES = [(WRONG, "wrong"), (RuntimeError("ptxas failed\nlong log"), "failed with RuntimeError: ptxas failed")]


@pytest.mark.parametrize(("failure", "reason"), FAILURES)
def test_a_variant_that_fails_is_refused_loudly_and_once(machine: Machine, failure: Answer, reason: str) -> None:
    machine.answers["tma", 0] = failure
    with pytest.warns(RuntimeWarning, match=f"'tma' variant .* will not be used in this process: .*{reason}"):
        first = choose(CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = choose(CALL)
        explicit = check("triton:tma", CALL)
        with pytest.raises(ValueError, match=f"The triton:tma attention backend cannot run this call: .*{reason}"):
            ops._settled("triton:tma", CALL)
    for answer in (first, second):
        assert (answer.backend, answer.variant, answer.ok) == ("triton", "pointer", True)
        assert "not tma" in answer.reason and reason in answer.reason and "long log" not in answer.reason
    assert not explicit.ok and reason in explicit.reason
    assert machine.runs == {("tma", 0): 1, ("pointer", 0): 1}


def test_every_device_is_checked_for_itself(machine: Machine) -> None:
    machine.answers["tma", 1] = WRONG
    assert choose(CALL).variant == "tma"
    with pytest.warns(RuntimeWarning, match="will not be used"):
        assert choose(replace(CALL, device_index=1)).variant == "pointer"
    # Without an index the current device is meant, and that is 1 here.
    assert choose(replace(CALL, device_index=None)).variant == "pointer"
    assert machine.runs == {("tma", 0): 1, ("tma", 1): 1, ("pointer", 1): 1}
    assert self_check.known_outcomes("cuda").keys() == {"tma", "pointer"}


def test_the_device_of_a_plan_is_checked_and_not_the_current_one(machine: Machine) -> None:
    plan: Any = SimpleNamespace(block_q=128, block_kv=128, pair_test=None, device=torch.device("cuda", 0))
    assert choose_backend("cuda", torch.bfloat16, 128, plan).variant == "tma"
    assert machine.runs == {("tma", 0): 1}
    plan.device = torch.device("cpu")
    choose_backend("cuda", torch.bfloat16, 128, plan)
    assert machine.runs == {("tma", 0): 1, ("tma", 1): 1}, "a plan on the CPU says nothing about GPUs"


def test_a_search_asks_for_the_pointer_variant_on_its_own_device(machine: Machine) -> None:
    tensor: Any = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 256, 2, 128), stride=lambda dim: 1
    )
    answer = search_backend("auto", tensor, tensor, block_q=128, block_kv=128)
    assert (answer.backend, answer.variant, answer.ok) == ("triton", "pointer", True)
    assert machine.runs == {("pointer", 0): 1}


def test_a_search_runs_on_torch_where_pointer_is_wrong(machine: Machine) -> None:
    machine.answers["pointer", 0] = WRONG
    tensor: Any = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 256, 2, 128), stride=lambda dim: 1
    )
    with pytest.warns(RuntimeWarning):
        answer = search_backend("auto", tensor)
    assert answer.backend == "torch" and "its results are wrong" in answer.reason
    with pytest.raises(ValueError, match="triton search cannot run this call: its results are wrong"):
        search_backend("triton", tensor)


def test_auto_never_takes_gluon(machine: Machine) -> None:
    machine.answers["tma", 0] = WRONG
    with pytest.warns(RuntimeWarning):
        assert choose(CALL).variant == "pointer"
    assert ("gluon", 0) not in machine.runs
    explicit = check("triton:gluon", CALL)
    assert explicit.ok and explicit.variant == "gluon" and explicit.backend == "triton:gluon"
    assert ops._settled("triton:gluon", CALL).variant == "gluon"


def test_gather_runs_where_even_pointer_is_wrong(machine: Machine) -> None:
    machine.answers.update({("tma", 0): WRONG, ("pointer", 0): WRONG})
    with pytest.warns(RuntimeWarning) as caught:
        answer = choose(CALL)
    assert len(caught) == 2
    assert answer.backend == "gather" and answer.ok and answer.variant == ""
    assert "not triton: its results are wrong" in answer.reason
    for name in ("triton", "triton:pointer"):
        with pytest.raises(ValueError, match="cannot run this call"):
            ops._settled(name, CALL)


def test_a_hanging_kernel_stops_the_program(machine: Machine) -> None:
    machine.answers["tma", 0] = KernelHangError("does not finish")
    with pytest.raises(KernelHangError):
        choose(CALL)
    assert self_check.known_outcomes("cuda") == {}


def test_waiting_for_a_kernel_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        finished = False

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.finished

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(self_check, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(KernelHangError, match="backend='triton:pointer'"):
        self_check._wait("tma", torch.device("cuda", 0))
    Event.finished = True
    self_check._wait("tma", torch.device("cuda", 0))


def test_nothing_is_checked_while_a_graph_is_captured(machine: Machine) -> None:
    machine.capturing = True
    captured = choose(CALL)
    assert captured.variant == "pointer" and captured.ok and "run attention once before" in captured.reason
    assert not check("triton:tma", CALL).ok and not machine.runs
    machine.capturing = False
    assert choose(CALL).variant == "tma"
    machine.capturing = True
    assert choose(CALL).variant == "tma", "what is known stays known"


def test_threads_share_one_check(machine: Machine) -> None:
    start, chosen = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        chosen.append(choose(CALL).variant)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["tma"] * 4 and machine.runs == {("tma", 0): 1}


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0), None])
@pytest.mark.parametrize("variant", ["tma", "gluon"])
def test_other_gpus_run_the_pointer_variant(
    machine: Machine, variant: str, capability: tuple[int, int] | None
) -> None:
    machine.capability = capability
    answer = check(variants.backend_name(variant), CALL)
    assert not answer.ok and "compute capability 9.0" in answer.reason
    assert choose(CALL).variant == "pointer"
    assert machine.runs == {("pointer", 0): 1}, "what cannot run is not checked"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 136}, "above 128"),
        ({"block_q": 64}, "block_q=64"),
        ({"block_kv": 96}, "block_kv=96"),
        ({"aligned": False}, "16 bytes"),
        ({"all_full": False}, "pair test or a residual"),
    ],
)
def test_calls_that_only_the_pointer_variant_takes(machine: Machine, change: dict[str, object], reason: str) -> None:
    call = replace(CALL, **change)  # type: ignore[arg-type]
    for name in ("triton:tma", "triton:gluon"):
        answer = check(name, call)
        assert not answer.ok and reason in answer.reason
    answer = choose(call)
    assert answer.variant == "pointer" and answer.ok and reason in answer.reason
    assert machine.runs == {("pointer", 0): 1}


@pytest.mark.parametrize("change", [{"head_dim": 40}, {"block_q": 256}, {"block_kv": 192}, {"dtype": torch.float16}])
def test_calls_that_tma_takes(machine: Machine, change: dict[str, object]) -> None:
    assert choose(replace(CALL, **change)).variant == "tma"  # type: ignore[arg-type]


def test_what_triton_refuses_no_variant_takes(machine: Machine) -> None:
    for name in ("triton:pointer", "triton:tma", "triton:gluon"):
        assert "last stride 1" in check(name, replace(CALL, strides_ok=False)).reason
        assert not check(name, replace(CALL, device_type="cpu")).ok
    assert not machine.runs


def test_explicit_variants_raise_instead_of_falling_back() -> None:
    q = torch.randn(1, 1, 128, 32)
    plan = plan_from_blocks(torch.ones(1, 1, dtype=torch.bool), q_len=128, kv_len=128, block_q=128, block_kv=128)
    for name in ("triton:pointer", "triton:tma", "triton:gluon"):
        with pytest.raises(ValueError, match=f"The {name} attention backend cannot run this call"):
            attend(q, q, q, plan, backend=name)
    with pytest.raises(ValueError, match=r"'triton:wgmma'.*triton:pointer, triton:tma, triton:gluon"):
        attend(q, q, q, plan, backend="triton:wgmma")


def test_descriptors_need_aligned_rows() -> None:
    fits = variants.fits_descriptors
    storage = torch.zeros(2 * 40 * 3 * 40 + 16, dtype=torch.float16)
    whole = storage[:9600].view(2, 40, 3, 40).transpose(1, 2)
    assert fits(whole) and fits(whole[:1].expand(5, -1, -1, -1))
    assert not fits(storage[1:9601].view(2, 40, 3, 40).transpose(1, 2)), "base at 2 bytes"
    assert not fits(storage[: 2 * 40 * 3 * 36].view(2, 40, 3, 36).transpose(1, 2)), "heads 72 bytes apart"
    assert not fits(storage[: 2 * 40 * 36].view(2, 40, 1, 36).transpose(1, 2)), "rows 72 bytes apart"
    assert not fits(whole[:, :, :1].expand(-1, -1, 40, -1)), "tokens on top of each other"
    odd = storage[: 40 * 40].view(1, 1, 40, 40).as_strided((1, 1, 40, 40), (3, 5, 40, 1))
    assert fits(odd), "strides of dimensions of size 1 mean nothing"


@pytest.fixture
def without_gluon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Triton without Gluon."""
    pytest.importorskip("triton")
    from dit_accel.kernels.triton_kernels import gluon_hopper

    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "dit_accel.kernels.triton_kernels.gluon_kernel", raising=False)
    gluon_hopper._load.cache_clear()
    yield
    gluon_hopper._load.cache_clear()


@pytest.mark.usefixtures("without_gluon")
def test_a_triton_without_gluon_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.kernels.triton_kernels.gluon_hopper import gluon_attention, gluon_problem

    monkeypatch.setattr(variants, "_gluon_problem", gluon_problem)
    answer = check("triton:gluon", CALL)
    assert not answer.ok and "Gluon lacks" in answer.reason and "pip install" in answer.reason
    assert choose(CALL).variant == "tma"
    q = torch.zeros(1, 1, 128, 64)
    with pytest.raises(RuntimeError, match="Gluon lacks"):
        gluon_attention(q, q, q, None, 1.0, q, q)  # type: ignore[arg-type]


def test_every_launch_brings_its_allocator() -> None:
    pytest.importorskip("triton")
    import triton
    from triton.runtime._allocation import _allocator

    from dit_accel.kernels.triton_kernels.hopper import _allocate, with_workspace

    found: list[object] = []

    def launch() -> None:
        found.append(_allocator.get())

    # A thread starts with an empty context, in which Triton's allocator only raises.
    thread = threading.Thread(target=with_workspace, args=(launch,), name="worker")
    thread.start()
    thread.join()

    def mine(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size)

    def caller() -> object:
        triton.set_allocator(mine)
        with_workspace(launch)
        return _allocator.get()

    assert contextvars.Context().run(caller) is mine
    assert found == [_allocate, _allocate]


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles for real, whatever the user's Triton cache holds."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("head_dim", "block_kv", "short_tail"), [(64, 128, True), (128, 128, True), (128, 128, False), (128, 64, True)]
)
@pytest.mark.parametrize("variant", ["tma", "gluon"])
def test_hopper_variants_are_specialized_and_do_not_spill(
    variant: str, head_dim: int, block_kv: int, short_tail: bool
) -> None:
    from dit_accel.kernels.triton_kernels import offline_variants

    compiler: Callable[..., offline_variants.VariantReport] = getattr(offline_variants, f"compile_{variant}")
    report = compiler(head_dim=head_dim, block_kv=block_kv, short_tail=short_tail)
    assert report.resources.spill_bytes == 0
    # A producer and two consumers: one warpgroup each, of which the producer needs one warp only.
    assert report.partitioned and report.specialized and report.warps == 12
    assert report.resources.uses("HGMMA") and report.resources.uses("UTMALDG")
    assert 0 < report.resources.registers <= 168, "12 warps share the registers of one multiprocessor"
    assert report.resources.shared_bytes <= 227 * 1024


@pytest.mark.usefixtures("compiling")
def test_a_dropped_specialization_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.kernels.triton_kernels import hopper, offline_variants

    # With eight warps Triton ignores the request without a word.
    config = replace(hopper.hopper_config(64, 64), warps=8)
    monkeypatch.setattr(offline_variants, "hopper_config", lambda *_: config)
    report = offline_variants.compile_tma(head_dim=64, block_kv=64)
    assert not report.partitioned and not report.specialized and report.resources.uses("HGMMA")


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_self_check_on_hopper(variant: str) -> None:
    outcome = self_check.examine(variant, torch.device("cuda", 0))
    assert outcome.ok, outcome.reason


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("head_dim", "block_kv"), [(32, 64), (64, 128), (96, 128), (128, 64), (128, 128), (128, 256)])
@pytest.mark.parametrize("variant", ["tma", "gluon"])
def test_variants_on_hopper(variant: str, head_dim: int, block_kv: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 2000
    keep = torch.rand(2, 4, -(-tokens // 128), -(-tokens // block_kv), generator=generator) < 0.3
    plan = plan_from_blocks(keep, q_len=tokens, kv_len=tokens, block_q=128, block_kv=block_kv).to("cuda")
    q, k, v = torch.randn(3, 2, tokens, 4, head_dim, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    expected, expected_lse = attend(q, k, v, plan, return_lse=True, backend="reference")
    first = attend(q, k, v, plan, backend=f"triton:{variant}")
    for _ in range(20):
        out, lse = attend(q, k, v, plan, return_lse=True, backend=f"triton:{variant}")
        assert torch.equal(out, first), "runs differ, so there is a race"
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
