"""Cases that run the Gluon kernel's own source in an emulation; interpreter_runner.py runs them.

Importing this module puts the emulation in the place of Triton, so it is for a process of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

if TYPE_CHECKING:
    from tests.kernels import gluon_emulator
    from tests.kernels.variant_cases import oracle, random_plan, tensors
else:  # the runner finds cases beside itself
    import gluon_emulator
    from variant_cases import oracle, random_plan, tensors

gluon_emulator.install()

TRIES = 20  # orders of events; from 50 seeds no mistake below stayed unseen in more than six

from dit_accel.kernels.triton_kernels import gluon_kernel, hopper  # noqa: E402  (after the stand-ins)


def run(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, kernel: Any = gluon_kernel.gluon_kernel
) -> tuple[Tensor, ...]:
    """Outputs of the kernel, written over NaN."""
    out, lse = torch.full(q.shape, float("nan"), dtype=q.dtype), torch.full(q.shape[:3], float("nan"))
    hopper.launch_hopper(kernel, q, k, v, plan, q.shape[-1] ** -0.5, out, lse)
    return out, lse


def off(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, **options: Any) -> bool:
    """Whether the results are wrong."""
    tolerance = 1e-5 if q.dtype == torch.float32 else 1e-3
    out, lse = run(q, k, v, plan, **options)
    expected, expected_lse = oracle(q, k, v, plan, q.shape[-1] ** -0.5)
    return not (
        torch.allclose(out.double(), expected, rtol=tolerance, atol=tolerance)
        and torch.allclose(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    )


def long_lists_go_round_the_ring() -> None:
    # 14 blocks through 3 slots for half precision at head dim 128.
    plan = plan_from_blocks(torch.ones(1, 14, dtype=torch.bool), q_len=100, kv_len=14 * 64, block_q=128, block_kv=64)
    for _ in range(3):
        assert not off(*tensors(1, 1, 100, 14 * 64, 128, torch.float16), plan)


def random_lists_and_short_tails() -> None:
    for block_kv in (64, 128, 192, 256):
        plan = random_plan(300, 5 * block_kv + 5, 128, block_kv, 3, 2)
        assert not off(*tensors(3, 2, 300, 5 * block_kv + 5, 64, torch.float32), plan)


def whole_blocks_and_wide_query_blocks() -> None:
    assert not off(*tensors(2, 1, 300, 512, 64, torch.float32), random_plan(300, 512, 256, 128, 2, 1))


def padded_head_dims_and_fused_views() -> None:
    assert not off(*tensors(1, 2, 130, 150, 40, torch.float16), random_plan(130, 150, 128, 64))
    q, k, v = torch.randn(2, 150, 3, 2, 96).half().permute(2, 0, 3, 1, 4)
    assert not off(q, k, v, random_plan(150, 150, 128, 128))


def no_keys_at_all() -> None:
    plan = plan_from_blocks(torch.zeros(1, 2, dtype=torch.bool), q_len=90, kv_len=100, block_q=128, block_kv=64)
    out, lse = run(*tensors(1, 1, 90, 100, 64, torch.float32), plan)
    assert (out == 0).all() and (lse == float("-inf")).all()


def _mistaken(right: str, wrong: str) -> Any:
    """The kernel with one place of its source changed."""
    source = inspect.getsource(gluon_kernel)
    assert source.count(right) == 1, right
    module = {"__package__": gluon_kernel.__package__, "__name__": "mistaken"}
    exec(source.replace(right, wrong), module)
    return module["gluon_kernel"]


def mistakes_in_the_protocol_are_found() -> None:
    # The wait for k_empty is not among them: a free slot for the values of a step implies one for its keys.
    plan = plan_from_blocks(torch.ones(1, 14, dtype=torch.bool), q_len=128, kv_len=896, block_q=128, block_kv=64)
    call = (*tensors(1, 1, 128, 896, 64, torch.float32), plan)
    mistakes = (
        ("mbarrier.wait(v_empty.index(slot), phase ^ 1)", "pass"),
        ("mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)", "pass"),
        ("mbarrier.init(k_empty.index(i), count=2)", "mbarrier.init(k_empty.index(i), count=1)"),
        ("mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)", "mbarrier.wait(k_full.index(slot), 0)"),
        ("mbarrier.arrive(v_empty.index(before), count=1)", "pass"),
    )
    for right, wrong in mistakes:
        kernel = _mistaken(right, wrong)
        try:
            found = any(off(*call, kernel=kernel) for _ in range(TRIES))
        except (TimeoutError, AssertionError):
            found = True
        assert found, f"{wrong!r} in place of {right!r} made no difference"


def loads_nobody_waits_for_are_found() -> None:
    plan = plan_from_blocks(torch.zeros(1, 2, dtype=torch.bool), q_len=90, kv_len=100, block_q=128, block_kv=64)
    kernel = _mistaken("    if steps > 0:\n        for part in", "    if True:\n        for part in")
    for _ in range(TRIES):
        try:
            run(*tensors(1, 1, 90, 100, 64, torch.float32), plan, kernel=kernel)
        except AssertionError as found:
            assert "under way" in str(found)
            return
    raise AssertionError("queries were loaded for a row without keys, and nobody noticed")


CASES: tuple[Callable[[], None], ...] = (
    long_lists_go_round_the_ring,
    random_lists_and_short_tails,
    whole_blocks_and_wide_query_blocks,
    padded_head_dims_and_fused_views,
    no_keys_at_all,
    mistakes_in_the_protocol_are_found,
    loads_nobody_waits_for_are_found,
)
