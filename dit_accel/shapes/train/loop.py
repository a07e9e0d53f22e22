"""One resumable training loop: learning rate schedule, moving average, checkpoints, a log line every few steps."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...files import staged

FIXED = ("steps", "warmup", "hold", "final_lr", "peak", "ema", "clip")  # settings that a run keeps to its end


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to write.

    Attributes:
        steps: optimizer steps in all.
        warmup: steps over which the learning rate rises from zero.
        hold: fraction of the steps over which the learning rate stays at its highest; then it falls linearly.
        final_lr: learning rate at the end, as a fraction of the highest.
        peak: highest learning rate, as a fraction of that of the optimizers.
        ema: decay of the moving average of the weights.
        clip: largest gradient norm.
        log_every: steps between log lines.
        save_every: steps between checkpoints.
    """

    steps: int
    warmup: int = 100
    hold: float = 0.5
    final_lr: float = 0.02
    peak: float = 1.0
    ema: float = 0.995
    clip: float = 1.0
    log_every: int = 25
    save_every: int = 200


def going_on(config: LoopConfig) -> LoopConfig:
    """The schedule for weights that are finished already: a small learning rate that falls to zero from the start.

    At the full rate, outlines had got worse after 1,000 steps; so, better after 700.
    """
    return replace(config, warmup=30, hold=0.0, final_lr=0.0, peak=0.15)


class Trainer:
    """Trains a module with one or more optimizers and can be killed at any time.

    Data must be a function of the step number, so that a resumed run sees what an uninterrupted one would have seen.
    Nothing here waits for a GPU, except log lines and checkpoints.

    Args:
        model: the module to train; its moving average is kept in :attr:`average`.
        optimizers: every optimizer that steps it; their initial learning rates are the highest of the schedule.
        config: see :class:`LoopConfig`.
        folder: where ``checkpoint.pt`` and ``log.jsonl`` live; a checkpoint found there is resumed.
        run: what a run depends on besides its schedule, such as where its weights and its data are from.

    Raises:
        ValueError: if the checkpoint is of another model, of other optimizers or of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        config: LoopConfig,
        folder: Path,
        run: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.optimizers, self.config, self.folder = model, optimizers, config, folder
        self.run: dict[str, Any] = {**{name: getattr(config, name) for name in FIXED}, **(run or {})}
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.average = {name: value.detach().clone().float() for name, value in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.loss: torch.Tensor | None = None  # moving average over the steps
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()
        self._drop_repeated()

    @property
    def checkpoint(self) -> Path:
        """The file that a later run resumes from."""
        return self.folder / "checkpoint.pt"

    def fit(self, loss_at: Callable[[int], torch.Tensor]) -> None:
        """Runs the remaining steps; ``loss_at(step)`` builds the batch of that step and returns its loss.

        Before each step the random number generators of all devices are seeded with its number.
        """
        started = time.perf_counter() - self.seconds
        while self.step < self.config.steps:
            torch.manual_seed(self.step)
            loss = loss_at(self.step)
            loss.backward()
            self._update()
            loss = loss.detach().float()
            self.loss = loss if self.loss is None else torch.lerp(self.loss, loss, 0.03)
            self.step += 1
            self.seconds = time.perf_counter() - started
            if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                self._log(float(self.loss))
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self._save()

    def load_average(self) -> None:
        """Puts the moving average into the model, for evaluation or export."""
        self.model.load_state_dict(self.average)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        scale = self._schedule()
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = get_ema_multi_avg_fn(min(self.config.ema, (1 + self.step) / (10 + self.step)))
        current = self.model.state_dict()
        average([self.average[name] for name in current], [value.float() for value in current.values()], self.step)

    def _schedule(self) -> float:
        config = self.config
        if self.step < config.warmup:
            return config.peak * (self.step + 1) / config.warmup
        progress = (self.step / config.steps - config.hold) / (1 - config.hold)
        return config.peak * (1 - (1 - config.final_lr) * max(0.0, progress))

    def _log(self, loss: float) -> None:
        line = json.dumps({"step": self.step, "loss": round(loss, 5), "seconds": round(self.seconds)})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        state = {
            "run": self.run,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        beside = self.checkpoint.with_suffix(".tmp")
        torch.save(state, beside)
        os.replace(beside, self.checkpoint)

    def _resume(self) -> None:
        device = next(self.model.parameters()).device
        state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        self._check_run(state.get("run", self.run))  # older checkpoints do not say
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            self.loss, self.average = state["loss"], state["average"]
        except (RuntimeError, ValueError, KeyError) as error:
            raise self._refused("it was written by another version of this model") from error
        print(f"resumed at step {self.step}", flush=True)

    def _check_run(self, stored: Mapping[str, Any]) -> None:
        names = [name for name in {**stored, **self.run} if stored.get(name) != self.run.get(name)]
        if names:
            raise self._refused("; ".join(f"{name} was {stored.get(name)}, is {self.run.get(name)}" for name in names))

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"cannot resume {self.checkpoint}: {reason}; delete it or choose another folder")

    def _drop_repeated(self) -> None:
        """Drops log lines of steps still to come: they were done after the last checkpoint, and will be again."""
        log = self.folder / "log.jsonl"
        text = log.read_text() if log.exists() else ""
        kept = "".join(line for line in text.splitlines(keepends=True) if _step_of(line) <= self.step)
        if kept != text:
            with staged(log) as (scratch,):
                scratch.write_text(kept)


def _step_of(line: str) -> float:
    """Step of a log line; infinity for half a line, which an interrupted write leaves."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
