"""The constants of `attention="auto"` (`dit_accel/presets/estimate.py`), measured.  A command prints one JSON object.

    python benchmarks/auto.py efficiency --device cpu
    python benchmarks/auto.py share --device cpu
    python benchmarks/auto.py efficiency --device cuda   # in bfloat16, which models run in there

`efficiency` is the speed of one attention call by each method, its choice of blocks included, over that of dense
attention, times the pairs it computes: 1 would mean that leaving out pairs saves all it could.  `share` is the part of
a model's time that attention takes, and from it the work besides attention in the unit of the estimate.  Without an
installation, put the root of the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.controls import SiteInfo
from dit_accel.kernels.attend import attend
from dit_accel.kernels.residual import block_residual
from dit_accel.kernels.search.plan import count_density
from dit_accel.layout import TokenLayout
from dit_accel.processors import DynamicAttnProcessor, StaticAttnProcessor, processor_by_name

VIDEOS = ((5, 16, 16), (9, 16, 16), (17, 16, 16), (33, 16, 16))
IMAGES = ((1, 64, 64), (1, 96, 96))
METHODS: dict[str, tuple[tuple[tuple[int, int, int], ...], dict[str, Any]]] = {
    "radial": (VIDEOS, {"block": 64}),
    "compensated": (VIDEOS, {}),
    "block_routing": ((*VIDEOS, *IMAGES), {}),
    "neighborhood": (IMAGES, {"stride": "tile"}),
}
# On a GPU smaller calls would measure Python: 480p, 720p and a longer clip, and images of 2K and 4K.
VIDEOS_GPU = ((21, 30, 52), (21, 45, 80), (33, 45, 80))
IMAGES_GPU = ((1, 128, 128), (1, 256, 256))
LARGER = {VIDEOS: VIDEOS_GPU, IMAGES: IMAGES_GPU, (*VIDEOS, *IMAGES): (*VIDEOS_GPU, *IMAGES_GPU)}
HEADS, DIM = {"cpu": 3, "cuda": 24}, {"cpu": 64, "cuda": 128}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("efficiency", "share"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    made = (efficiency if options.what == "efficiency" else share)(device, DTYPES[dtype], options.repeats)
    versions = {"torch": torch.__version__, "device": options.device, "dtype": dtype}
    versions |= {"threads": torch.get_num_threads()}
    print(json.dumps({"what": options.what, **versions, "rows": made}, indent=1))


def efficiency(device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """One row for each method and grid."""
    rows = []
    for method, (grids, settings) in METHODS.items():
        for grid in LARGER.get(grids, grids) if device.type == "cuda" else grids:
            layout = TokenLayout.video_only(grid)
            q, k, v = (tensor.to(dtype) for tensor in _smooth(grid, device))
            call, density = _sparse(method, settings, layout, q, k, v)
            dense, sparse = _in_turns((partial(_dense, q, k, v), call), device, repeats)
            row = {"method": method, "grid": grid, "density": round(density, 3), "speedup": round(dense / sparse, 2)}
            rows.append(row | {"efficiency": round(dense / sparse * density, 2)})
    return rows


def share(device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """A call of the model that ships, and its attention alone; one row for each length."""
    from diffusers import WanTransformer3DModel

    from dit_accel import shapes

    folder = shapes.path("shapes-wan") / "transformer"
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval().to(device)
    grids = VIDEOS_GPU[:2] if device.type == "cuda" else (VIDEOS[1], VIDEOS[3])
    return [_share(model, grid, device, dtype, repeats) for grid in grids]


def _share(
    model: Any, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    tokens = grid[0] * grid[1] * grid[2]
    latents = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2], device=device, dtype=dtype)
    text = torch.randn(1, 16, model.config.text_dim, device=device, dtype=dtype)
    timestep = torch.tensor([500.0], device=device)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    q, k, v = torch.randn(3, 1, heads, tokens, dim, device=device, dtype=dtype)

    def whole() -> Any:
        with torch.no_grad():
            return model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text)

    seconds, attention = _in_turns((whole, partial(_dense, q, k, v)), device, repeats)
    part = attention * model.config.num_layers / seconds
    other = 2 * tokens * (1 / part - 1) / (heads * dim)
    return {"grid": grid, "tokens": tokens, "share": round(part, 3), "other_work": round(other, 1)}


def _sparse(
    method: str, settings: dict[str, Any], layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Callable[[], Any], float]:
    """A call as a site makes it, and the pairs that it keeps over all."""
    processor = processor_by_name(method, **settings)
    if isinstance(processor, StaticAttnProcessor):
        static = processor.build_plan(layout, q.device)
        return lambda: attend(q, k, v, static), static.density
    assert isinstance(processor, DynamicAttnProcessor)
    site = SiteInfo("blocks.1.attn1", "self", 1, 6, "transformer")
    setup = processor.set_up(site, layout, q.device)

    def call() -> Tensor:
        plan = processor.find_plan(q, k, setup, scale=None)
        residual = block_residual(k, v, plan.block_kv, order=plan.key_order) if processor.compensate else None
        return attend(q, k, v, plan, residual=residual)

    return call, float(count_density(processor.find_plan(q, k, setup, scale=None)).density)


def _smooth(grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that change little from token to token, as those of videos; keys follow queries."""
    generator = torch.Generator().manual_seed(0)
    coarse = tuple(max(1, side // 4) for side in grid)
    heads, dim = (sizes["cuda" if device.type == "cuda" else "cpu"] for sizes in (HEADS, DIM))

    def one() -> Tensor:
        large = F.interpolate(torch.randn(heads, dim, *coarse, generator=generator), size=grid, mode="trilinear")
        fine = torch.randn(heads, dim, *grid, generator=generator)
        return (1.5 * large + 0.5 * fine).flatten(2).transpose(1, 2)[None].contiguous().to(device)

    q, k, v = one(), one(), one()
    return q, (q + k) / 2, v


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _in_turns(calls: tuple[Callable[[], Any], ...], device: torch.device, repeats: int) -> list[float]:
    """Median seconds of each call, which take turns after one warm-up each."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            own.append(time.perf_counter() - begin)
    return [sorted(own)[len(own) // 2] for own in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
