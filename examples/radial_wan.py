"""Three ways to run a Wan pipeline with radial attention: here the small one that ships; any Wan works.

Run: python examples/radial_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.processors import RadialAttnProcessor
from dit_accel.shapes import path

PROMPT = "a yellow triangle moving up on a black background"
SETTINGS = {"height": 256, "width": 256, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 3.0}


def main() -> None:
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))

    # 1. As a context manager: everything is as before when the block ends.
    with dit_accel.accelerate(pipe, attention="radial", block=64) as accelerated:
        pipe(PROMPT, **SETTINGS, generator=torch.Generator().manual_seed(0))
        print(accelerated.report().summary())

    # 2. Through diffusers' own method, which pipelines gain on `import dit_accel`.
    pipe.set_attn_processor(RadialAttnProcessor(block=64, decay=0.2, dense_steps=6, dense_layers=1))
    pipe(PROMPT, **SETTINGS, generator=torch.Generator().manual_seed(0))
    dit_accel.acceleration_of(pipe).remove()

    # 3. On the transformer alone.
    pipe.transformer.set_attn_processor(RadialAttnProcessor(block=64))
    pipe(PROMPT, **SETTINGS, generator=torch.Generator().manual_seed(0))
    dit_accel.acceleration_of(pipe.transformer).remove()


if __name__ == "__main__":
    main()
