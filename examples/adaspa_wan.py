"""AdaSpa: blocks by their exact mass, found twice in a generation; here with the small Wan that ships.

Run: python examples/adaspa_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.metrics import psnr
from dit_accel.processors import AdaSpaAttnProcessor
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

    # As published: a fifth of all blocks, found at 20 % of the steps and again at 60 %.
    with dit_accel.accelerate(pipe, "adaspa") as accelerated:
        print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
        print(accelerated.report().summary())

    # As many blocks as hold 90 % of the attention; found anew whenever queries or keys have turned by a twentieth.
    pipe.set_attn_processor(AdaSpaAttnProcessor(recall=0.9, drift=0.05, search_again=()))
    print(f"PSNR against dense {psnr(render(pipe), dense):.1f} dB")
    print(dit_accel.acceleration_of(pipe).report().summary())
    dit_accel.acceleration_of(pipe).remove()


if __name__ == "__main__":
    main()
