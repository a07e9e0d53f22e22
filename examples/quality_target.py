"""A quality target instead of thresholds: finds a cache that keeps 28 dB on the small Wan that ships, and uses it.

It takes some minutes on a CPU: every prompt is rendered dense, and the best caches run for real on all of them.

Run: python examples/quality_target.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.metrics import psnr
from dit_accel.shapes import path

SETTINGS: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 9,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
}
PROMPTS = [
    "a red circle moving left on a gray background",
    "a yellow triangle moving up on a black background",
    "a blue square moving down on a white background",
    "a green circle moving right on a black background",
]
HELD_OUT = [  # they take part in nothing but the last check
    "a white triangle moving left on a gray background",
    "a blue circle moving up on a white background",
]
ANOTHER = "a red square moving right on a gray background"


def render(pipe: WanPipeline) -> torch.Tensor:
    """One clip from the same noise each time, ``[frames, 3, height, width]`` in 0 to 1."""
    generator = torch.Generator().manual_seed(99)
    return pipe(ANOTHER, **SETTINGS, generator=generator, output_type="pt").frames[0]


def main() -> None:
    pipe = WanPipeline.from_pretrained(path("shapes-wan"))
    pipe.set_progress_bar_config(disable=True)

    # coverage=None accepts on the worst prompt alone. The default also counts how much prompts differ, for the sake of
    # prompts unseen: with as few as here that costs much speed, so give it eight or more.
    profile = dit_accel.tune(
        pipe, target_psnr=28, prompts=PROMPTS, held_out=HELD_OUT, coverage=None, tell=print, **SETTINGS
    )
    print(f"wrote {profile.save(Path('profile.json'))}; {'off' if profile.is_off else 'chosen'}: {profile.reason}")

    # A prompt that tuning never saw. The profile knows its cache, and refuses another number of steps.
    dense = render(pipe)
    with dit_accel.accelerate(pipe, profile="profile.json") as accelerated:
        frames = render(pipe)
    print(f"PSNR against dense {psnr(frames, dense):.1f} dB")
    for cache in accelerated.report().caches:  # none if the profile is off
        print(f"computed steps: {cache.computed_steps['transformer']['cond']}")


if __name__ == "__main__":
    main()
