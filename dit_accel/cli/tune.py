"""``dit-accel tune``: the fastest feature cache that keeps a quality target, proven on real pairs, as a profile."""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import method_options
from .errors import EnvironmentProblem, UsageError, one_line
from .render import add_machine_arguments, add_sampling_arguments, dense_options
from .values import real

if TYPE_CHECKING:
    from dit_accel.quality import Profile
    from dit_accel.quality.target import Target

    from .models import Model
    from .settings import Settings

NAME = "tune"
SUMMARY = "find the fastest feature cache that keeps a quality target, and write it as a profile"
TARGETS = ("target_psnr", "target_ssim", "max_rel_error", "max_time")
WORLD_PROMPTS = (8, 4)  # of the shapes world, to tune on and held out, where none are given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.usage = '%(prog)s "PROMPT" ["PROMPT" ...] --target-psnr 28 -o profile.json [options]'
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to tune on; 4 to 8 that are typical")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PROFILE.json", help="the file to write")
    parser.add_argument(
        "--model", default="shapes-wan", help="shapes-wan (default), a diffusers folder, or a hub id (owner/name)"
    )
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="more prompts, one a line")
    parser.add_argument(
        "--held-out", action="append", default=[], metavar="PROMPT", help="for the last check; give it twice or "
        "more (default: the last quarter of the prompts, at least 2)"
    )  # fmt: skip
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    target = parser.add_argument_group("target (exactly one)")
    target.add_argument("--target-psnr", type=real(0, above=True), metavar="DB", help="against dense, same noise")
    target.add_argument("--target-ssim", type=real(0, above=True), metavar="SSIM", help="likewise, below 1")
    target.add_argument("--max-rel-error", type=real(0, above=True), metavar="ERROR", help="of the final latents")
    target.add_argument("--max-time", type=real(0, above=True), metavar="SECONDS", help="of a whole call")
    margin = parser.add_argument_group("margin")
    margin.add_argument(
        "--coverage", type=real(0.5), default=0.97, metavar="P", help="how surely one more prompt meets the "
        "target, by the spread over prompts (0.97)"
    )  # fmt: skip
    margin.add_argument("--worst-only", action="store_true", help="accept on the worst prompt, without a spread")
    margin.add_argument(
        "--min-speed-up", type=real(0, above=True), default=1.05, metavar="FACTOR", help="least that pays (1.05)"
    )
    margin.add_argument("--even-few-steps", action="store_true", help="tune few-step models too")
    add_sampling_arguments(parser.add_argument_group("sampling (defaults: the model's own)"), seed="0")
    method_options.add_arguments(parser, usual="dense; sparse attention counts as part of what is compared with dense")
    add_machine_arguments(parser.add_argument_group("machine"))


def run(options: argparse.Namespace) -> int:
    """Checks everything cheap, loads the model, tunes, writes, and reports."""
    from .models import locate, model_files
    from .outputs import checked_file

    reads = [*model_files(options.model), *filter(None, [options.prompt_file])]
    out, target = checked_file(options.out, ".json", reads, options.force), _target(options)
    if not options.coverage < 1:
        raise UsageError(f"--coverage is a probability in [0.5, 1), got {options.coverage:g}")
    from .pipelines import load
    from .settings import resolve

    model = locate(options.model, images=True)
    prompts, held_out = _prompts(options, model)
    settings = resolve(_as_rendering(options, prompts[0]), model)
    _check_family(model)
    loaded = load(model, settings, debug=options.debug)
    profile = _tune(options, loaded.pipe, settings, target, prompts, held_out)
    _write(profile, out)
    _progress(out).unlink(missing_ok=True)
    print(json.dumps(profile.to_json(), allow_nan=False) if options.json else _summary(profile, out))
    return 0


def _target(options: argparse.Namespace) -> Target:
    given = [name for name in TARGETS if getattr(options, name) is not None]
    if len(given) != 1:
        flags = [f"--{name.replace('_', '-')}" for name in TARGETS]
        raise UsageError(f"give exactly one of {', '.join(flags)}; got {len(given)}, for example --target-psnr 28")
    from dit_accel.quality.target import target_from

    try:
        return target_from(**{given[0]: getattr(options, given[0])})
    except ValueError as error:
        raise UsageError(one_line(error).replace(given[0], f"--{given[0].replace('_', '-')}")) from error


def _as_rendering(options: argparse.Namespace, prompt: str) -> argparse.Namespace:
    """What render would be told: the settings and checks of sampling are the same."""
    names = (
        "model",
        "frames",
        "height",
        "width",
        "steps",
        "guidance",
        "negative_prompt",
        "dtype",
        "device",
        "threads",
        "preset",
        *(each.name for each in method_options.all_options()),
    )
    given = {name: getattr(options, name) for name in names}
    return dense_options(prompt, **given, attention=options.attention or "dense", seed=options.seed or 0)


