"""Who takes part in the table of caches: presets at several settings, alone and with sparsity, and those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...caching.policies.magnitude import magnitude_ratios, token_norms
from ...clock import StepState
from ...install.blocks import BlockHook, BlockInfo
from .contender import PRESETS, TOGETHER, Contender, Options
from .peers import peers

WAN = {"model": "Wan 2.1 T2V 1.3B"}  # the smallest model that coefficients were published for


@dataclass(frozen=True)
class PresetContender(Contender):
    """A preset of ours, with or without a sparse method.

    Attributes:
        preset: its name; ``""`` for sparse attention alone.
        attention: name of the method; None for dense attention.
        options: of the method.
    """

    preset: str = ""
    attention: str | None = None
    options: Options = field(default_factory=dict)

    @property
    def key(self) -> Options:
        """See :attr:`Contender.key`; of a sparse method, the method and its settings too."""
        if self.attention is None:
            return self.settings
        return {**self.settings, "attention": self.attention, "options": self.options}

    def install(self, pipe: Any, steps: int, found: Options) -> Any:
        """See :meth:`Contender.install`."""
        import dit_accel

        given = self._given({**self.settings, **found})
        return dit_accel.accelerate(pipe, self.attention, **given, **self.options)

    def _given(self, settings: Options) -> Options:
        """The cache, as ``accelerate`` takes it."""
        return {"cache": self.preset, "cache_settings": settings} if self.preset else {}

    def remove(self, pipe: Any) -> None:
        """See :meth:`Contender.remove`."""
        import dit_accel

        acceleration = dit_accel.acceleration_of(pipe)
        if acceleration is not None:
            acceleration.remove()


@dataclass(frozen=True)
class MagCacheContender(PresetContender):
    """Our magcache with the ratios of the model itself, from one dense generation."""

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        """See :meth:`Contender.calibrate`; of several branches the first counts."""
        import dit_accel

        recorder = ResidualNorms()
        with dit_accel.accelerate(pipe, block_hooks=[recorder]):
            generate()
        return {"ratios": list(magnitude_ratios([recorder.norms[step] for step in sorted(recorder.norms)]))}


@dataclass(frozen=True)
class ProfilingContender(PresetContender):
    """ProfilingDiT with the blocks that a profile of the model itself chooses.

    Attributes:
        budget: part of the blocks that is background.
    """

    budget: float = 0.5

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        """See :meth:`Contender.calibrate`."""
        from ...caching.profiling import profile_blocks

        profile = profile_blocks(
            pipe, "the prompt that generate() has", steps=steps, budget=self.budget, generate=lambda *_: generate()
        )
        return {"background": list(profile.blocks)}

    def _given(self, settings: Options) -> Options:
        from ...caching.presets.profiling import profiling

        return {"cache": profiling(**settings)}

    def shares_calibration(self, other: Contender) -> bool:
        """See :meth:`Contender.shares_calibration`."""
        return isinstance(other, ProfilingContender) and other.budget == self.budget


class ResidualNorms(BlockHook):
    """Notes how long the residual of all blocks is at every token, for the first branch of each step.

    Attributes:
        norms: ``[batch, tokens]`` by step.
    """

    def __init__(self) -> None:
        self.norms: dict[int, Tensor] = {}
        self._entered: Tensor | None = None

    def around(self, block: BlockInfo, state: StepState, run: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        """Runs the block; its main stream is its first argument, and what it returns or the last part of that."""
        if block.index == 0:
            self._entered = main_input(arguments).detach()
        output = run()
        if block.index == block.count - 1 and state.step not in self.norms:
            assert self._entered is not None
            self.norms[state.step] = token_norms(main_output(output, self._entered).detach() - self._entered)
        return output


def main_input(arguments: Mapping[str, Any]) -> Tensor:
    """The video or image tokens among what a block is given."""
    given = arguments["kwargs"].get("hidden_states")
    tokens: Tensor = arguments["args"][0] if given is None else given
    return tokens


def main_output(output: Any, like: Tensor) -> Tensor:
    """The video or image tokens among what a block returns: the part that has the shape of those it was given.

    Raises:
        ValueError: if there is none.
    """
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, Tensor) and part.shape == like.shape:
            return part
    raise ValueError(
        "the blocks of this model return no tokens of the shape they are given; ratios cannot be measured"
    )


Row = tuple[str, str, Sequence[object], Options]  # preset, setting, its values, settings that go with it
CURVES: tuple[Row, ...] = (
    ("static", "every", (2, 3, 4, 5), {"start": 5}),
    ("static", "every", (2, 3, 4, 5), {"start": 5, "order": 1}),
    ("static", "mask", ("slow", "medium", "fast", "ultra"), {}),
    ("teacache", "threshold", (0.04, 0.08, 0.15, 0.25, 0.4), WAN),
    ("fbcache", "threshold", (0.02, 0.05, 0.08, 0.12, 0.2, 0.3), {}),
    ("dbcache", "threshold", (0.04, 0.08, 0.12, 0.24), {"front": 1}),
    ("dbcache", "threshold", (0.04, 0.08, 0.12, 0.24), {"front": 1, "order": 1}),
    ("dbcache", "threshold", (0.08, 0.12, 0.24), {"front": 2, "order": 1}),
    ("easycache", "threshold", (0.01, 0.025, 0.05, 0.1, 0.2), {}),
    ("easycache", "threshold", (0.025, 0.05, 0.1, 0.2), {"warmup": 5}),
    ("dicache", "threshold", (0.02, 0.05, 0.08, 0.15, 0.3), {}),
    ("seacache", "threshold", (0.1, 0.15, 0.25, 0.4), {}),
    ("snr_gap", "threshold", (1.2, 1.4, 1.7, 1.9, 2.2, 2.6), {}),
    ("snr_gap", "threshold", (2.2, 2.6, 3.0, 3.6, 4.2), {"order": 0}),
    ("taylorseer", "interval", (2, 3, 4, 6), {"order": 1}),
    ("taylorseer_lite", "interval", (2, 3, 4, 5, 6), {}),
    ("taylorseer_lite", "interval", (2, 3, 4, 5, 6), {"along": "sigma"}),
    ("taylorseer_lite", "interval", (2, 3, 4, 5, 6), {"keep": "output"}),
    ("taylorseer_lite", "interval", (3, 4, 5, 6), {"keep": "output", "order": 2}),
    ("fora", "interval", (2, 3, 5), {}),
    ("pab", "spatial", (2, 3, 4), {}),
    ("fastercache", "every", (2, 3), {}),
    ("delta_dit", "interval", (2, 3, 4), {}),
    ("prune", "threshold", (0.02, 0.04, 0.08, 0.16), {"front": 1, "warmup": 5}),
    ("deepcache", "interval", (2, 3, 5), {}),
    ("tgate", "gate_step", (10, 20, 30), {}),
)
MAGCACHE = ((0.03, 2), (0.06, 3), (0.12, 4), (0.24, 5), (0.24, 6))  # thresholds and most skips in a row
PROFILED: tuple[Options, ...] = ({"schedule": "uniform"}, {"schedule": "shrinking"})
# Settings that both methods share here: fewer dense steps than published, 0.24 and 0.2 of all.
SPARSE: dict[str, Options] = {
    "radial": {"block": 64, "dense_steps": 0.12, "dense_layers": 1},
    "compensated": {"block": 64, "dense_steps": 0.12, "dense_layers": 1},
}
BESIDE: tuple[Row, ...] = (
    ("easycache", "threshold", (0.05, 0.1, 0.2), {"warmup": 5}),
    ("taylorseer_lite", "interval", (3, 4, 5), {"keep": "output"}),
    ("snr_gap", "threshold", (1.4, 1.9, 2.2, 2.6), {}),
    ("snr_gap", "threshold", (2.6, 3.6), {"order": 0}),
    ("dicache", "threshold", (0.08, 0.15), {}),
)


def contenders(only: Sequence[str] = ()) -> list[Contender]:
    """All contenders, or those of these names or curves.

    Raises:
        ValueError: for a name that nobody has.
    """
    everyone = [*_presets(), *_calibrated(), *peers(), *_together()]
    known = {each.name for each in everyone} | {each.curve for each in everyone}
    unknown = sorted({*only} - known)
    if unknown:
        raise ValueError(
            f"nobody is called {', '.join(map(repr, unknown))}; choose among "
            + "; ".join(dict.fromkeys(each.curve for each in everyone))
            + "; or a row of one of them, such as "
            + repr(everyone[0].name)
        )
    return [each for each in everyone if not only or each.name in only or each.curve in only]


def _presets() -> list[Contender]:
    return [
        PresetContender(name, PRESETS, curve, settings, preset) for preset, name, curve, settings in _named(CURVES)
    ]


def _calibrated() -> list[Contender]:
    found: list[Contender] = []
    for threshold, most in MAGCACHE:
        settings: Options = {"threshold": threshold, "max_skips": most}
        found.append(MagCacheContender(f"magcache {threshold:g}, K {most}", PRESETS, "magcache", settings, "magcache"))
    for settings in PROFILED:
        for budget in (0.34, 0.5, 0.67):
            curve = f"profiling, {settings['schedule']}"
            name = f"{curve} {budget:g}"
            found.append(ProfilingContender(name, PRESETS, curve, settings, "profiling", budget=budget))
    return found


def _together() -> list[Contender]:
    found: list[Contender] = []
    for method, options in SPARSE.items():
        found.append(PresetContender(f"{method} alone", TOGETHER, method, {}, "", method, options))
        for preset, name, curve, settings in _named(BESIDE):
            found.append(
                PresetContender(f"{method}+{name}", TOGETHER, f"{method}+{curve}", settings, preset, method, options)
            )
    return found


def _named(rows: Iterable[Row]) -> list[tuple[str, str, str, Options]]:
    """Preset, name, curve and settings for every value of every row."""
    found = []
    for preset, setting, values, fixed in rows:
        curve = ", ".join([preset, *(f"{name} {_text(value)}" for name, value in fixed.items() if name != "model")])
        for value in values:
            found.append((preset, f"{curve}, {setting} {_text(value)}", curve, fixed | {setting: value}))
    return found


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
