"""``dit-accel simulate``: how sparse a plan is and what that should save, without running a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import neighborhood
from .errors import UsageError, one_line
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
    parser.add_argument("--decay", type=real(0, above=True), default=0.2, help="decay factor (default: 0.2)")
    parser.add_argument("--rule", choices=["authors", "paper"], default="authors", help="(default: authors)")
    parser.add_argument("--mask", choices=["block", "element"], default="block", help="(default: block)")
    parser.add_argument("--text", type=whole(0), default=0, help="text tokens after the video (default: 0)")
    parser.add_argument("--top-k", type=amounts, metavar="N", help="vmoba: cells for each query, or three (3,20,15)")
    parser.add_argument("--no-sink", action="store_true", help="do not keep the first frame for every query")
    neighborhood.add_arguments(parser, layers=False)


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
        UsageError: if the plan refuses the options, or the method has none before it runs.
    """
    if options.method == "neighborhood":
        return neighborhood.predict(options)
    if options.method == "vmoba":
        from .simulate_vmoba import predict as predict_vmoba

        return predict_vmoba(options)
    if options.method in AT_RUN_TIME:
        raise UsageError(
            f"what {options.method} computes depends on the queries and keys of each call, so its density is known "
            f"only at run time ({AT_RUN_TIME[options.method]}); use dit-accel render --attention {options.method}, "
            "which reports it"
        )
    from dit_accel.plan import simulate
    from dit_accel.plan.radial import radial_plan

    settings = {
        "block": options.block,
        "decay": options.decay,
        "rule": options.rule,
        "sink": not options.no_sink,
        "text_tokens": options.text,
        "mask": options.mask,
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
