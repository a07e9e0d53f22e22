"""Attention to cells of the video, cut in time, in space and in both by turns: here the small Wan that ships.

Run: python examples/vmoba_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.metrics import psnr
from dit_accel.processors import VMoBAAttnProcessor
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

    # As many cells as hold a quarter of a head's gates, so that important queries have more of them.
    with dit_accel.accelerate(pipe, "vmoba") as accelerated:
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
        print(accelerated.report().summary())

    # A number of cells for each query: of 3 chunks of frames, 16 patches over all frames, 24 cubes.
    processor = VMoBAAttnProcessor(
        chunk=3, patch=(4, 4), cube=(3, 8, 4), select="top_k", scope="query", amount=(1, 4, 6)
    )
    pipe.set_attn_processor(processor)
    print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
    print(dit_accel.acceleration_of(pipe).report().summary())
    dit_accel.acceleration_of(pipe).remove()


if __name__ == "__main__":
    main()
