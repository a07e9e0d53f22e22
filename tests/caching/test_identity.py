"""When two calls have the same prompt, and when they only seem to."""

from __future__ import annotations

import pytest
import torch

from dit_accel.caching.engine.identity import Fingerprint


def prompt(seed: int = 0, shape=(2, 7, 24), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def no_wait(monkeypatch):
    """Fails whoever reads numbers back."""

    def read(*args):
        raise AssertionError("waited for the device")

    monkeypatch.setattr(torch, "equal", read)
    for name in ("item", "__bool__", "__float__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, read)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[1:], lambda x: x.transpose(1, 2), lambda x: x.detach()])
@torch.no_grad()
def test_the_same_memory_is_the_same_prompt_without_a_wait(no_wait, view):
    tensor = prompt()
    assert Fingerprint.of(view(tensor)).same_as(Fingerprint.of(view(tensor)))


def test_a_copy_is_the_same_prompt():
    tensor = prompt()
    assert Fingerprint.of(tensor).same_as(Fingerprint.of(tensor.clone()))


@pytest.mark.parametrize(
    "shape", [(2, 7, 24), (1, 77, 768), (3, 512, 4), (2, 4096), (1, 3, 5, 200), (90, 3, 2), (5,), ()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_prompt_is_another_and_samples_stay_small(shape, dtype):
    first, second = Fingerprint.of(prompt(0, shape, dtype)), Fingerprint.of(prompt(1, shape, dtype))
    assert not first.same_as(second) and first.same_as(Fingerprint.of(prompt(0, shape, dtype)))
    assert first.sample is not None and first.sample.numel() <= 64


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("token", [0, 3, 76])
def test_one_token_of_one_row_makes_a_difference(row, token):
    """Prompts that share their first token and their padding, as those of CLIP do, differ in few tokens."""
    tensor = prompt(0, (4, 77, 64), torch.bfloat16)
    other = tensor.clone()
    other[row, token] = prompt(1, (64,), torch.bfloat16)
    assert not Fingerprint.of(tensor).same_as(Fingerprint.of(other))


def test_views_at_other_places_differ():
    tensor = prompt()
    assert not Fingerprint.of(tensor[:1]).same_as(Fingerprint.of(tensor[1:]))
    assert not Fingerprint.of(tensor).same_as(Fingerprint.of(tensor[:, :6]))


@pytest.mark.parametrize("other", [prompt(dtype=torch.float16), prompt(shape=(2, 8, 24)), None])
def test_what_has_another_form_differs_without_a_wait(no_wait, other):
    assert not Fingerprint.of(prompt()).same_as(Fingerprint.of(other))
    assert not Fingerprint.of(other).same_as(Fingerprint.of(prompt()))


def test_no_prompt_is_the_same_as_no_prompt():
    assert Fingerprint.of(None).same_as(Fingerprint.of(None))


def test_lists_of_prompts_are_compared_one_by_one():
    first = Fingerprint.of([prompt(0), {"llama": prompt(1)}, None])
    assert first.same_as(Fingerprint.of([prompt(0), {"llama": prompt(1)}, 3]))
    for other in ([prompt(0), prompt(2)], [prompt(0)], [prompt(0), prompt(1), prompt(1)], prompt(0), None, []):
        assert not first.same_as(Fingerprint.of(other)) and not Fingerprint.of(other).same_as(first)
    assert not Fingerprint.of("words").same_as(Fingerprint.of("words"))  # nothing to go by


def test_a_write_in_place_is_seen():
    tensor = prompt()
    before = Fingerprint.of(tensor)
    tensor.copy_(prompt(1))
    assert not before.same_as(Fingerprint.of(tensor))
    tensor.copy_(prompt())  # written again, with what was there first: the same prompt after all
    assert before.same_as(Fingerprint.of(tensor))


def test_a_write_in_inference_mode_is_seen():
    """Its tensors count no writes, so the samples have to tell."""
    with torch.inference_mode():
        tensor = prompt().clone()
        before = Fingerprint.of(tensor)
        assert before.version is None and before.same_as(Fingerprint.of(tensor))
        tensor.copy_(prompt(1))
        assert not before.same_as(Fingerprint.of(tensor))


def test_a_recycled_address_is_told_apart():
    """Another prompt of the same size, at the address of the one that was freed, with as many writes."""
    memory = bytearray(prompt().numpy().tobytes())
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(2, 7, 24)
    before, address = Fingerprint.of(tensor), tensor.data_ptr()
    assert before.memory is not None and before.memory() is not None
    del tensor
    assert before.memory() is None  # a fingerprint keeps no prompt alive
    memory[:] = prompt(1).numpy().tobytes()
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(2, 7, 24)
    after = Fingerprint.of(tensor)
    assert (tensor.data_ptr(), after.layout, after.version) == (address, before.layout, before.version)
    assert not before.same_as(after)


def test_a_freed_prompt_that_comes_again_is_the_same():
    before = Fingerprint.of(prompt())
    assert before.same_as(Fingerprint.of(prompt()))


def test_nan_is_never_the_same_in_another_memory():
    tensor = prompt()
    tensor[0, 0] = float("nan")
    assert not Fingerprint.of(tensor).same_as(Fingerprint.of(tensor.clone()))
