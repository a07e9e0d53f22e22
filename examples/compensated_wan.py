"""Sparse attention that drops nothing: some blocks exactly, all others by their means; on the small Wan that ships.

Run: python examples/compensated_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.install import TokenPermutation
from dit_accel.kernels.token_order import morton_order
from dit_accel.metrics import psnr
from dit_accel.processors import BlockRoutingAttnProcessor, CompensatedAttnProcessor
from dit_accel.shapes import path

PROMPT = "a yellow triangle moving up on a black background"
SETTINGS = {"height": 256, "width": 256, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 3.0}


def render(pipe: WanPipeline) -> torch.Tensor:
    """One clip from the same noise each time, ``[frames, 3, height, width]`` in 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, **SETTINGS, generator=generator, output_type="pt").frames[0]


def main() -> None:
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))
    dense = render(pipe)

    # Blocks whose score stands out among those of their row are exact: how many depends on the attention.
    with dit_accel.accelerate(pipe, "compensated", tau=1.0) as accelerated:
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
        print(accelerated.report().summary())

    # A fixed part of all blocks, cut along Morton's curve. The hook permutes tokens once for all layers; without it
    # every attention call would, with the same result.
    processor = CompensatedAttnProcessor(density=0.25, morton=True)
    hook = TokenPermutation(lambda layout: morton_order(layout.grid))
    with dit_accel.accelerate(pipe, processor, block_hooks=[hook]):
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")

    # Other methods that search can count what they leave out, too.
    for compensate in (False, True):
        with dit_accel.accelerate(pipe, BlockRoutingAttnProcessor(amount=0.25, block=64, compensate=compensate)):
            print(f"block routing, compensate={compensate}: {psnr(render(pipe), dense):.1f} dB")


if __name__ == "__main__":
    main()
