"""``dit-accel profile-blocks``: which blocks of a model look at the background, and may be skipped (ProfilingDiT)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EnvironmentProblem, UsageError, one_line
from .option import Option, option
from .render import add_machine_arguments, dense_options
from .values import real, steps, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_accel.caching.profiling import BlockProfile

    from .models import Model
    from .pipelines import Loaded
    from .settings import Settings

NAME = "profile-blocks"
USUAL_BUDGET, USUAL_SCHEDULE = 0.7, "uniform"
SUMMARY = "rank a model's blocks by what they attend to, or by the error of skipping them, for --cache profiling"


def _places(text: str) -> tuple[int, ...]:
    """Whole numbers from 0, with commas between."""
    return tuple(whole(0)(part) for part in text.split(","))


OPTIONS = {
    "profile": (
        option("rows", "queries looked at in each attention call (256)", type=whole(1), metavar="N"),
        option(
            "at",
            "steps to look at, from 0 (5) or as a part of all (0.5); sampling stops after the last (default: all)",
            type=steps,
            metavar="N,N",
        ),
        option(
            "subject_tokens",
            "places of the subject's words among the text tokens, from 0: what attends to them is foreground "
            "(default: what moves and stands out)",
            type=_places,
            metavar="N,N",
        ),
    ),
    "search": (
        option("objective", "error of the final latents, or of every output (latents)", choices=["latents", "output"]),
        option("trials", "swaps tried after the first choice (50)", type=whole(0), metavar="N"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="what to show; may be repeated"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="BLOCKS.json", help="the file to write")
    parser.add_argument(
        "--model", default="shapes-wan", help="shapes-wan (default), a diffusers folder, or a hub id (owner/name)"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    choice = parser.add_argument_group("choice")
    choice.add_argument(
        "--method", choices=list(OPTIONS), default="profile", help="attention to the foreground, or measured error"
    )
    size = choice.add_mutually_exclusive_group()
    size.add_argument(
        "--budget", type=real(0, above=True), metavar="PART", help=f"of the blocks to skip ({USUAL_BUDGET})"
    )
    size.add_argument("--speedup", type=real(1, above=True), metavar="X", help="predicted, by counting blocks")
    choice.add_argument(
        "--schedule",
        choices=["uniform", "shrinking"],
        help=f"steps that run all blocks, for --speedup and --method search ({USUAL_SCHEDULE})",
    )
    for method, options in OPTIONS.items():
        group = parser.add_argument_group(f"--method {method}")
        for each in options:
            each.add_to(group)
    sampling = parser.add_argument_group("sampling (defaults: the model's own)")
    sampling.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps")
    sampling.add_argument("--seed", type=whole(0, 2**62), default=0, metavar="N", help="of the noise (0)")
    sampling.add_argument("--frames", type=whole(1), metavar="N", help="frames of the video")
    sampling.add_argument("--height", type=whole(1), metavar="PIXELS")
    sampling.add_argument("--width", type=whole(1), metavar="PIXELS")
    sampling.add_argument("--guidance", type=real(0), metavar="SCALE", help="classifier-free guidance scale")
    add_machine_arguments(parser.add_argument_group("machine"))


def run(options: argparse.Namespace) -> int:
    """Checks everything cheap, loads the model, measures, writes, and reports."""
    from .models import locate, model_files
    from .outputs import checked_file

    out = checked_file(options.out, ".json", model_files(options.model), options.force)
    given, schedule = _own_options(options), _schedule(options)
    if options.budget is not None and options.budget >= 1:
        raise UsageError(f"--budget is the part of the blocks to skip, in (0, 1), got {options.budget:g}")
    from .pipelines import load
    from .settings import resolve

    model = locate(options.model, images=True)
    settings = resolve(_as_rendering(options), model)
    _check_model(options, model)
    if options.method == "search":
        _check_steps(schedule, settings.steps)
    given |= _looks(given.pop("at", None), settings.steps)
    loaded = load(model, settings, debug=options.debug)
    profile = _measure(options, loaded, settings, schedule, given)
    try:
        profile.save(out)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write '{out}': {one_line(error)}") from error
    report = {"file": str(out), **vars(profile)}
    print(json.dumps(report, allow_nan=False) if options.json else summary(profile, out))
    return 0


def summary(profile: BlockProfile, out: Path) -> str:
    """What was found, for people: one line for each block, those to skip first marked."""
    is_search = profile.method == "search"
    name = "error of skipping it alone" if is_search else "enrichment of the foreground (1: chance)"
    lines = [f"block  {name}"]
    lines += [
        f"{block:5}  {score:8.4f}{'  background' if block in profile.blocks else ''}"
        for block, score in enumerate(profile.scores)
    ]
    if is_search:
        lines.append(f"error of the chosen set: {profile.settings['error']:.4f}")
    else:
        lines.append(f"foreground: {profile.settings['foreground_share']:.0%} of the tokens")
    lines.append(f"wrote {out}: {len(profile.blocks)} of {profile.layers} blocks of {profile.model} may be skipped")
    return "\n".join(lines)


def _own_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the method that were given; refuses those of the other one."""
    for method, several in OPTIONS.items():
        foreign: Option | None = next((each for each in several if getattr(options, each.name) is not None), None)
        if foreign is not None and method != options.method:
            raise UsageError(
                f"{foreign.flag} does nothing with --method {options.method}; leave it out, or choose {method}"
            )
    names = [each.name for each in OPTIONS[options.method]]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _schedule(options: argparse.Namespace) -> str:
    """The one that was given, or the usual one; refuses one that nothing depends on."""
    given: str | None = options.schedule
    if given is not None and options.method == "profile" and options.speedup is None:
        raise UsageError("--schedule does nothing with --method profile and a budget; leave it out, or give --speedup")
    return given or USUAL_SCHEDULE


