"""``dit-accel render``: a prompt becomes a video, dense, accelerated, or both side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import neighborhood
from .errors import EnvironmentProblem, UsageError, one_line
from .values import amounts, dense_layers, dense_steps, grid, patch, real, steps, whole

NAME = "render"
SUMMARY = "render a video from a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to show")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4", help="the video to write")
    parser.add_argument(
        "--model", default="shapes-wan", help="shapes-wan (default), a diffusers folder, or a hub id (owner/name)"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument("--compare", action="store_true", help="render dense too, and measure the difference")
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    _add_sampling_arguments(parser.add_argument_group("sampling (defaults: the model's own)"))
    attention = parser.add_argument_group("attention")
    _add_attention_arguments(attention)
    _add_vmoba_arguments(attention)
    neighborhood.add_arguments(attention)
    _add_machine_arguments(parser.add_argument_group("machine"))


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps")
    group.add_argument("--seed", type=whole(0, 2**63 - 1), metavar="N", help="of the noise (default: random)")
    group.add_argument("--frames", type=whole(1), metavar="N", help="frames of the video")
    group.add_argument("--height", type=whole(1), metavar="PIXELS")
    group.add_argument("--width", type=whole(1), metavar="PIXELS")
    group.add_argument("--guidance", type=real(0), metavar="SCALE", help="classifier-free guidance scale")
    group.add_argument("--fps", type=real(0, above=True), help="frames per second of the file")


def _add_attention_arguments(group: argparse._ArgumentGroup) -> None:
    methods = ["radial", "neighborhood", "adaspa", "block_routing", "compensated", "vmoba", "dense"]
    group.add_argument("--attention", choices=methods, default="radial", help="(default: radial)")
    group.add_argument("--block", type=whole(1), metavar="TOKENS", help="size of the blocks kept or skipped")
    group.add_argument("--dense-steps", type=dense_steps, metavar="N", help="first steps (12, or 0.25 of all) dense")
    group.add_argument("--dense-layers", type=dense_layers, metavar="N", help="first layers, or a list (0,3), dense")
    group.add_argument(
        "--backend", choices=["auto", "triton", "gather", "reference"], help="kernels to use (default: auto)"
    )
    group.add_argument("--decay", type=real(0, above=True), help="radial: how fast the kept width shrinks")
    group.add_argument("--rule", choices=["authors", "paper"], help="radial: the code's mask, or the paper's")
    group.add_argument("--mask", choices=["block", "element"], help="radial: mask whole blocks, or single tokens")
    group.add_argument(
        "--score", choices=["pooled", "sub_block", "mass"], help="block_routing: what a block is judged by"
    )
    group.add_argument("--select", choices=["top_k", "top_p", "threshold"], help="which blocks or cells are kept")
    group.add_argument(
        "--amount", type=amounts, help="how many, in the unit of --select; vmoba: or three (3,20,15), by partition"
    )
    group.add_argument("--search-every", type=whole(1), metavar="N", help="steps between searches")
    shared, first = "one list of blocks for all heads", "keep the first frame for all"
    group.add_argument("--head-shared", action="store_true", default=None, help=f"block_routing: {shared}")
    group.add_argument("--first-frame", action="store_true", default=None, help=f"block_routing: {first}")
    group.add_argument("--tau", type=float, help="compensated: standard deviations that exact blocks stand out by")
    group.add_argument("--variance", choices=["diag", "exact"], help="compensated: how the deviation is found")
    group.add_argument("--density", type=real(0, above=True), help="part of all blocks to keep, in (0, 1]")
    group.add_argument("--morton", action="store_true", default=None, help="compensated: blocks along Morton's curve")
    group.add_argument(
        "--compensate", action=argparse.BooleanOptionalAction, help="whether blocks left out count by their means"
    )
    _add_adaspa_arguments(group)


def _add_adaspa_arguments(group: argparse._ArgumentGroup) -> None:
    levels, lse = "whether heads with recall to spare give blocks to others", "whether it uses the row sums of before"
    group.add_argument("--levels", action=argparse.BooleanOptionalAction, help=f"adaspa: {levels}")
    group.add_argument("--recall", type=real(0, above=True), help="adaspa: part of the softmax to keep, for --density")
    group.add_argument("--recall-over", choices=["row", "head"], help="adaspa: who reaches it")
    group.add_argument("--min-density", type=real(0), help="adaspa: part of all blocks that --recall keeps at least")
    group.add_argument("--max-density", type=real(0, above=True), help="adaspa: part that it keeps at most")
    group.add_argument("--search-again", type=steps, metavar="N,N", help="adaspa: later searches (30, or 0.6 of all)")
    group.add_argument("--drift", type=real(0, above=True), help="adaspa: search if means of blocks turned so far")
    group.add_argument("--cache-lse", action=argparse.BooleanOptionalAction, help=f"adaspa: {lse}")


def _add_vmoba_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--chunk", type=whole(1), metavar="N", help="vmoba: frames of a chunk, for every third layer")
    group.add_argument("--patch", type=patch, metavar="HxW", help="vmoba: patches over all frames, the next layer")
    group.add_argument("--cube", type=grid, metavar="FxHxW", help="vmoba: cubes, the layer after that")
    group.add_argument("--scope", choices=["query", "cell", "head", "all"], help="vmoba: among whose cells to choose")
    group.add_argument("--boundaries", choices=["cut", "keep"], help="vmoba: key blocks that hold several cells")


def _add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32 on CPU)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    group.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")


def run(options: argparse.Namespace) -> int:
    """Checks everything cheap, loads the model, renders, writes, and reports."""
    from .outputs import Targets

    if not options.prompt.strip():
        raise UsageError('the prompt is empty; say what to show, such as "a red circle moving left on a ..."')
    targets = Targets.beside(options.output, options.compare)
    targets.check(options.force)
    _require_encoder()
    record = _render(options, targets)
    if options.json:
        print(json.dumps(record, allow_nan=False))
    else:
        from .summary import summarise

        print(summarise(record))
    return 0


def _require_encoder() -> None:
    try:
        from dit_accel.video import require_encoder

        require_encoder()
    except ImportError as error:
        raise EnvironmentProblem(f"videos cannot be written: {one_line(error)}; pip install av") from error


def _render(options: argparse.Namespace, targets: Any) -> dict[str, Any]:
    from .jobs import render_job
    from .models import locate
    from .outputs import write_outputs
    from .pipelines import load
    from .settings import resolve

    model = locate(options.model)
    settings = resolve(options, model)
    loaded = load(model, settings, debug=options.debug)
    job = render_job(loaded, settings)
    return write_outputs(targets, settings, job)
