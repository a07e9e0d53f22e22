"""Draws the picture of the README: one clip of the shipped model, dense above, radial attention below.

python benchmarks/picture.py --out docs/images/dense-and-radial.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw

import dit_accel
from dit_accel.metrics import psnr
from dit_accel.shapes import path
from dit_accel.shapes.info import read_info

FRAMES = (0, 8, 16, 24, 32)
GAP, CAPTION = 6, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red circle moving right on a gray background")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, help="(default: the model's own)")
    parser.add_argument("--side", type=int, default=192, help="of each frame in the picture, in pixels")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pipe, info = WanPipeline.from_pretrained(path("shapes-wan")), read_info(path("shapes-wan"))

    def render() -> torch.Tensor:
        frames = pipe(
            arguments.prompt,
            height=info.height,
            width=info.width,
            num_frames=max(FRAMES) + 1,
            num_inference_steps=arguments.steps or info.steps,
            guidance_scale=info.guidance,
            generator=torch.Generator().manual_seed(arguments.seed),
        ).frames[0]
        return torch.as_tensor(frames)

    dense = render()
    with dit_accel.accelerate(pipe, "radial", **info.attention) as accelerated:
        radial = render()
        density = accelerated.report().density
    captions = (
        f"dense: {arguments.prompt}",
        f"radial: {density:.0%} of the pairs, PSNR {psnr(radial, dense):.1f} dB against dense",
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet((dense, radial), captions, arguments.side).save(arguments.out)


def sheet(clips: tuple[torch.Tensor, ...], captions: tuple[str, ...], side: int) -> Image.Image:
    """One row of frames per clip ``[frames, height, width, 3]`` in [0, 1], a caption above each."""
    row = side + CAPTION + GAP
    image = Image.new("RGB", (len(FRAMES) * (side + GAP) - GAP, len(clips) * row), "white")
    draw = ImageDraw.Draw(image)
    for number, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        draw.text((2, number * row + 2), caption, fill="black")
        for place, frame in enumerate(FRAMES):
            pixels = (clip[frame] * 255).round().to(torch.uint8).numpy()
            image.paste(Image.fromarray(pixels).resize((side, side)), (place * (side + GAP), number * row + CAPTION))
    return image


if __name__ == "__main__":
    main()
