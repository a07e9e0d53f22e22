"""Times radial attention against dense attention on the model that ships, in one run.

    python benchmarks/radial.py loop --frames 129          # the whole sampling loop
    python benchmarks/radial.py forward --grid 33x32x32    # one call of the transformer
    python benchmarks/radial.py forward --dtype bfloat16 --device cuda

Prints one JSON object with wall seconds of both, their ratio, and the difference of the results.  Plans are built, and
kernels compiled, before the clock starts.  Without an installation, put the root of the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.metrics import psnr
from dit_accel.processors import RadialAttnProcessor
from dit_accel.shapes import path
from dit_accel.shapes.compare import decibels

PROMPT = "a red circle moving left on a gray background"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipe = WanPipeline.from_pretrained(arguments.model or path("shapes-wan"), torch_dtype=DTYPES[arguments.dtype])
    pipe.to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    result = (loop if arguments.what == "loop" else forward)(pipe, arguments)
    result |= {
        "what": arguments.what,
        "processor": repr(_radial(arguments)),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dit_accel": dit_accel.__version__,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


def loop(pipe: WanPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense, radial and dense again from the same noise: seconds of the loop, PSNR of the decoded frames."""

    def generate(steps: int) -> torch.Tensor:
        return pipe(
            PROMPT,
            height=arguments.side,
            width=arguments.side,
            num_frames=arguments.frames,
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    generate(1)
    dense_seconds, dense = _timed(lambda: generate(arguments.steps))
    with dit_accel.accelerate(pipe, _radial(arguments)) as accelerated:
        generate(2)  # builds the plan: of two steps, the first may be dense
        accelerated.reset_report()
        radial_seconds, radial = _timed(lambda: generate(arguments.steps))
        report = accelerated.report()
    again_seconds, again = _timed(lambda: generate(arguments.steps))
    frames = [_decode(pipe, latents) for latents in (dense, radial, again)]
    return {
        "frames": arguments.frames,
        "side": arguments.side,
        "steps": arguments.steps,
        "dense_seconds": round(min(dense_seconds, again_seconds), 2),
        "radial_seconds": round(radial_seconds, 2),
        "speedup": round(min(dense_seconds, again_seconds) / radial_seconds, 3),
        "plan_density": report.plan_density,
        "density": report.density,
        "fallbacks": report.fallbacks,
        "psnr": decibels(psnr(frames[1], frames[0])),
        "noise_floor_psnr": decibels(psnr(frames[2], frames[0])),
    }


def forward(pipe: WanPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """One call of the transformer, dense and radial in turn: median seconds, relative difference of the output."""
    frames, height, width = (int(part) for part in arguments.grid.split("x"))
    channels = pipe.transformer.config.in_channels
    torch.manual_seed(0)
    shape, dtype = (1, channels, frames, 2 * height, 2 * width), DTYPES[arguments.dtype]
    inputs = {
        "hidden_states": torch.randn(shape, device=arguments.device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=arguments.device),
        "encoder_hidden_states": pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0],
    }
    run: Callable[[], torch.Tensor] = torch.no_grad()(lambda: pipe.transformer(**inputs, return_dict=False)[0])
    processor = RadialAttnProcessor(**_radial(arguments).settings() | {"dense_steps": 0})
    seconds: dict[str, list[float]] = {"dense": [], "radial": []}
    for _ in range(arguments.repeats):
        took, dense = _timed(run)
        seconds["dense"].append(took)
        with dit_accel.accelerate(pipe.transformer, processor) as accelerated:
            run()  # builds the plan
            took, radial = _timed(run)
            density = accelerated.report().plan_density
        seconds["radial"].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "grid": [frames, height, width],
        "tokens": frames * height * width,
        "dense_seconds": round(medians["dense"], 3),
        "radial_seconds": round(medians["radial"], 3),
        "speedup": round(medians["dense"] / medians["radial"], 3),
        "plan_density": density,
        "relative_error": float((radial.float() - dense.float()).norm() / dense.float().norm()),
    }


def _radial(arguments: argparse.Namespace) -> RadialAttnProcessor:
    return RadialAttnProcessor(
        block=arguments.block, decay=arguments.decay, dense_steps=arguments.dense_steps, dense_layers=1
    )


def _timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


@torch.no_grad()
def _decode(pipe: WanPipeline, latents: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(pipe.vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    video = pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype)).sample[0]
    return (video.float() / 2 + 0.5).clamp(0, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loop", "forward"))
    parser.add_argument("--frames", type=int, default=129, help="loop: frames of the video")
    parser.add_argument("--side", type=int, default=256, help="loop: height and width in pixels")
    parser.add_argument("--steps", type=int, default=20, help="loop: sampling steps")
    parser.add_argument("--grid", default="33x32x32", help="forward: tokens along frames, height, width")
    parser.add_argument("--repeats", type=int, default=3, help="forward: timed calls of each kind")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--dense-steps", type=float, default=0.24, help="share of the steps that stay dense")
    parser.add_argument("--model", help="pipeline folder (default: the one that ships)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and inputs")
    parser.add_argument("--threads", type=int)
    return parser


if __name__ == "__main__":
    main()
