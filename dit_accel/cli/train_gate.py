"""``dit-accel train-gate``: block gates for a model, from its own attention on a few prompts."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EnvironmentProblem, UsageError, one_line
from .render import add_machine_arguments, dense_options
from .values import real, whole

if TYPE_CHECKING:
    from dit_accel.gates.files import Gates

    from .models import Model
    from .pipelines import Loaded
    from .settings import Settings

NAME = "train-gate"
SUMMARY = "train the gates of --attention learned_gate on a model's own attention"
MOST_PROMPTS = 200  # of the shapes world: it has 224 basic sentences to train on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument(
        "--model", default="shapes-wan", help="shapes-wan (default), a diffusers folder, or a hub id (owner/name)"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="GATES.safetensors", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--prompts", type=whole(1, MOST_PROMPTS), default=8, metavar="N", help="to learn from (8)")
    parser.add_argument("--held-out", type=whole(1, 64), default=4, metavar="N", help="to measure recall on (4)")
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="one prompt a line, those to learn from first; for models "
        "outside the shapes world"
    )  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument(
        "--teacher", choices=["mass", "max"], default="mass", help="a block's softmax (mass), or its greatest weight"
    )
    training.add_argument("--steps", type=whole(1), default=300, metavar="N", help="of training (300)")
    training.add_argument("--batch", type=whole(1), default=16, metavar="N", help="recorded calls in a step (16)")
    training.add_argument("--d-gate", type=whole(1, 1024), default=32, metavar="N", help="channels of the gate (32)")
    training.add_argument("--learning-rate", type=real(0, above=True), default=1e-3, metavar="RATE", help="(0.001)")
    training.add_argument("--block", type=int, choices=(64, 128), default=64, help="tokens per block (64)")
    training.add_argument("--density", type=real(0, above=True), default=0.25, help="at which recall is measured")
    training.add_argument(
        "--samples", type=whole(1), default=5, metavar="N", help="sampling steps recorded of each video (5)"
    )
    training.add_argument("--rows", type=whole(1), metavar="N", help="query blocks kept of each call (all)")
    sampling = parser.add_argument_group("sampling (defaults: the model's own)")
    sampling.add_argument("--sampling-steps", type=whole(1), metavar="N", help="denoising steps")
    sampling.add_argument("--seed", type=whole(0, 2**62), default=0, metavar="N", help="of noise and weights (0)")
    sampling.add_argument("--frames", type=whole(1), metavar="N", help="frames of the videos")
    sampling.add_argument("--height", type=whole(1), metavar="PIXELS")
    sampling.add_argument("--width", type=whole(1), metavar="PIXELS")
    sampling.add_argument("--guidance", type=real(0), metavar="SCALE", help="classifier-free guidance scale")
    add_machine_arguments(parser.add_argument_group("machine"))


def run(options: argparse.Namespace) -> int:
    """Checks everything cheap, loads the model, records, trains, writes, and reports."""
    from .models import locate, model_files
    from .outputs import checked_file

    reads = [*model_files(options.model), *filter(None, [options.prompt_file])]
    out = checked_file(options.out, ".safetensors", reads, options.force)
    _check_numbers(options)
    from .pipelines import load
    from .settings import resolve

    model = locate(options.model, images=True)
    prompts = _prompts(options, model)
    settings = resolve(_as_rendering(options, prompts[0]), model)
    _check_family(model)
    loaded = load(model, settings, debug=options.debug)
    gates = _train(options, loaded, settings, prompts)
    _write(gates, out)
    report = {"model": options.model, "file": str(out), "family": gates.family, "d_gate": gates.d_gate}
    report |= {"block": gates.block, "layers": gates.layers, "training": gates.training}
    print(json.dumps(report, allow_nan=False) if options.json else _summary(gates, out))
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    if options.density > 1:
        raise UsageError(f"--density is the part of all blocks to keep, in (0, 1], got {options.density:g}")


def _as_rendering(options: argparse.Namespace, prompt: str) -> argparse.Namespace:
    """What render would be told: the settings and checks of sampling are the same."""
    names = ("model", "seed", "frames", "height", "width", "guidance", "dtype", "device", "threads")
    given = {name: getattr(options, name) for name in names}
    return dense_options(prompt, **given, steps=options.sampling_steps)


def _prompts(options: argparse.Namespace, model: Model) -> list[str]:
    """Those to learn from, then those held out.

    Raises:
        UsageError: if there are too few, or the model does not know one.
    """
    count = options.prompts + options.held_out
    if options.prompt_file is None:
        if model.shapes is None:
            raise UsageError(f"'{model.name}' is no model of the shapes world; give prompts by --prompt-file")
        return _world_prompts(options, model.shapes)
    try:
        lines = options.prompt_file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{options.prompt_file}': {one_line(error)}") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))[:count]
    if len(found) < count:
        raise UsageError(
            f"'{options.prompt_file}' has {len(found)} different prompts; --prompts {options.prompts} and --held-out "
            f"{options.held_out} need {count}"
        )
    try:
        for prompt in found if model.shapes else ():
            model.shapes.check_prompt(prompt)  # type: ignore[union-attr]
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return found


def _world_prompts(options: argparse.Namespace, info: Any) -> list[str]:
    """Sentences of the training split, then of the held-out one."""
    from dit_accel.shapes.world import held_out, sample_words

    basic, rng = info.subset == "basic", random.Random(options.seed)
    learned: dict[str, None] = {}
    while len(learned) < options.prompts:
        objects = 1 if basic else rng.randint(1, 2)
        learned[sample_words(rng, objects=objects, motion=info.motion, plain=basic).prompt] = None
    return [*learned, *(words.prompt for words in held_out("basic" if basic else "single", options.held_out,
                                                           motion=info.motion))]  # fmt: skip


def _check_family(model: Model) -> None:
    """Refuses unknown models, and those whose attention hides padding, which gates cannot tell from other tokens."""
    from dit_accel.families import Family

    try:
        families = model.families()
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    # The class has the default, by which there is no padding.
    padded = [family.root_class for family in families if family.padding is not Family.padding]
    if padded:
        raise UsageError(
            f"'{model.name}' is a {padded[0]}, which pads its text, and gates cannot tell padding from other tokens; "
            "every other method runs on it"
        )


def _train(options: argparse.Namespace, loaded: Loaded, settings: Settings, prompts: list[str]) -> Gates:
    from dit_accel.gates.distill import distill
    from dit_accel.gates.train import GateTraining

    from .jobs import limited_threads
    from .sampling import explained_errors

    numbers = {
        name: getattr(options, name) for name in ("teacher", "steps", "d_gate", "batch", "learning_rate", "seed")
    }
    chosen = {name: getattr(options, name) for name in ("block", "samples", "rows", "density")}
    split = prompts[: options.prompts], prompts[options.prompts :]
    with limited_threads(settings.threads), explained_errors():
        generate = _generator(loaded, settings)
        return distill(loaded.pipe, *split, generate, training=GateTraining(**numbers), **chosen, tell=_tell)


def _generator(loaded: Loaded, settings: Settings) -> Any:
    """Runs the pipeline up to its latents; every prompt has noise of its own."""
    import torch

    from .watch import watched

    def generate(prompt: str, number: int) -> None:
        arguments = settings.call_arguments() | {"prompt": prompt, "output_type": "latent"}
        with watched(loaded.pipe, settings.steps, f"video {number + 1}") as (_, extra):
            loaded.pipe(**arguments, **extra, generator=torch.Generator().manual_seed(settings.seed + number))

    return generate


def _write(gates: Gates, out: Path) -> None:
    from dit_accel.gates.files import save_gates

    try:
        save_gates(gates, out)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write '{out}': {one_line(error)}") from error


def _summary(gates: Gates, out: Path) -> str:
    loss, recall, seconds = (gates.training[name] for name in ("loss", "held_out_recall", "seconds"))
    return "\n".join(
        (
            f"wrote {out}: gates of {len(gates.sites)} attention modules of {gates.family}",
            f"loss {loss['first']:.3f} -> {loss['last']:.3f}; recording {seconds['recording']:.0f} s, training "
            f"{seconds['training']:.0f} s",
            f"softmax held by {recall['density']:.0%} of the blocks on held-out prompts: gate {recall['gate']:.3f}, "
            f"pooled scores {recall['pooled']:.3f}, the best blocks {recall['mass']:.3f}",
        )
    )


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
