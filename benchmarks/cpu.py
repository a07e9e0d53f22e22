"""CPU benchmarks.  One command prints one JSON object.

    python benchmarks/cpu.py attend --tokens 8192 --heads 8 --dim 64 --density 0.2 --block 128 --dtype fp32 --json

Dense and sparse attention take turns in the same process, so that other load on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.attend import attend, choose_backend
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHECKED_ROWS = 64


def top_k_plan(tokens: int, heads: int, density: float, block: int) -> SparsePlan:
    """Builds a plan that keeps the same number of random key blocks in every row of every head."""
    blocks = -(-tokens // block)
    scores = torch.rand(heads, blocks, blocks)
    kept = scores.argsort(-1)[..., : max(1, round(density * blocks))]
    keep = torch.zeros(heads, blocks, blocks, dtype=torch.bool).scatter_(-1, kept, True)
    return plan_from_blocks(
        keep[None], q_len=tokens, kv_len=tokens, block_q=block, block_kv=block, method="random top-k"
    )


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> float:
    """Largest difference to float64 attention, over some query rows of every head."""
    rows = torch.randperm(plan.q_len)[:_CHECKED_ROWS]
    keep = plan.to_bool()[:, :, rows // plan.block_q].repeat_interleave(plan.block_kv, -1)[..., : plan.kv_len]
    scores = q[:, :, rows].double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    expected = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v.double()
    return (out[:, :, rows].double() - expected).abs().max().item()


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Times the calls in turns after one warm-up each and returns the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_attend(args: argparse.Namespace) -> dict[str, Any]:
    """Compares sparse attention with `F.scaled_dot_product_attention` on the same tensors."""
    torch.manual_seed(args.seed)
    dtype = _DTYPES[args.dtype]
    # The layout of diffusers: a transposed view of [batch, tokens, heads, dim] storage.
    shape = (args.batch, args.tokens, args.heads, args.dim)
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2) for _ in range(3))
    plan = top_k_plan(args.tokens, args.heads, args.density, args.block)
    with torch.no_grad():
        seconds = interleaved(
            {
                "dense": lambda: F.scaled_dot_product_attention(q, k, v),
                "sparse": lambda: attend(q, k, v, plan),
            },
            args.repeats,
        )
        error = sampled_error(attend(q, k, v, plan), q, k, v, plan)
    return {
        "benchmark": "attend",
        "tokens": args.tokens,
        "heads": args.heads,
        "dim": args.dim,
        "block": args.block,
        "batch": args.batch,
        "dtype": args.dtype,
        "density": plan.density,
        "backend": choose_backend("cpu", dtype, args.dim, plan).backend,
        "dense_p50_s": seconds["dense"],
        "sparse_p50_s": seconds["sparse"],
        "speedup": seconds["dense"] / seconds["sparse"],
        "ideal_speedup": 1.0 / plan.density,
        "max_abs_error": error,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def build_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(description="CPU benchmarks of dit_accel.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("attend", help="sparse attention against dense attention")
    command.set_defaults(run=bench_attend)
    command.add_argument("--tokens", type=int, default=8192)
    command.add_argument("--heads", type=int, default=8)
    command.add_argument("--dim", type=int, default=64)
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--density", type=float, default=0.2, help="kept fraction of the key blocks")
    command.add_argument("--block", type=int, default=128)
    command.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print JSON only, no sentence")
    return parser


def main() -> None:
    """Runs one benchmark and prints its result."""
    args = build_parser().parse_args()
    result = args.run(args)
    print(json.dumps(result))
    if not args.json:
        print(f"{result['speedup']:.2f}x of dense attention; the density allows {result['ideal_speedup']:.2f}x.")


if __name__ == "__main__":
    main()
