"""One schedule for dense steps and layers, and for budgets by step, layer and head: here the small Wan that ships.

Run: python examples/schedule_wan.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel import Schedule
from dit_accel.metrics import psnr
from dit_accel.shapes import path

PROMPT = "a yellow triangle moving up on a black background"
SETTINGS = {"height": 256, "width": 256, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 3.0}
WARM_UP = {"dense_steps": 0.1, "dense_layers": 1}
SCHEDULES = {
    "as many blocks at every step": Schedule(**WARM_UP),
    # Of 20 steps 2 are dense, 8 keep 1.5 times the density, 10 keep 0.6 times: 1 on average.
    "more at first, fewer later": Schedule(**WARM_UP, step_budget=[(0.0, 1.5), (0.5, 0.6)]),
    "fewer at first, more later": Schedule(**WARM_UP, step_budget=[(0.0, 0.5), (0.5, 1.4)]),
    "more in the second layer": Schedule(**WARM_UP, layer_budget={1: 2.0}),
    "more in its first head": Schedule(**WARM_UP, head_budget={1: [2.0, 1.0, 1.0]}),
}


def render(pipe: WanPipeline) -> torch.Tensor:
    """One clip from the same noise each time, ``[frames, 3, height, width]`` in 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, **SETTINGS, generator=generator, output_type="pt").frames[0]


def main() -> None:
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))
    dense = render(pipe)
    for name, schedule in SCHEDULES.items():
        with dit_accel.accelerate(pipe, "block_routing", block=64, amount=0.25, schedule=schedule) as accelerated:
            quality = psnr(render(pipe), dense)
        print(f"{name}: density {accelerated.report().density:.3f}, PSNR against dense {quality:.1f} dB")


if __name__ == "__main__":
    main()
