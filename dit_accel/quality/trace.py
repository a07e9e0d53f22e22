"""Dense runs on record: what entered and left the model at every step and branch, for replays without the model."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import Acceleration
from ..caching.predictors.base import Place
from ..roots import find_roots
from .key import Guidance, guidance_of

WIDE = 1 << 30  # bytes of traces up to which float32 is kept


@dataclass(frozen=True, eq=False)
class TracedCall:
    """One call of the model.

    Attributes:
        step: index of the sampling step.
        branch: branch of guidance.
        expert: attribute name of the root in its pipeline.
        sigma: noise level (:class:`dit_accel.noise.Level`), None where the scheduler says none.
        timestep: as the scheduler lists it, else as the model was given it; None if there is none.
        latents: the model's main input, on the CPU.
        output: its main output, on the CPU.
        flow: whether ``sigma`` is that of flow matching.
    """

    step: int
    branch: str
    expert: str
    sigma: float | None
    timestep: float | None
    latents: Tensor
    output: Tensor
    flow: bool = True

    def place(self, steps: int) -> Place:
        """Where in the generation, of so many steps, it belongs."""
        return Place(self.step, self.sigma, steps, flow=self.flow)


@dataclass(frozen=True, eq=False)
class Trace:
    """One dense generation.

    Attributes:
        calls: in order.
        steps: number of sampling steps.
        strides: by step, how far an error moves the sampler, see :func:`strides_of`.
        grid: tokens along (frames, height, width).
        extent: root mean square of the final latents; 0 if unknown.
        guidance: scales of guidance when the generation began, see :func:`.guidance_of`.
    """

    calls: tuple[TracedCall, ...]
    steps: int
    strides: tuple[float, ...]
    grid: tuple[int, int, int]
    extent: float = 0.0
    guidance: Guidance = (None, None)

    @property
    def bytes(self) -> int:
        """What it takes in memory; latents that branches share count once."""
        tensors = {id(t): t for call in self.calls for t in (call.latents, call.output)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def at_step(self, step: int) -> list[TracedCall]:
        """All calls of a step, in order."""
        return [call for call in self.calls if call.step == step]

    def expert_of(self, step: int) -> str:
        """The expert that runs at a step."""
        return self.at_step(step)[0].expert

    @property
    def fresh(self) -> frozenset[int]:
        """Steps at which another expert begins than ran before."""
        experts = [self.expert_of(step) for step in range(self.steps)]
        return frozenset(step for step in range(1, self.steps) if experts[step] != experts[step - 1])


@dataclass
class TraceRecorder:
    """Collects the calls of the generation that is running; see :func:`recording`.

    Attributes:
        dtype: of what is kept.
    """

    dtype: torch.dtype = torch.float32
    _calls: list[TracedCall] = field(default_factory=list)
    _listed: tuple[int | None, list[float]] = (None, [])
    _grid: tuple[int, int, int] = (1, 1, 1)
    _predicts: str | None = None
    _guidance: Guidance = (None, None)

    def trace(self, final_latents: Tensor | None = None) -> Trace:
        """What was recorded, and an empty recorder for the next generation.

        Args:
            final_latents: of the generation, to which its errors are related.

        Raises:
            ValueError: if a step has no call, or the calls are not those of one generation.
        """
        calls, self._calls = tuple(self._calls), []
        steps = self._listed[0] or (calls[-1].step + 1 if calls else 0)
        missing = sorted(set(range(steps)) - {call.step for call in calls})
        if not calls or missing:
            raise ValueError(
                "a trace needs a whole generation from its first step to its last; "
                + (f"steps {missing} are missing" if calls else "the model was not called")
            )
        extent = 0.0 if final_latents is None else float(final_latents.float().square().mean().sqrt())
        strides = strides_of(self._listed[1], steps, self._predicts)
        return Trace(calls, steps, strides, self._grid, extent, self._guidance)

    def add(self, acceleration: Acceleration, expert: str, latents: Tensor, output: Tensor) -> None:
        """Takes note of one call that has just ended."""
        state = acceleration.clock.state
        assert state is not None
        if state.ordinal == 0:
            self._calls.clear()
        timestep, sigma, flow = acceleration.clock.level(state.step)
        if timestep is None and state.timestep is not None:
            timestep = float(torch.as_tensor(state.timestep).max())
        kept = self._kept(latents)
        before = self._calls[-1] if self._calls else None
        if before is not None and before.step == state.step and torch.equal(before.latents, kept):
            kept = before.latents  # branches of guidance are given the same latents
        left = self._kept(output)
        self._calls.append(TracedCall(state.step, state.branch, expert, sigma, timestep, kept, left, flow))
        self._grid = state.layout.grid
        if state.ordinal == 0:
            self._listed = (state.steps, _listed_sigmas(acceleration, state.steps))
            self._predicts, self._guidance = _predicts(acceleration), guidance_of(acceleration.clock.pipeline)

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", self.dtype, copy=True)


@contextmanager
def recording(pipe: Any, dtype: torch.dtype = torch.float32) -> Iterator[TraceRecorder]:
    """Records every call of a pipeline's models; changes nothing, and takes itself off at the end.

    Args:
        pipe: a diffusers pipeline that is not accelerated.
        dtype: of what is kept.

    Raises:
        ValueError: if the pipeline is accelerated, so that its runs are not dense.
    """
    recorder = TraceRecorder(dtype)
    with Acceleration(pipe, None) as acceleration, ExitStack() as stack:
        for expert, root in find_roots(pipe).items():
            # Put on after the acceleration, so that the clock has ticked.
            stack.callback(_watch(root, expert, acceleration, recorder))
        yield recorder


def _watch(root: nn.Module, expert: str, acceleration: Acceleration, recorder: TraceRecorder) -> Any:
    signature = inspect.signature(type(root).forward)
    main = list(signature.parameters)[1]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        arguments = signature.bind_partial(module, *args, **kwargs).arguments
        first = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()))
        recorder.add(acceleration, expert, arguments[main], first)

    return root.register_forward_hook(after, with_kwargs=True).remove


def _listed_sigmas(acceleration: Acceleration, steps: int | None) -> list[float]:
    found = [acceleration.clock.level(step).sigma for step in range((steps or 0) + 1)]
    return [sigma for sigma in found if sigma is not None]


def _predicts(acceleration: Acceleration) -> str | None:
    """What the outputs of a diffusion model are, as its scheduler says; None for flow matching."""
    scheduler = getattr(acceleration.clock.pipeline, "scheduler", None)
    said = (getattr(scheduler, "config", None) or {}).get("prediction_type")
    return None if acceleration.clock.level(0).flow else said


def strides_of(sigmas: Sequence[float], steps: int, predicts: str | None = None) -> tuple[float, ...]:
    """How far an error of the output moves a first-order sampler at each step, from the noise levels.

    In latents ``signal + sigma noise`` a step adds the noise it believes in times the change of sigma. A ``v`` is off
    by ``sqrt(1 + sigma^2)`` times as much as that noise, a predicted signal by ``sigma`` times. Calls at one level, as
    samplers of higher order make them, share the way to the next one.

    Args:
        sigmas: one for each step, and the one at the end if it is listed; otherwise it ends at 0.
        steps: number of steps.
        predicts: ``prediction_type`` of a diffusion model; None for flow matching.

    Returns:
        ``|sigma[s + 1] - sigma[s]|``, over these factors, or 1 / steps throughout where nothing or something else is
        listed.
    """
    levels = [*sigmas, 0.0] if len(sigmas) == steps else list(sigmas)
    found: list[float] = []
    for _, equal in itertools.groupby(range(len(levels) - 1), key=levels.__getitem__):
        calls = list(equal)
        here, way = levels[calls[0]], abs(levels[calls[-1] + 1] - levels[calls[0]])
        factor = {"v_prediction": math.hypot(1, here), "sample": max(here, 1e-6)}.get(predicts or "", 1.0)
        found += [way / factor / len(calls)] * len(calls)
    return tuple(found) if len(found) == steps and sum(found) > 0 else (1 / steps,) * steps


def trace_dtype(call_bytes: int, prompts: int) -> torch.dtype:
    """Float32, or float16 where all traces together would take more than a gibibyte.

    Args:
        call_bytes: of one generation in float32.
        prompts: how many are to be traced.
    """
    return torch.float32 if call_bytes * prompts <= WIDE else torch.float16
