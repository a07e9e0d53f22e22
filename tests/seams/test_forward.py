"""Functions around a forward: nested, removed in any order, copied, beside offloading that wraps forwards too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel.controls import AttentionMassRecorder
from dit_accel.install.forward import wrap_forward


def adding(number: float, calls: list[float]) -> Callable[..., Any]:
    """Adds a number to what the module gives."""

    def around(run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(number)
        return run() + number

    return around


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_are_removed_in_any_order(order: tuple[int, int]) -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    calls: list[float] = []
    stock = module(x)
    undo = [wrap_forward(module, adding(number, calls)) for number in (1.0, 10.0)]
    torch.testing.assert_close(module(x), stock + 11)
    undo[order[0]]()
    torch.testing.assert_close(module(x), stock + (10 if order[0] == 0 else 1))
    undo[order[1]]()
    assert torch.equal(module(x), stock)
    assert not {"forward", "compile"} & set(vars(module))


def test_a_deep_copy_runs_its_own_weights_and_is_not_wrapped() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    calls: list[float] = []
    for number in (1.0, 10.0):
        wrap_forward(module, adding(number, calls))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.fill_(3.0)
    assert torch.equal(twin(x), torch.full((1, 2), 3.0)) and calls == []
    twin.compile(backend="eager")
    assert torch.equal(twin(x), torch.full((1, 2), 3.0)) and calls == []


def offload(module: nn.Module) -> Any:
    """As ``enable_model_cpu_offload`` does at the end of every generation: off, and on again."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.remove_hook_from_module(module)
    hook = hooks.ModelHook()
    hooks.add_hook_to_module(module, hook)
    return hooks


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_offloading_hooks_are_renewed_around_it(first: str) -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    calls: list[float] = []
    stock = module(x)
    if first == "theirs":
        offload(module)
    undo = wrap_forward(module, adding(1.0, calls))
    for run in range(3):
        torch.testing.assert_close(module(x), stock + 1)
        assert len(calls) == run + 1
        hooks = offload(module)
    undo()
    assert torch.equal(module(x), stock) and hasattr(module, "_hf_hook")
    hooks.remove_hook_from_module(module)
    assert torch.equal(module(x), stock) and len(calls) == 3


def test_what_someone_else_wrapped_since_stays_and_runs_the_stock_module() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    calls: list[float] = []
    stock = module(x)
    undo = wrap_forward(module, adding(1.0, calls))
    ours = module.forward
    object.__setattr__(module, "forward", lambda *args: ours(*args) * 2)
    undo()
    assert torch.equal(module(x), stock * 2) and calls == []


def test_contexts_of_a_copied_model_are_told_to_its_own_clock(make_tiny_wan: Callable[[int], Any]) -> None:
    root = make_tiny_wan(0).transformer
    with dit_accel.accelerate(root, controls=[AttentionMassRecorder(64)]) as handle:
        twin = copy.deepcopy(root)
        with twin.cache_context("uncond"):
            assert handle.clock._contexts == []
        with root.cache_context("uncond"):
            assert [context.name for context in handle.clock._contexts] == ["uncond"]
        assert handle.clock._contexts == []
    assert "cache_context" not in vars(root)


def test_the_handle_of_a_copy_leaves_the_original_alone(make_tiny_wan: Callable[[int], Any]) -> None:
    root = make_tiny_wan(0).transformer
    with dit_accel.accelerate(root, controls=[AttentionMassRecorder(64)]):
        processors = {path: id(processor) for path, processor in root.attn_processors.items()}
        twin = copy.deepcopy(root)
        handle = dit_accel.acceleration_of(twin)
        assert handle is not None and handle is not dit_accel.acceleration_of(root)
        handle.remove()
        assert {path: id(processor) for path, processor in root.attn_processors.items()} == processors
        assert {"cache_context", "compile"} <= set(vars(root))
        assert type(twin.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
        assert not {"cache_context", "compile"} & set(vars(twin))
    assert not {"cache_context", "compile"} & set(vars(root))
