"""``dit-accel render``: a prompt becomes a video, dense, accelerated, or both side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import cache_options, method_options
from .errors import EnvironmentProblem, UsageError, one_line
from .values import real, whole

NAME = "render"
SUMMARY = "render a video from a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.usage = "%(prog)s PROMPT -o OUT.mp4 [options]"  # all of them would fill a page
    parser.add_argument("prompt", metavar="PROMPT", help="what to show")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4", help="the video to write")
    parser.add_argument(
        "--model", default="shapes-wan", help="shapes-wan (default), a diffusers folder, or a hub id (owner/name)"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument("--compare", action="store_true", help="render dense too (twice), and measure the difference")
    parser.add_argument(
        "--timed", action="store_true", help="split the model's time into attention, cache and all other"
    )
    parser.add_argument("--force", action="store_true", help="replace existing output files")
    sampling = parser.add_argument_group("sampling (defaults: the model's own)")
    add_sampling_arguments(sampling)
    sampling.add_argument("--fps", type=real(0, above=True), help="frames per second of the file")
    cache_options.add_arguments(parser)
    method_options.add_arguments(parser)
    add_machine_arguments(parser.add_argument_group("machine"))


def add_sampling_arguments(group: argparse._ArgumentGroup, seed: str = "random") -> None:
    """Declares what a pipeline's call depends on besides its prompts; ``seed`` says what it is if it is not given."""
    group.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps")
    group.add_argument("--seed", type=whole(0, 2**63 - 1), metavar="N", help=f"of the noise (default: {seed})")
    group.add_argument("--frames", type=whole(1), metavar="N", help="frames of the video")
    group.add_argument("--height", type=whole(1), metavar="PIXELS")
    group.add_argument("--width", type=whole(1), metavar="PIXELS")
    group.add_argument("--guidance", type=real(0), metavar="SCALE", help="classifier-free guidance scale")


def add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    """Declares where and in which precision a model runs."""
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32 on CPU)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    group.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")


def dense_options(prompt: str, **given: Any) -> argparse.Namespace:
    """Options of a dense rendering, for commands that sample as this one does, and write something else.

    Args:
        prompt: what to show.
        given: other options; those that are not given have their defaults.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--attention", "dense", "--output", "none.mp4", "--", prompt])
    vars(options).update(given)
    return options


def run(options: argparse.Namespace) -> int:
    """Checks everything cheap, loads the model, renders, writes, and reports."""
    from .outputs import Targets

    if not options.prompt.strip():
        raise UsageError('the prompt is empty; say what to show, such as "a red circle moving left on a ..."')
    targets = Targets.beside(options.output, options.compare, options.schedule_picture)
    targets.check_sources(_files_read(options))
    targets.check(options.force)
    _require_encoder()
    record = _render(options, targets)
    if options.json:
        print(json.dumps(record, allow_nan=False))
    else:
        from .summary import summarise

        print(summarise(record))
    return 0


def _files_read(options: argparse.Namespace) -> list[str | Path]:
    """What names files to read, or may do so: any text among the settings of a cache; and the model."""
    from .models import model_files

    named = (options.profile, options.gates, *(value for _, value in options.cache_option or ()))
    return [*(name for name in named if isinstance(name, (str, Path))), *model_files(options.model)]


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
