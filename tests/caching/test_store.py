"""What the store keeps, for how long, in how many bytes, and what gives way when there are too few."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.caching.predictors.base import Kept, Place, Predictor
from dit_accel.caching.predictors.reuse import Reuse
from dit_accel.caching.predictors.taylor import Taylor
from dit_accel.caching.store import Demand, Store, ValueSpec, codec
from dit_accel.caching.store.codec import decode, encode

CPU = torch.device("cpu")
TOKENS, CHANNELS = 6, 32
PLAIN, FP8 = TOKENS * CHANNELS * 4, TOKENS * (CHANNELS + 4)


class Probing(Predictor):
    """Keeps two values, and the probes with them."""

    depth, needs_probe = 2, True

    def predict(self, kept, place, probe=None):
        return kept[0].value


def value(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept(step: int, tensor: Tensor | None = None, probe: Tensor | None = None) -> Kept:
    return Kept(Place(step, None), value(step) if tensor is None else tensor, probe)


def demand(order: int = 0, units: int = 1, branches: int = 1, device: torch.device = CPU) -> Demand:
    spec = ValueSpec((1, TOKENS, CHANNELS), torch.float32)
    return Demand((spec,) * units, Taylor(order) if order else Reuse(), device, branches)


# ---- keeping -------------------------------------------------------------------------------------------------------


def test_the_newest_values_of_a_key_come_back_newest_first():
    store = Store()
    for step in range(5):
        store.put(("transformer", "cond", "blocks 0-3", 0), kept(step), depth=3)
    found = store.get(("transformer", "cond", "blocks 0-3", 0))
    assert [item.place.step for item in found] == [4, 3, 2]
    assert all(torch.equal(item.value, value(item.place.step)) for item in found)
    assert store.get(("transformer", "uncond", "blocks 0-3", 0)) == []


@pytest.mark.parametrize("forget", [lambda store: store.drop("a"), Store.clear])
def test_what_is_forgotten_is_freed(forget):
    store = Store()
    store.put("a", kept(0, probe=value(1)), 1)
    found = store.get("a")[0]
    assert found.probe is not None
    watched = weakref.ref(found.value), weakref.ref(found.probe)
    del found
    assert watched[0]() is not None and watched[1]() is not None
    forget(store)
    gc.collect()
    assert (store.get("a"), store.bytes, watched[0](), watched[1]()) == ([], 0, None, None)


def test_a_kept_value_is_not_the_tensor_that_the_model_writes_into():
    store, tensor, probe = Store(), value(), value(1)
    store.put("a", kept(0, tensor, probe), 1)
    tensor.zero_()
    probe.zero_()
    found = store.get("a")[0]
    assert torch.equal(found.value, value()) and found.probe is not None and torch.equal(found.probe, value(1))


def test_an_owned_value_is_not_copied_unless_it_is_a_view_of_more():
    store, tensor, large = Store(), value(), torch.zeros(100, CHANNELS)
    store.put("a", kept(0, tensor), 1, owned=True)
    store.put("b", kept(0, large[:2]), 1, owned=True)
    store.put("c", kept(0, torch.zeros(1, 1).expand(3, 4)), 1, owned=True)
    assert store.get("a")[0].value.data_ptr() == tensor.data_ptr()
    assert store.get("b")[0].value.untyped_storage().nbytes() == 2 * CHANNELS * 4
    assert store.bytes == PLAIN + 2 * CHANNELS * 4 + 12 * 4


def test_values_leave_the_graph_of_gradients():
    store, tensor = Store(), value().requires_grad_()
    store.put("a", kept(0, tensor * 2), 1, owned=True)
    assert not store.get("a")[0].value.requires_grad


def test_bytes_are_counted_exactly_and_a_shared_probe_once():
    store, probe = Store(), value(9, torch.bfloat16)
    for unit in range(3):
        store.put(unit, kept(0, probe=probe), depth=2)
    assert store.bytes == store.device_bytes == 3 * PLAIN + PLAIN // 2
    for unit in range(3):
        store.put(unit, kept(1), depth=2)
    assert store.bytes == 6 * PLAIN + PLAIN // 2
    store.put(0, kept(2), depth=1)  # another depth: the two older values go before the new one comes
    assert store.bytes == 5 * PLAIN + PLAIN // 2
    store.clear()
    assert (store.bytes, store.peak_bytes, store.peak_device_bytes) == (0,) + (6 * PLAIN + PLAIN // 2,) * 2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans(), st.integers(1, 4)), max_size=25))
def test_the_running_count_is_what_is_kept(actions):
    """Keys come and go, with probes that some of them share, at changing depths."""
    store, probes = Store(), [torch.ones(4), torch.ones(6)]
    for key, action, which, depth in actions:
        if action == 0:
            store.drop(key)
        else:
            store.put(key, Kept(Place(0, None), torch.ones(depth), probes[which] if action > 1 else None), depth)
    found = [item for key in range(3) for item in store.get(key)]
    tensors = {id(t): t for item in found for t in (item.value, item.probe) if t is not None}
    assert store.bytes == store.device_bytes == sum(4 * tensor.numel() for tensor in tensors.values())
    store.clear()
    assert (store.bytes, store.device_bytes, len(store._uses)) == (0, 0, 0)


@pytest.mark.parametrize("bound", [0, -1, True])
def test_a_bound_is_a_positive_number(bound):
    with pytest.raises(ValueError, match="positive number of bytes"):
        Store(bound)


def test_a_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="from 1"):
        Store().put("a", kept(0), 0)


# ---- 8-bit numbers -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.sampled_from([1e-30, 1e-3, 1.0, 6.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fp8_keeps_its_error_bound(numbers, size, dtype):
    x = (torch.tensor(numbers).view(2, 4) * size).to(dtype)
    y = decode(encode(x, "fp8"))
    exact, largest = x.double(), x.double().abs().amax(-1, keepdim=True)
    bound = torch.maximum(exact.abs() / 16, largest / 448 / 1024)
    rounding = torch.finfo(dtype).eps * largest + torch.finfo(dtype).smallest_normal
    assert y.dtype == dtype and y.shape == x.shape
    assert ((y.double() - exact).abs() <= bound * (1 + 1e-5) + rounding).all()


def test_fp8_costs_normal_numbers_less_than_3_percent():
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    error = (decode(encode(x, "fp8")) - x).square().mean().sqrt()
    assert 0.02 < float(error) < 0.03


def test_fp8_gives_every_token_its_own_scale():
    x = torch.ones(2, 16)
    x[1] *= 1e6  # a token of outliers; with one scale for both the first would round to 0
    assert torch.allclose(decode(encode(x, "fp8")), x, rtol=1e-6)
    assert torch.equal(decode(encode(torch.zeros(2, 16), "fp8")), torch.zeros(2, 16))


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 4), (9,)])
def test_the_planned_size_is_the_size(shape):
    x = torch.ones(shape)
    for name in ("plain", "fp8"):
        assert encode(x, name).nbytes == ValueSpec.of(x).nbytes(name)


# ---- estimate and bound --------------------------------------------------------------------------------------------


def test_the_estimate_says_where_the_memory_goes():
    tensor = torch.empty(1, 32760, 3136, dtype=torch.bfloat16, device="meta")
    wanted = Demand.of(tensor, Taylor(2), branches=2)
    assert wanted.estimate().bytes == 2 * 3 * 32760 * 3136 * 2
    assert str(wanted.estimate()) == "about 1.15 GiB: 2 branches x 3 values of 196 MiB"
    streams = (torch.empty(1, 10, 32), torch.empty(1, 2, 32))
    assert str(Demand.of(streams, Probing(), units=2, probe=streams[0]).estimate()) == (
        "about 8.5 KiB: 1 branch x 8 values of 256 bytes to 1.25 KiB and 2 probes of 1.25 KiB"
    )


def test_a_probe_counts_only_for_who_asks_for_it():
    assert Demand.of(value(), Reuse(), probe=value()).estimate().bytes == PLAIN
    assert Demand.of(value(), Probing(), probe=value()).estimate().bytes == 4 * PLAIN


@pytest.mark.parametrize("bound", [None, 6 * PLAIN])
def test_what_fits_is_left_alone(bound):
    store = Store(bound)
    plan = store.plan(demand(order=2, branches=2))
    assert (plan.depth, plan.predictor, plan.codec, plan.device) == (3, Taylor(2), "plain", CPU)
    assert (plan.bytes, store.downgrades) == (6 * PLAIN, [])


def test_a_plan_holds_what_it_promised():
    """Filled to the brim, the store takes exactly the planned bytes, at every rung."""
    for bound in (6 * PLAIN, 5 * PLAIN, 3 * PLAIN, 2 * FP8):
        store = Store(bound)
        plan = store.plan(demand(order=2, units=2))
        for step in range(5):
            for unit in range(2):
                assert store.put(unit, kept(step), plan.depth)
        assert store.peak_bytes == store.bytes == plan.bytes <= bound


def test_the_order_is_lowered_first_then_numbers_get_smaller():
    store = Store(2 * PLAIN)
    assert (store.plan(demand(order=2)).depth, len(store.downgrades)) == (2, 1)
    assert store.downgrades[0].startswith("depth 3 -> 2 (Taylor(order=1")
    store = Store(PLAIN - 1)
    plan = store.plan(demand(order=2))
    assert (plan.depth, plan.codec, plan.bytes) == (1, "fp8", FP8)
    assert [note.split(":")[0].split(" (")[0] for note in store.downgrades] == [
        "depth 3 -> 2", "depth 2 -> 1", "8-bit numbers, one scale per token",
    ]  # fmt: skip
    store.put("a", kept(0), plan.depth)
    assert store.bytes == FP8
    assert torch.allclose(store.get("a")[0].value, value(0), rtol=1 / 16, atol=0.01)


def test_without_float8_that_step_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(codec, "_why_no_conversion", lambda device: "no such numbers here")
    with pytest.raises(ValueError, match="8-bit numbers were left out: no such numbers here"):
        Store(PLAIN - 1).plan(demand())


def test_8_bits_that_save_nothing_are_left_out():
    narrow = Demand((ValueSpec((5, 4), torch.bfloat16),), Reuse(), CPU)
    with pytest.raises(ValueError, match="4 channels, and one scale per token is as large"):
        Store(39).plan(narrow)


def test_main_memory_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_why_no_conversion", lambda device: None)
    far = torch.device("meta")  # any device but the CPU; planning needs none of it
    store = Store(2 * FP8)
    plan = store.plan(demand(order=2, units=4, branches=2, device=far))
    assert [note.split(":")[0].split(" (")[0] for note in store.downgrades] == [
        "depth 3 -> 2", "depth 2 -> 1", "8-bit numbers, one scale per token", "kept in main memory",
    ]  # fmt: skip
    assert (plan.codec, plan.device, plan.depth, plan.bytes) == ("fp8", CPU, 1, 8 * FP8)
    assert plan.device_bytes == FP8  # what one prediction brings back


def test_too_little_names_what_would_do():
    with pytest.raises(ValueError) as failure:
        Store(100).plan(demand(order=1, units=2))
    text = str(failure.value)
    assert f"max_bytes={2 * FP8} would do" in text and "output of the model" in text
    assert "main memory was left out: the model is there already" in text
    assert Store(2 * FP8).plan(demand(order=1, units=2)).bytes == 2 * FP8


def test_more_than_was_planned_is_not_kept_and_said():
    store = Store(2 * PLAIN)
    plan = store.plan(demand(branches=2))
    assert store.put("cond", kept(0), plan.depth) and store.put("uncond", kept(0), plan.depth)
    assert not store.put("third", kept(0), plan.depth) and not store.put("third", kept(1), plan.depth)
    assert (store.get("third"), store.bytes, store.peak_bytes, len(store.downgrades)) == ([], 2 * PLAIN, 2 * PLAIN, 1)
    assert "third is not kept" in store.downgrades[0]


# ---- main memory ---------------------------------------------------------------------------------------------------


class FarTensor(torch.Tensor):
    """A tensor that says it is on a GPU, for machines without one."""

    @property
    def device(self):
        return torch.device("cuda:0")


class PlainTransfer:
    """Stands in for the copies between devices, and counts them."""

    def __init__(self):
        self.started, self.waited = 0, 0

    def to_host(self, tensor):
        return tensor.as_subclass(torch.Tensor).clone()

    def to_device(self, tensor, device):
        assert device == torch.device("cuda:0")
        self.started += 1
        return tensor.clone(), "event"

    def wait(self, copy, event):
        assert event == "event"
        self.waited += 1
        return copy


@pytest.fixture
def far():
    """A store that puts values of a GPU into main memory: three units of one value, in memory for one."""
    store = Store(PLAIN)
    store._transfer = PlainTransfer()
    plan = store.plan(demand(units=3, device=torch.device("cuda:0")))
    if plan.device != CPU or plan.codec != "plain":
        pytest.skip("there is a GPU, so another test goes over it")
    for unit in range(3):
        store.put(unit, kept(0, value(unit).as_subclass(FarTensor)), 1)
    return store


def test_values_put_away_take_no_device_memory(far):
    assert (far.device_bytes, far.bytes, far.peak_device_bytes) == (0, 3 * PLAIN, 0)
    assert far.downgrades[0].startswith("8-bit numbers were left out: cuda:0 does not convert")
    assert far.downgrades[1].startswith("kept in main memory")
    assert all(torch.equal(far.get(unit)[0].value, value(unit)) for unit in range(3))
    assert far._transfer.waited == 3


def test_fetched_values_are_copied_once_and_counted_while_they_wait(far):
    far.prefetch(1)
    far.prefetch(1)
    assert (far._transfer.started, far._transfer.waited) == (1, 0)
    assert (far.device_bytes, far.bytes) == (PLAIN, 4 * PLAIN)
    far.prefetch(2)  # does not fit beside it
    assert far._transfer.started == 1
    assert torch.equal(far.get(1)[0].value, value(1))
    assert far._transfer.waited == 1


def test_the_value_of_the_next_unit_is_on_its_way_while_the_model_runs(far):
    for _ in range(3):
        for unit in range(3):
            assert torch.equal(far.get(unit)[0].value, value(unit))
            assert next(iter(far._fetched.values()))[0] is far._entries[(unit + 1) % 3][0].value
            assert (far.device_bytes, far.peak_device_bytes) == (PLAIN, PLAIN)
    assert far._transfer.started == 10  # the first, and each one after another


@pytest.mark.parametrize("forget", [lambda store: store.drop(1), Store.clear, lambda store: store.put(1, kept(1), 1)])
def test_what_was_fetched_in_vain_is_let_go(far, forget):
    far.max_bytes = None
    far.prefetch(1)
    forget(far)
    assert far.bytes == far._bytes and not far._fetched


def test_fetching_on_a_cpu_changes_nothing():
    store = Store(PLAIN)
    store.put("a", kept(0), 1)
    store.prefetch("a")
    store.prefetch("nothing")
    assert torch.equal(store.get("a")[0].value, value(0)) and store.bytes == PLAIN


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fetched", [False, True])
def test_values_come_back_from_main_memory(fetched):
    device = torch.device("cuda:0")
    store = Store(2 * FP8)
    plan = store.plan(demand(units=3, device=device))
    assert plan.device == CPU
    for unit in range(3):
        store.put(unit, kept(0, value(unit).to(device)), plan.depth)
    assert (store.device_bytes, store.bytes) == (0, plan.bytes)
    for unit in range(3):
        if fetched:
            store.prefetch(unit)
            assert store.device_bytes > 0
        back = store.get(unit)[0].value
        assert back.device == device and torch.equal(back.cpu(), decode(encode(value(unit), plan.codec)))
    assert store.peak_device_bytes <= store.max_bytes
