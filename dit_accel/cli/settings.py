"""What a rendering will be, with every default filled in and checked before the model is loaded."""

from __future__ import annotations

import argparse
import inspect
import secrets
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .cache_options import CacheChoice, check_steps, choice_of
from .errors import EnvironmentProblem, UsageError, one_line
from .method_options import CHOICES, given_options, given_settings, options_of
from .models import Model, check_multiple
from .option import Option

if TYPE_CHECKING:
    from dit_accel.shapes.info import ModelInfo

ARGUMENTS = {
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative_prompt": "negative_prompt",
}
FPS = {"Wan": 16, "HunyuanVideo": 24, "LTX": 24, "CogVideoX": 8, "Mochi": 30}  # what their authors play them at
OTHER_FPS = 16
DEFAULT = "radial"


@dataclass(frozen=True)
class Settings:
    """One rendering. None means that the pipeline has no such argument, or decides itself.

    Attributes:
        attention: name of a method, ``"auto"`` or ``"dense"``.
        method: all options of the method; empty if dense.
        preset: name of the preset that some of them come from; None without one.
        cache: the feature cache.
        compare: whether to render dense too.
        timed: whether the accelerated run's time is split into its parts.
        fps: frames per second of the file.
        device: such as ``"cpu"`` or ``"cuda:0"``.
        dtype: such as ``"float32"``.
        threads: CPU threads, or None for torch's default.
    """

    prompt: str
    negative_prompt: str | None
    model: str
    pipeline: str
    attention: str
    method: dict[str, Any]
    preset: str | None
    cache: CacheChoice
    compare: bool
    timed: bool
    steps: int | None
    seed: int
    frames: int | None
    height: int | None
    width: int | None
    guidance: float | None
    fps: float
    dtype: str
    device: str
    threads: int | None

    @property
    def is_dense(self) -> bool:
        """Whether nothing is accelerated."""
        return self.attention == "dense" and not self.cache.is_on

    @property
    def label(self) -> str:
        """Names the run: its method, its cache, or both."""
        parts = [None if self.attention == "dense" else self.attention, self.cache.label]
        return " + ".join(part for part in parts if part is not None) or "dense"

    def call_arguments(self) -> dict[str, Any]:
        """The arguments for the pipeline's call, without the seed."""
        given = {argument: getattr(self, name) for name, argument in ARGUMENTS.items()}
        return {"prompt": self.prompt, **{name: value for name, value in given.items() if value is not None}}

    def record(self) -> dict[str, Any]:
        """All settings, as they are written to files."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings["attention"] = {"method": self.attention, **settings.pop("method")}
        settings["cache"] = self.cache.record()
        return settings


def resolve(options: argparse.Namespace, model: Model) -> Settings:
    """Fills in every default and checks what can be checked without the model's weights.

    Raises:
        UsageError: if an option does not fit the model, or does not fit another option.
        EnvironmentProblem: if the device is not there.
    """
    cache = choice_of(options)
    attention = options.attention or ("dense" if cache.is_on else DEFAULT)
    sampling = {name: _sampling_value(name, options, model) for name in ARGUMENTS}
    if model.shapes is not None:
        _check_shapes_language(model.name, model.shapes, options.prompt, sampling["negative_prompt"])
    check_multiple("frames", sampling["frames"], model.frame_step, offset=1)
    check_multiple("height", sampling["height"], model.height_step)
    check_multiple("width", sampling["width"], model.width_step)
    if cache.profile is not None:
        check_steps(cache.profile, sampling["steps"])
    device = _device(options.device)
    method, preset = _method(attention, options, model, cache)
    return Settings(
        prompt=options.prompt,
        model=options.model,
        pipeline=model.pipeline.__name__,
        attention=attention,
        method=method,
        preset=preset,
        cache=cache,
        compare=options.compare,
        timed=options.timed,
        seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
        fps=options.fps or (model.shapes and model.shapes.fps) or _usual_fps(model.pipeline.__name__),
        dtype=options.dtype or ("float32" if device == "cpu" else "bfloat16"),
        device=device,
        threads=options.threads,
        **sampling,
    )


def _sampling_value(name: str, options: argparse.Namespace, model: Model) -> Any:
    given = getattr(options, name)
    parameter = model.parameters.get(ARGUMENTS[name])
    if parameter is None:
        if given is not None:
            flag = name.replace("_", "-")
            raise UsageError(f"{model.pipeline.__name__} takes no --{flag}; leave it out")
        return None
    if given is not None:
        return given
    own = None if parameter.default is inspect.Parameter.empty else parameter.default
    return own if model.shapes is None else getattr(model.shapes, name, own)


def _check_shapes_language(name: str, info: ModelInfo, prompt: str, negative_prompt: str | None) -> None:
    """Pipelines of the shapes zoo know few sentences and words; anything else would give a video of nothing."""
    try:
        info.check_prompt(prompt)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    unknown = [word for word in (negative_prompt or "").lower().split() if word not in info.words()]
    if unknown:
        known = ", ".join(info.words())
        raise UsageError(f"--negative-prompt: '{name}' does not know {unknown[0]!r}; it knows {known}")


def _method(
    attention: str, options: argparse.Namespace, model: Model, cache: CacheChoice
) -> tuple[dict[str, Any], str | None]:
    """Every setting of the attention method, checked against its name and its own rules; and the preset it uses."""
    found = given_options(options)
    _check_belonging(attention, options, found, cache)
    if attention == "dense":
        return {}, None
    from dit_accel.presets import AUTO, ModelFacts, layered, recipe_by_name

    given, usual = given_settings(options, found), model.shapes.attention if model.shapes else {}
    if attention == "auto":
        chosen = {"usual": usual} | given
    else:
        known = {each.setting or each.name for each in options_of(attention)}
        usual = {name: value for name, value in usual.items() if name in known}
        chosen = layered(attention, usual, given)
    preset = None if options.preset == "none" else options.preset or AUTO
    try:
        families = model.families()
        facts = ModelFacts.of_class(next(iter(model.roots.values()), object), model.config, len(model.roots))
        recipe, completed = recipe_by_name(attention, chosen, facts, preset)
        for family in families:
            recipe.check_family(family)
    except ValueError as error:
        raise UsageError(f"{one_line(error)} (--attention dense renders without it)") from error
    return recipe.settings(), completed.preset.name if completed and completed.preset else None


def _check_belonging(attention: str, options: argparse.Namespace, given: list[Option], cache: CacheChoice) -> None:
    """Refuses options that the method does not have."""
    if attention == "dense" and options.compare and not cache.is_on:
        raise UsageError("--compare renders dense anyway; leave out --attention dense")
    if attention == "dense" and options.preset:
        raise UsageError("--preset does nothing with --attention dense; leave it out, or name a method")
    if attention == "dense" and options.timed and not cache.is_on:
        raise UsageError("--timed splits the time of an accelerated run; name a method or a --cache")
    known = options_of(attention)
    foreign = next((each for each in given if each not in known), None)
    if foreign is not None:
        owners = [choice for choice in CHOICES if foreign in options_of(choice)]
        raise UsageError(
            f"{foreign.flag} does nothing with --attention {attention}; leave it out, or choose {' or '.join(owners)}"
        )


def _device(name: str | None) -> str:
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name is None:
        return "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; give cpu, cuda, cuda:1 or mps") from error
    present = {"cpu": True, "cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not present.get(device.type, False):
        usable = ", ".join(kind for kind, there in {"cpu": True, "cuda": cuda, "mps": mps}.items() if there)
        raise EnvironmentProblem(f"there is no device {name!r} that torch can use here; usable: {usable}")
    return name


def _usual_fps(pipeline: str) -> float:
    return next((fps for prefix, fps in FPS.items() if pipeline.startswith(prefix)), OTHER_FPS)
