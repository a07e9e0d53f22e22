"""Every token sees a window around it, in space and in time: here the small Wan that ships; any known model works.

Run: python examples/neighborhood_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.install.permutation import TokenPermutation
from dit_accel.metrics import psnr
from dit_accel.processors import NeighborhoodAttnProcessor
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

    # A window of 60 % of every side around each token, on any grid.
    with dit_accel.accelerate(pipe, "neighborhood", block=64) as accelerated:
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
        print(accelerated.report().summary())

    # Sliding Tile Attention: tiles of 1 x 8 x 8 tokens, windows of 7 x 1 x 1 tiles, so no block is kept in part.
    # Tokens are put in the order of tiles once per call of the model instead of in every attention call.
    tiles = NeighborhoodAttnProcessor(window=(7, 8, 8), stride=(1, 8, 8), tile=(1, 8, 8), block=64)
    with dit_accel.accelerate(pipe, tiles, block_hooks=[TokenPermutation(tiles.token_order)]) as accelerated:
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
        print(accelerated.report().summary())

    # Dilated in every other layer: half of each side, beside as many keys spread over the whole of it.
    pipe.set_attn_processor(NeighborhoodAttnProcessor(window=0.5, dilation="alternate", block=64))
    print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
    print(dit_accel.acceleration_of(pipe).report().summary())
    dit_accel.acceleration_of(pipe).remove()


if __name__ == "__main__":
    main()
