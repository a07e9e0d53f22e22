"""A feature cache and sparse attention, alone and together, on the small Wan that ships.

Run: python examples/cache_and_sparse.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.caching import Anchor, Cache, Limits
from dit_accel.caching.policies import Transform
from dit_accel.caching.scopes.output import Output
from dit_accel.metrics import psnr
from dit_accel.shapes import path

PROMPT = "a yellow triangle moving up on a black background"
SETTINGS = {"height": 256, "width": 256, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 3.0}

# What is skipped (the whole model), when (the rule of EasyCache), and when not: in the first and the last steps.
CACHE = Cache(Output(), Transform(0.1), limits=Limits(warmup=4, cooldown=1), name="mine")
SPARSE: dict[str, Any] = {"attention": "block_routing", "block": 64, "amount": 0.25, "dense_steps": 4}
WAYS: dict[str, dict[str, Any]] = {
    "sparse": SPARSE,
    "cache": {"cache": CACHE},
    "sparse, cache": {**SPARSE, "cache": CACHE},
    # The first computed step after two skipped ones or more keeps 1.5 times as many blocks: others are made from it.
    "sparse, cache, anchor": {**SPARSE, "cache": CACHE, "anchor": Anchor(factor=1.5, after=2)},
}


def render(pipe: WanPipeline) -> tuple[torch.Tensor, float]:
    """One clip from the same noise each time, ``[frames, 3, height, width]`` in 0 to 1, and its seconds."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    frames = pipe(PROMPT, **SETTINGS, generator=generator, output_type="pt").frames[0]
    return frames, time.perf_counter() - start


def main() -> None:
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))
    render(pipe)  # the first run pays for more than the others
    dense, dense_seconds = render(pipe)
    for name, how in WAYS.items():
        with dit_accel.accelerate(pipe, **how) as accelerated:
            frames, seconds = render(pipe)
        report = accelerated.report()
        print(f"{name}: speed-up {dense_seconds / seconds:.2f}x, PSNR against dense {psnr(frames, dense):.1f} dB")
        for cache in report.caches:
            print(f"  computed steps: {cache.computed_steps['transformer']['cond']}")

    # Where the time goes, why each step was computed, and the schedule as a picture.
    with dit_accel.accelerate(pipe, **SPARSE, cache=CACHE, timed=True) as accelerated:
        render(pipe)
    report = accelerated.report()
    print(report.summary())
    Path("schedule.svg").write_text(report.picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
