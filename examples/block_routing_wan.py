"""Attention routed by the queries and keys themselves: here the small Wan that ships; any known model works.

Run: python examples/block_routing_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.metrics import psnr
from dit_accel.processors import BlockRoutingAttnProcessor
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

    # A quarter of all blocks for every query block, chosen anew at each step.
    with dit_accel.accelerate(pipe, "block_routing", block=64, amount=0.25) as accelerated:
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
        print(accelerated.report().summary())

    # As many blocks as hold 90 % of the attention, by their exact mass; searched for at every fifth step.
    processor = BlockRoutingAttnProcessor(score="mass", select="top_p", amount=0.9, block=64, search_every=5)
    pipe.set_attn_processor(processor)
    print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
    print(dit_accel.acceleration_of(pipe).report().summary())
    dit_accel.acceleration_of(pipe).remove()


if __name__ == "__main__":
    main()
