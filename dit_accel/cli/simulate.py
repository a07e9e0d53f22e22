"""``dit-accel simulate``: how sparse a plan is and what that should save, without running a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import neighborhood
from .errors import UsageError, one_line
from .option import Option, option
from .plain import plain
from .values import amounts, grid, real, whole

NAME = "simulate"
AT_RUN_TIME = {  # methods without a plan before they run, and what their settings say of its density
    "adaspa": "density keeps that part on average, and all of the text, after the dense steps and a dense search",
    "agent": "it has no plan at all; a call costs 2 scores for each token and agent, so agents say how many",
    "block_routing": "top_k keeps about the part it is given",
    "cluster": "density keeps the part it is given; top_p keeps what holds that part of the softmax",
    "compensated": "density keeps the part it is given; tau 1, 1.5 and 2 keep 16, 7 and 2.3 % of Gaussian scores",
    "grid": "density keeps about the part it is given, by whichever mask a head chooses",
    "learned_gate": "density keeps the part it is given; threshold keeps what the gate rates above it",
}
SUMMARY = "compute the exact density and the predicted speed-up of a sparse plan"
USUAL: dict[str, Any] = {"decay": 0.2, "rule": "authors", "mask": "block", "no_sink": False}  # of radial
OWN: dict[str, tuple[Option, ...]] = {  # by method, the options that no other one has
    "radial": (
        option("decay", f"decay factor (default: {USUAL['decay']})", type=real(0, above=True)),
        option("rule", f"whose mask (default: {USUAL['rule']})", choices=["authors", "paper"]),
        option("mask", f"of blocks or tokens (default: {USUAL['mask']})", choices=["block", "element"]),
        option("no_sink", "do not keep the first frame for every query", action="store_true"),
    ),
    "vmoba": (option("top_k", "cells for each query, or three (3,20,15)", type=amounts, metavar="N"),),
    "neighborhood": neighborhood.own_options(layers=False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument(
        "--method",
        choices=["radial", "neighborhood", *AT_RUN_TIME, "vmoba"],
        default="radial",
        help="which plan (default: radial)",
    )
    parser.add_argument("--grid", type=grid, required=True, metavar="FxHxW", help="video tokens, such as 18x48x80")
    parser.add_argument("--block", type=whole(1), default=128, help="tokens per block (default: 128)")
    parser.add_argument("--text", type=whole(0), default=0, help="text tokens after the video (default: 0)")
    for method, several in OWN.items():
        for each in several:
            each.add_to(parser, before=f"{method}: ")


def run(options: argparse.Namespace) -> int:
    """Prints the prediction; see :func:`predict`."""
    prediction = predict(options)
    if options.json:
        print(json.dumps(prediction, allow_nan=False))
        return 0
    rows = {**prediction, **prediction["assumptions"]}
    del rows["assumptions"]
    for part in [name for name, value in rows.items() if isinstance(value, dict)]:
        rows |= {f"{part}_{name}": value for name, value in rows.pop(part).items()}
    for name, value in rows.items():
        print(f"{name.replace('_', ' '):<20} {f'{value:.4f}' if isinstance(value, float) else value}")
    return 0


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Builds the plan and asks the model of its cost.

    Raises:
        UsageError: if the plan refuses the options, an option is another method's, or the method has no plan before
            it runs.
    """
    if options.method in AT_RUN_TIME:
        raise UsageError(
            f"what {options.method} computes depends on the queries and keys of each call, so its density is known "
            f"only at run time ({AT_RUN_TIME[options.method]}); use dit-accel render --attention {options.method}, "
            "which reports it"
        )
    _check_belonging(options)
    if options.method == "neighborhood":
        return neighborhood.predict(options)
    if options.method == "vmoba":
        from .simulate_vmoba import predict as predict_vmoba

        return predict_vmoba(options)
    return _predict_radial(options)


def _check_belonging(options: argparse.Namespace) -> None:
    """Refuses options that the method does not have."""
    for method, several in OWN.items():
        foreign = next((each for each in several if getattr(options, each.name) is not None), None)
        if foreign is not None and method != options.method:
            raise UsageError(
                f"{foreign.flag} does nothing with --method {options.method}; leave it out, or choose {method}"
            )


def _predict_radial(options: argparse.Namespace) -> dict[str, Any]:
    from dit_accel.plan import simulate
    from dit_accel.plan.radial import radial_plan

    given = {name: value for name in USUAL if (value := getattr(options, name)) is not None}
    chosen = USUAL | given
    settings: dict[str, Any] = {
        "block": options.block,
        "decay": chosen["decay"],
        "rule": chosen["rule"],
        "sink": not chosen["no_sink"],
        "text_tokens": options.text,
        "mask": chosen["mask"],
    }
    try:
        plan = radial_plan(options.grid, **settings)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    prediction: dict[str, Any] = plain(
        {
            "method": options.method,
            "grid": "x".join(map(str, options.grid)),
            "tokens": plan.q_len,
            **settings,
            "density": plan.stats.density,
            "predicted_speedup": simulate.predicted_speedup(plan),
            "assumptions": simulate.assumptions(),
        }
    )
    return prediction