def _check_steps(schedule: str, count: int | None) -> None:
    """Refuses to search where the schedule skips nothing at any step: every error would be 0."""
    from dit_accel.caching.profiling.schedule import computed_steps, schedule_of

    if count is not None and len(computed_steps(schedule_of(schedule), count)) == count:
        raise UsageError(
            f"with {count} steps every block is computed at every step, so nothing can be measured; give more --steps"
        )


def _as_rendering(options: argparse.Namespace) -> argparse.Namespace:
    """What render would be told: the settings and checks of sampling are the same."""
    names = ("model", "negative_prompt", "steps", "seed", "frames", "height", "width", "guidance")
    given = {name: getattr(options, name) for name in (*names, "dtype", "device", "threads")}
    return dense_options(options.prompt[0], **given)


def _check_model(options: argparse.Namespace, model: Model) -> None:
    """Refuses UNets, unknown models, and prompts that the model does not know."""
    if any(not prompt.strip() for prompt in options.prompt):
        raise UsageError("a prompt is empty; say what to show")
    try:
        for prompt in options.prompt if model.shapes else ():
            model.shapes.check_prompt(prompt)  # type: ignore[union-attr]
        unets = [family.root_class for family in model.families() if "up_blocks" in family.block_lists]
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    if unets:
        raise UsageError(f"'{model.name}' is a {unets[0]}, which has no stack of equal blocks to choose from")


def _looks(at: tuple[int | float, ...] | None, count: int | None) -> dict[str, Any]:
    """The steps to look at, counted from 0."""
    if at is None:
        return {}
    from dit_accel.plan.schedule import step_index

    if count is None:
        raise UsageError("the pipeline takes no number of steps, so nobody knows which there will be to look at")
    found = sorted({step_index("--at", step, count) for step in at})
    if not found or found[-1] >= count:
        raise UsageError(f"--at names steps from 0 to {count - 1}, or parts of all below 1; got {list(at)}")
    return {"at": found}


def _measure(
    options: argparse.Namespace, loaded: Loaded, settings: Settings, schedule: str, given: dict[str, Any]
) -> BlockProfile:
    from dit_accel.caching.profiling import SubjectWords, profile_blocks, search_blocks
    from dit_accel.caching.profiling.budget import Budget

    from .jobs import limited_threads
    from .sampling import explained_errors

    with limited_threads(settings.threads), explained_errors():
        part = USUAL_BUDGET if options.budget is None else options.budget
        size = part if options.speedup is None else Budget(speedup=options.speedup, schedule=schedule)
        common: dict[str, Any] = {"steps": settings.steps, "budget": size, "seed": settings.seed, "tell": _tell}
        generate = _generator(loaded, settings, given.get("at"))
        call = {name: value for name, value in settings.call_arguments().items() if name != "prompt"}
        call.pop("num_inference_steps", None)
        if options.method == "search":
            extra: dict[str, Any] = {"schedule": schedule, "generate": generate, **common, **given}
            return search_blocks(loaded.pipe, options.prompt, **extra, **call)
        words = given.pop("subject_tokens", None)
        mask = None if words is None else SubjectWords(words)
        return profile_blocks(loaded.pipe, options.prompt, mask=mask, generate=generate, **common, **given, **call)


def _generator(loaded: Loaded, settings: Settings, at: list[int] | None) -> Callable[[Any, int], Any]:
    """Runs the pipeline up to its latents, or to the last step looked at; every prompt has noise of its own."""
    import torch

    from .watch import stopping, watched

    def generate(prompt: Any, number: int) -> Any:
        arguments = settings.call_arguments() | {"prompt": prompt, "output_type": "latent"}
        with watched(loaded.pipe, settings.steps, f"video {number + 1}") as (_, extra):
            extra = extra if at is None else stopping(extra, at[-1])
            return loaded.pipe(**arguments, **extra, generator=torch.Generator().manual_seed(settings.seed + number))

    return generate


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
