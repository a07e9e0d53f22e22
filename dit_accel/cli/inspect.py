"""``dit-accel inspect``: what the attention of a model looks like, and which sparse method suits it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError, one_line
from .inspect_files import FILES, check_folder, write_report
from .render import add_machine_arguments, add_sampling_arguments, dense_options
from .values import real, steps

if TYPE_CHECKING:
    from dit_accel.inspect import InspectionRecorder
    from dit_accel.inspect.methods import Candidate

    from .models import Model
    from .pipelines import Loaded
    from .settings import Settings

NAME = "inspect"
SUMMARY = "measure a model's attention, layer by layer, and compare methods on it"
LOOKS = 2  # steps that are looked at unless told otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to show meanwhile")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help=f"where to write {' and '.join(FILES)}"
    )
    parser.add_argument(
        "--model", default="shapes-wan", help="shapes-wan (default), a diffusers folder, or a hub id (owner/name)"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    looking = parser.add_argument_group("looking")
    looking.add_argument(
        "--at",
        type=steps,
        metavar="N,N",
        help=f"steps to look at, from 0 (5) or as a part of all (0.5); (default: {LOOKS}, spread evenly)",
    )
    looking.add_argument("--density", type=real(0, above=True), default=0.25, help="to compare methods at (0.25)")
    looking.add_argument("--methods", metavar="NAME,NAME", help="to compare, or none (default: all that can act)")
    add_sampling_arguments(parser.add_argument_group("sampling (defaults: the model's own)"))
    add_machine_arguments(parser.add_argument_group("machine"))


def run(options: argparse.Namespace) -> int:
    """Checks everything cheap, loads the model, samples, writes the report, and says what it found."""
    if not options.prompt.strip():
        raise UsageError('the prompt is empty; say what to show, such as "a red circle moving left on a ..."')
    if options.density > 1:
        raise UsageError(f"--density is a part of all pairs, in (0, 1], got {options.density:g}")
    check_folder(options.out, options.force)
    report, pictures = inspect_model(options)
    from dit_accel.inspect.page import report_page
    from dit_accel.inspect.page.words import sentences, suggestion_code

    page = report_page(report, pictures)
    files = write_report(options.out, report, page)
    if options.json:
        print(json.dumps(report | {"files": files}, allow_nan=False))
        return 0
    code = suggestion_code(report)
    lines = [*sentences(report), *(["settings to try:", code] if code else []), f"wrote {', '.join(files)}"]
    print("\n".join(lines))
    return 0


def inspect_model(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Samples once and measures.

    Returns:
        the report as it is written to the JSON file, and the pictures of each layer.

    Raises:
        UsageError: if the options do not fit the model, or the model has nothing to measure.
        EnvironmentProblem: if the model cannot be loaded or memory does not suffice.
    """
    from dit_accel.inspect import InspectionRecorder
    from dit_accel.inspect.report import build_report

    from .jobs import limited_threads
    from .models import locate
    from .pipelines import load
    from .plain import plain

    model = locate(options.model, images=True)
    settings = _settings(options, model)
    at = _steps_to_look_at(options.at, settings.steps)
    candidates, refused = _candidates(options, model)
    recorder = InspectionRecorder(at, candidates)
    loaded = load(model, settings, debug=options.debug)
    with limited_threads(settings.threads):
        seconds = _sample(loaded, settings, recorder)
        environment = _environment(settings)  # which counts the threads
    try:
        report = build_report(
            recorder,
            settings=_record(settings),
            environment=environment,
            density=options.density,
            not_compared=refused,
            seconds=seconds,
        )
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return plain(report), recorder.pictures()


def _settings(options: argparse.Namespace, model: Model) -> Settings:
    """What render would do with the same options, dense."""
    from .settings import ARGUMENTS, resolve

    names = (*ARGUMENTS, "model", "seed", "device", "dtype", "threads")
    return resolve(dense_options(options.prompt, **{name: getattr(options, name) for name in names}), model)


def _steps_to_look_at(wanted: tuple[int | float, ...] | None, count: int | None) -> list[int]:
    from dit_accel.inspect.recorder import spread
    from dit_accel.plan.schedule import step_index

    if count is None:
        raise UsageError("the pipeline takes no number of steps, so nobody knows which there will be to look at")
    if wanted is None:
        return spread(count, LOOKS)
    found = [step_index("--at", step, count) for step in wanted]
    if not found or max(found) >= count:
        raise UsageError(f"--at names steps from 0 to {count - 1}, or parts of all below 1; got {list(wanted)}")
    return sorted(set(found))


def _candidates(options: argparse.Namespace, model: Model) -> tuple[list[Candidate], dict[str, str]]:
    from dit_accel.inspect.methods import candidates

    if options.methods == "none":
        return [], {}
    names = None if options.methods is None else [name.strip() for name in options.methods.split(",")]
    try:
        return candidates(names, options.density, model.families())
    except ValueError as error:
        raise UsageError(f"{one_line(error)} (--methods none measures without comparing)") from error


def _sample(loaded: Loaded, settings: Settings, recorder: InspectionRecorder) -> float:
    """Runs the pipeline up to the last step to look at, and returns the seconds that took."""
    import torch

    from dit_accel import accelerate

    from .sampling import explained_errors
    from .watch import stopping, watched

    pipe, last = loaded.pipe, max(recorder.at)
    start = time.perf_counter()
    with (
        watched(pipe, last + 1, "inspect") as (_, extra),
        explained_errors(),
        accelerate(pipe, controls=[recorder]),
    ):
        pipe(
            **settings.call_arguments(),
            **stopping(extra, last),
            generator=torch.Generator().manual_seed(settings.seed),
            output_type="latent",
        )
    seconds = time.perf_counter() - start
    print(f"inspect: {seconds:.2f} s", file=sys.stderr)
    return seconds


def _record(settings: Settings) -> dict[str, Any]:
    left_out = ("attention", "compare", "fps")
    return {name: value for name, value in settings.record().items() if name not in left_out}


def _environment(settings: Settings) -> dict[str, Any]:
    from dit_accel.machine import device_name

    from .versions import versions

    return {**versions(), "machine": device_name(settings.device)}
