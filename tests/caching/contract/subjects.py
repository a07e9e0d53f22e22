"""The pipelines that every cache has to pass on, and how each is run, watched and forced along a path of latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.roots import find_roots

from ...conftest import build_tiny_wan
from ...seams import conftest as builders

STEPS = 6
Outputs = dict[tuple[int, str], Tensor]  # by step and branch
Branch = Literal["cond", "uncond"]


@dataclass
class Case:
    """A pipeline and what differs between pipelines.

    Attributes:
        name: of the case.
        pipe: untrained.
        inputs: of one generation with guidance.
        guidance: name of the argument whose value 1 switches guidance off.
        calls: whether the branches of guidance are two calls of the model or two halves of a batch.
        resized: inputs of another size.
        switchable: whether guidance can be switched off within a generation.
    """

    name: str
    pipe: Any
    inputs: dict[str, Any]
    guidance: str
    calls: Literal["sequential", "batched"]
    resized: dict[str, Any]
    switchable: bool = False
    _known: dict[Any, Any] = field(default_factory=dict)

    def run(self, seed: int = 1, **changes: Any) -> Tensor:
        """Latents of one generation."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {"num_inference_steps": STEPS} | self.inputs | {"generator": generator, "output_type": "latent"}
        output = self.pipe(**(arguments | changes))
        latents: Tensor = output.frames if hasattr(output, "frames") else output.images
        return latents

    def stock(self, **changes: Any) -> Tensor:
        """The same without any cache; run once for equal changes."""
        assert dit_accel.acceleration_of(self.pipe) is None
        known: Tensor = self._once(("stock", _key(changes)), lambda: self.run(**changes))
        return known

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @property
    def is_unet(self) -> bool:
        """Whether its model is a UNet."""
        return "unet" in self.pipe.components

    @property
    def without_guidance(self) -> dict[str, Any]:
        """Inputs that switch guidance off."""
        return {self.guidance: 1.0}

    def other_prompt(self, branch: Branch = "cond") -> dict[str, Any]:
        """Inputs with another prompt on one branch; the same tensors every time."""
        inputs: dict[str, Any] = self._once(("prompt", branch), lambda: self._other_prompt(branch))
        return inputs

    def _other_prompt(self, branch: Branch) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(99)
        is_negative = branch == "uncond"
        return {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in self.inputs.items()
            if name.endswith("prompt_embeds") and name.startswith("negative_") == is_negative
        }

    def roots(self) -> list[nn.Module]:
        """Its models."""
        return list(find_roots(self.pipe).values())


@dataclass
class Path:
    """Latents behind every step of a generation, which others are forced along: so their models see equal inputs."""

    latents: list[Tensor] = field(default_factory=list)


def dense_path(case: Case) -> tuple[Path, Outputs]:
    """The path that the plain pipeline takes, and what its model gives there."""
    assert dit_accel.acceleration_of(case.pipe) is None

    def make() -> tuple[Path, Outputs]:
        path = _path(case)
        return path, outputs_along(case, path)

    found: tuple[Path, Outputs] = case._once("path", make)
    return found


def _path(case: Case) -> Path:
    path = Path()

    def note(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        path.latents.append(tensors["latents"].clone())
        return {}

    case.run(callback_on_step_end=note)
    return path


def _key(changes: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Tells changes apart; tensors by which they are."""
    return tuple((name, id(value) if isinstance(value, Tensor) else value) for name, value in sorted(changes.items()))


Hook = Callable[[Any, int, dict[str, Any]], dict[str, Any]]


def outputs_along(case: Case, path: Path, at_step: Hook | None = None, **changes: Any) -> Outputs:
    """What the model gives at every step and branch when the latents are those of a path.

    Args:
        case: with or without a cache on it.
        path: of :func:`dense_path`.
        at_step: called behind every step with pipeline, step and tensors; gives tensors to change.
        changes: to the inputs.
    """
    found: list[tuple[int, Tensor]] = []
    step = [0]

    def end(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step[0] = index + 1
        more = {} if at_step is None else at_step(pipe, index, tensors)
        return {"latents": path.latents[index].clone()} | more

    with _watched(case, lambda output: found.append((step[0], output.detach().clone()))):
        case.run(callback_on_step_end=end, **changes)
    return _by_branch(case, found)


def _by_branch(case: Case, found: list[tuple[int, Tensor]]) -> Outputs:
    outputs: Outputs = {}
    for step, output in found:
        if case.calls == "sequential":
            outputs[step, "uncond" if (step, "cond") in outputs else "cond"] = output
        elif len(output) == 1:
            outputs[step, "cond"] = output
        else:
            outputs[step, "uncond"], outputs[step, "cond"] = output.chunk(2)
    return outputs


@contextmanager
def _watched(case: Case, note: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_root: nn.Module, _arguments: Any, output: Any) -> None:
        note(output[0] if isinstance(output, tuple) else output.sample)

    handles = [root.register_forward_hook(hook) for root in case.roots()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def branch_of(outputs: Outputs, branch: Branch) -> list[Tensor]:
    """Outputs of one branch, step after step."""
    return [output for (_, each), output in sorted(outputs.items()) if each == branch]


# ---- the cases -----------------------------------------------------------------------------------------------------


def _wan(variant: str) -> Case:
    subject = builders.build_subject(build_tiny_wan, variant)
    resized = {"height": 48, "num_frames": 5}
    return Case(variant, subject.pipe, subject.inputs, "guidance_scale", "sequential", resized, switchable=True)


def _image(name: str) -> Case:
    subject = builders.build_image_subject(name)
    inputs = subject.inputs
    if name == "flux":
        return Case(name, subject.pipe, inputs, "true_cfg_scale", "sequential", {"height": 24})
    if name == "sd15":
        resized = {"latents": torch.randn(1, 4, 11, 9)}
        return Case(name, subject.pipe, inputs, "guidance_scale", "batched", resized, switchable=True)
    return Case(name, subject.pipe, inputs, "guidance_scale", "batched", {"height": 24}, switchable=True)


def _video(name: str) -> Case:
    subject = builders.build_video_subject(name)
    resized = {"height": 32, "num_frames": 5}
    if name == "hunyuan":
        return Case(name, subject.pipe, subject.inputs, "true_cfg_scale", "sequential", resized)
    return Case(name, subject.pipe, subject.inputs, "guidance_scale", "batched", resized)


CASES: dict[str, Callable[[], Case]] = {
    "wan": lambda: replace(_wan("t2v"), name="wan"),
    "wan-two-experts": lambda: replace(_wan("two-experts"), name="wan-two-experts"),
    "flux": lambda: _image("flux"),
    "sd3": lambda: _image("sd3"),
    "hunyuan": lambda: _video("hunyuan"),
    "cogvideox": lambda: _video("cogvideox"),
    "sd15": lambda: _image("sd15"),
}


@cache
def built(name: str) -> Case:
    """The case of a name, built once: whatever is put on it has to come off again."""
    return fresh(name)


def fresh(name: str) -> Case:
    """The case of a name, built anew; its weights and inputs are those of every other time."""
    torch.manual_seed(0)
    case = CASES[name]()
    case.inputs.pop("num_inference_steps", None)
    return case


@contextmanager
def clean(case: Case) -> Iterator[Case]:
    """Takes off what a failed check left."""
    try:
        yield case
    finally:
        left = dit_accel.acceleration_of(case.pipe)
        if left is not None:
            left.remove()
