"""CPU benchmarks.  One command prints one JSON object.

    python benchmarks/cpu.py attend --tokens 8192 --heads 8 --dim 64 --density 0.2 --block 128 --dtype fp32 --json
    python benchmarks/cpu.py plan --tokens 8192 --heads 8 --dim 64 --density 0.2 --block 128 --dtype fp32 --json

`attend` is sparse attention against dense; `plan` is choosing the blocks from q and k against the sparse call that
uses them.  What is compared takes turns in the same process, so that other load on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.attend import attend, choose_backend
from dit_accel.kernels.search.plan import count_density, dynamic_plan
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


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times the calls in turns after one warm-up each; 20th, 50th and 80th percentile of the seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: list[float]) -> list[float]:
    """20th, 50th and 80th percentile, interpolated linearly."""
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(ranks).tolist()


def named(name: str, seconds: list[float]) -> dict[str, float]:
    """The percentiles as they are printed."""
    return {f"{name}_{rank}_s": value for rank, value in zip(("p20", "p50", "p80"), seconds, strict=True)}


def bench_attend(args: argparse.Namespace) -> dict[str, Any]:
    """Compares sparse attention with `F.scaled_dot_product_attention` on the same tensors."""
    q, k, v = inputs(args)
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
    return settings(args, q, plan) | {
        **named("dense", seconds["dense"]),
        **named("sparse", seconds["sparse"]),
        "speedup": seconds["dense"][1] / seconds["sparse"][1],
        "ideal_speedup": 1.0 / plan.density,
        "max_abs_error": error,
    }


def bench_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Compares `dynamic_plan` with the sparse call that uses its plan."""
    q, k, v = inputs(args)
    q_tokens, k_tokens = q.transpose(1, 2), k.transpose(1, 2)

    def build() -> SparsePlan:
        return dynamic_plan(
            q_tokens, k_tokens, block_q=args.block, block_kv=args.block, score=args.score, amount=args.density
        )

    with torch.no_grad():
        plan = build()
        seconds = interleaved({"plan": build, "sparse": lambda: attend(q, k, v, plan)}, args.repeats)
    return settings(args, q, count_density(plan)) | {
        "score": args.score,
        **named("plan", seconds["plan"]),
        **named("sparse", seconds["sparse"]),
        "overhead": seconds["plan"][1] / seconds["sparse"][1],
    }


def inputs(args: argparse.Namespace) -> list[Tensor]:
    """Random q, k, v in the layout of diffusers: transposed views of [batch, tokens, heads, dim] storage."""
    torch.manual_seed(args.seed)
    shape = (args.batch, args.tokens, args.heads, args.dim)
    return [torch.randn(shape, dtype=_DTYPES[args.dtype]).transpose(1, 2) for _ in range(3)]


def settings(args: argparse.Namespace, q: Tensor, plan: SparsePlan) -> dict[str, Any]:
    """What was measured, and on what."""
    names = ("tokens", "heads", "dim", "block", "batch", "dtype", "repeats")
    return (
        {"benchmark": args.command}
        | {name: getattr(args, name) for name in names}
        | {
            "density": plan.density,
            "backend": choose_backend("cpu", q.dtype, args.dim, plan).backend,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )


def build_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(description="CPU benchmarks of dit_accel.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, what in (
        ("attend", bench_attend, "sparse attention against dense attention"),
        ("plan", bench_plan, "building a dynamic plan against the sparse call that uses it"),
    ):
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=run)
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
    command.add_argument("--score", choices=("pooled", "lse", "mass"), default="pooled", help="how blocks are judged")
    return parser


def main() -> None:
    """Runs one benchmark and prints its result."""
    args = build_parser().parse_args()
    result = args.run(args)
    print(json.dumps(result))
    if not args.json and args.command == "attend":
        print(f"{result['speedup']:.2f}x of dense attention; the density allows {result['ideal_speedup']:.2f}x.")
    elif not args.json:
        print(f"The plan takes {result['overhead']:.1%} of the time of the attention under it.")


if __name__ == "__main__":
    main()
