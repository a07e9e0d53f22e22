"""What putting tokens into another order costs, and what agent attention and merging save.

    python benchmarks/tokens.py permutation --grid 21x45x80 --tile 3x5x8 --heads 40 --layers 4
    python benchmarks/tokens.py agent --grid 30x48x80 --cells 5x8x8 --heads 24
    python benchmarks/tokens.py permutation --grid 3x9x13 --heads 2 --dim 16 --device cpu --dtype fp32

Each prints one JSON object.  `permutation` runs a Wan transformer of random weights with one plan of random blocks,
three ways: its tokens permuted in every attention call, once per call of the model, and not at all (the blocks then
hold other tokens, at the same cost).  Times on a CPU say little; the differences are right anywhere.  Without an
installation, put the root of the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_sections.session import Session, dense_kernel

import dit_accel
from dit_accel.install import TokenPermutation
from dit_accel.kernels.agent.attention import agent_attention
from dit_accel.kernels.agent.merging import match_tokens
from dit_accel.kernels.agent.pooling import pooled_agents
from dit_accel.kernels.sparse_plan import SparsePlan, plan_from_blocks
from dit_accel.kernels.token_order import tile_order
from dit_accel.layout import TokenLayout
from dit_accel.processors import StaticAttnProcessor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK = 128


class RandomBlocks(StaticAttnProcessor):
    """The same random blocks in every layer and at every step, with tokens in tile order or as they come."""

    def __init__(self, density: float, tile: tuple[int, int, int] | None) -> None:
        super().__init__(dense_steps=0)
        self.density, self.tile = density, tile

    def build_plan(self, layout: TokenLayout, device: torch.device) -> SparsePlan:
        """Keeps each block with the same probability, and the diagonal."""
        blocks = -(-layout.length // _BLOCK)
        keep = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < self.density
        keep |= torch.eye(blocks, dtype=torch.bool)
        order = None if self.tile is None else tile_order(layout.grid, self.tile, device)
        sizes = {"q_len": layout.length, "kv_len": layout.length, "block_q": _BLOCK, "block_kv": _BLOCK}
        return plan_from_blocks(keep.to(device), **sizes, order=order, method="random blocks")

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        return {"density": self.density, "tile": self.tile}


def permutation(arguments: argparse.Namespace, session: Session) -> dict[str, Any]:
    transformer, inputs = _wan(arguments, session.device)
    tile = arguments.tile

    @torch.no_grad()
    def run() -> torch.Tensor:
        return transformer(**inputs, return_dict=False)[0]

    def measured(tile: tuple[int, int, int] | None, *hooks: TokenPermutation) -> tuple[torch.Tensor, dict[str, Any]]:
        with dit_accel.accelerate(transformer, RandomBlocks(arguments.density, tile), block_hooks=hooks):
            return run(), session.time(run).row()

    once = TokenPermutation(lambda layout: tile_order(layout.grid, tile))
    in_calls, call_times = measured(tile)
    around, once_times = measured(tile, once)
    _, plain_times = measured(None)
    return {
        "in every call": call_times,
        "once per call of the model": once_times,
        "not at all": plain_times,
        "largest difference": (in_calls - around).abs().max().item(),
        "largest value": in_calls.abs().max().item(),
    }


def agent(arguments: argparse.Namespace, session: Session) -> dict[str, Any]:
    tokens = math.prod(arguments.grid)
    q, k, v = session.randn((1, arguments.heads, tokens, arguments.dim), _DTYPES[arguments.dtype])
    x = torch.randn(1, tokens, arguments.heads * arguments.dim, device=session.device, dtype=q.dtype)
    generator = torch.Generator(session.device).manual_seed(0)
    merge = match_tokens(x, arguments.grid, (1, 2, 2), generator=generator).merge_ratio(0.4)

    def fastest_dense() -> torch.Tensor:
        with dense_kernel(session.device, cudnn=True):
            return F.scaled_dot_product_attention(q, k, v)

    calls: dict[str, Callable[[], Any]] = {
        "dense": fastest_dense,
        "dense, the kernel that torch takes by itself": lambda: F.scaled_dot_product_attention(q, k, v),
        "pooling": lambda: pooled_agents(q, arguments.grid, arguments.cells),
        "pooling and agent attention": lambda: agent_attention(
            q, k, v, pooled_agents(q, arguments.grid, arguments.cells)
        ),
        "matching, 2x2 cells": lambda: match_tokens(x, arguments.grid, (1, 2, 2), generator=generator),
        "merging and unmerging, ratio 0.4": lambda: merge.unmerge(merge.merge(x)),
    }
    return {name: session.attempt({}, lambda call=call: session.time(call).row()) for name, call in calls.items()}


def _wan(arguments: argparse.Namespace, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
    from diffusers import WanTransformer3DModel

    dtype, (frames, height, width) = _DTYPES[arguments.dtype], arguments.grid
    with torch.device(device):
        transformer = WanTransformer3DModel(
            num_attention_heads=arguments.heads,
            attention_head_dim=arguments.dim,
            ffn_dim=round(2.7 * arguments.heads * arguments.dim),
            num_layers=arguments.layers,
        ).to(dtype)
        inputs = {
            "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, dtype=dtype),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=dtype),
        }
    return transformer.eval(), inputs


def _sides(text: str) -> tuple[int, int, int]:
    frames, height, width = (int(side) for side in text.split("x"))
    return frames, height, width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("permutation", "agent"))
    parser.add_argument("--grid", type=_sides, default=(21, 45, 80), help="tokens: frames x height x width")
    parser.add_argument("--tile", type=_sides, default=(3, 5, 8), help="tokens of a tile")
    parser.add_argument("--cells", type=_sides, default=(5, 8, 8), help="agents along the same axes")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    session = Session(torch.device(arguments.device), smoke=False, deadline=math.inf)
    result = (permutation if arguments.what == "permutation" else agent)(arguments, session)
    print(json.dumps(vars(arguments) | {"torch": torch.__version__} | result, indent=2))


if __name__ == "__main__":
    main()
