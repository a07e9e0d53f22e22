"""Watches where a model looks: how the attention of each layer decays with the distance between frames.

Run: python examples/watch_attention.py
"""

from __future__ import annotations

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.shapes import path


def main() -> None:
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))
    tokens_per_frame = 16 * 16
    recorder = dit_accel.AttentionMassRecorder(block=tokens_per_frame, steps=(10, 11), branches=["cond"])
    with dit_accel.accelerate(pipe, controls=[recorder]):
        pipe(
            "a red circle moving left on a gray background",
            height=256,
            width=256,
            num_frames=33,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
        )
    for (_, where, step, branch), mass in recorder.masses.items():
        frames = mass.shape[-1]
        distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
        decay = [round(float(mass[:, distance == d].mean() * frames), 2) for d in range(frames)]
        print(f"{where} step {step} {branch}: attention by frame distance, 1 = uniform: {decay}")


if __name__ == "__main__":
    main()