def _prompts(options: argparse.Namespace, model: Model) -> tuple[list[str], list[str]]:
    """Those to tune on, and those held out.

    Raises:
        UsageError: if there are too few, one is given twice, or the model does not know one.
    """
    found = [*options.prompts, *_lines(options.prompt_file)]
    if not found and not options.held_out and model.shapes is not None:
        return _world_prompts(model.shapes, options.seed or 0)
    held_out = list(options.held_out)
    if not held_out:
        count = max(2, len(found) // 4)
        found, held_out = found[:-count], found[-count:]
    everything = [*found, *held_out]
    if any(not prompt.strip() for prompt in everything):
        raise UsageError("a prompt is empty; say what to show in each")
    twice = next((prompt for prompt in everything if everything.count(prompt) > 1), None)
    if twice is not None:
        raise UsageError(f"every prompt counts once, and those held out are others; {twice!r} is given twice")
    if len(found) < 2 or len(held_out) < 2:
        raise UsageError(
            f"tuning needs at least 2 prompts and 2 held out, better 8 and 4; got {len(found)} and {len(held_out)}; "
            "give them as PROMPT, --held-out PROMPT or --prompt-file FILE"
        )
    try:
        for prompt in everything if model.shapes else ():
            model.shapes.check_prompt(prompt)  # type: ignore[union-attr]
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return found, held_out


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{file}': {one_line(error)}") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _world_prompts(info: Any, seed: int) -> tuple[list[str], list[str]]:
    """Sentences of the training split, and of the held-out one."""
    from dit_accel.shapes.world import held_out, sample_words

    basic, rng = info.subset == "basic", random.Random(seed)
    tuned: dict[str, None] = {}
    while len(tuned) < WORLD_PROMPTS[0]:
        objects = 1 if basic else rng.randint(1, 2)
        tuned[sample_words(rng, objects=objects, motion=info.motion, plain=basic).prompt] = None
    others = held_out("basic" if basic else "single", WORLD_PROMPTS[1], motion=info.motion)
    return list(tuned), [words.prompt for words in others]


def _check_family(model: Model) -> None:
    try:
        model.families()
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _tune(
    options: argparse.Namespace, pipe: Any, settings: Settings, target: Target, prompts: list[str], held_out: list[str]
) -> Profile:
    from dit_accel.quality import tune

    from .jobs import limited_threads
    from .sampling import explained_errors

    pipe.set_progress_bar_config(disable=True)
    call = settings.call_arguments()
    call.pop("prompt")
    wanted: dict[str, Any] = {target.keyword: target.value}
    with limited_threads(settings.threads), explained_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dit_accel: no cache is used for")  # the summary says so
        return tune(
            pipe,
            prompts=prompts,
            held_out=held_out,
            seed=settings.seed,
            coverage=None if options.worst_only else options.coverage,
            min_speed_up=options.min_speed_up,
            force=options.even_few_steps,
            beside=_beside(settings),
            tell=_tell,
            progress=_progress(options.out),
            **wanted,
            **call,
        )


def _progress(out: Path) -> Path:
    """Where pairs are kept until the profile is written, so that the same command goes on after it was cut off."""
    return out.expanduser().with_suffix(".tuning.jsonl")


def _beside(settings: Settings) -> dict[str, Any] | None:
    """The attention that runs with the cache, as arguments of ``accelerate()``; None for dense."""
    if settings.attention == "dense":
        return None
    return {"attention": settings.attention, "preset": settings.preset, **settings.method}


def _write(profile: Profile, out: Path) -> None:
    try:
        profile.save(out)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write '{out}': {one_line(error)}") from error


def _summary(profile: Profile, out: Path) -> str:
    """The table of what was run, what was chosen, and why."""
    floor = profile.noise_floor.get("psnr")
    lines = [f"target: {profile.target.describe()}"]
    if profile.candidates:
        lines += [f"noise floor: {_number(floor)} dB", *_table(profile.candidates)]
    lines += [f"alarm: {alarm}" for alarm in profile.alarms]
    lines.append(f"{'off' if profile.is_off else 'chosen'}: {_as_options(profile.reason)}")
    return "\n".join([*lines, f"wrote {out}"])


def _table(rows: tuple[dict[str, Any], ...]) -> list[str]:
    """Aligned columns; speed is wall time of dense over cached, one after the other."""
    head = ("speed", "min PSNR", "median", "min SSIM", "motion", "prompts", "verdict", "cache")
    cells = [head]
    for row in rows:
        motion = row.get("motion", {}).get("worst")
        cells.append(
            (
                _number(row["speed_up"]),
                _number(row["psnr"]["worst"]),
                _number(row["psnr"]["median"]),
                _number(row["ssim"]["worst"], 4),
                _number(motion),
                str(row["prompts"]),
                row["verdict"],
                row["cache"],
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(head) - 1)]
    return ["  ".join([*(part.ljust(width) for part, width in zip(line, widths, strict=False)), line[-1]])
            for line in cells]  # fmt: skip


def _number(value: float | str | None, digits: int = 2) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def _tell(message: str) -> None:
    print(_as_options(message), file=sys.stderr, flush=True)


def _as_options(text: str) -> str:
    """What the library says of an argument of ``tune()``, said of the option that stands for it."""
    return text.replace("force=True tunes all the same", "--even-few-steps tunes all the same")
