"""The unconditional branch from the conditional one, on Wan (calls apart) and SD 3 (one batch for both)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel import accelerate
from dit_accel.caching import Cache
from dit_accel.caching.engine.guidance import scale_frequencies
from dit_accel.caching.engine.rows import holds_both_branches, second_half
from dit_accel.caching.policies.broadcast import Broadcast
from dit_accel.caching.presets.modules import fastercache
from dit_accel.caching.presets.static import static
from dit_accel.caching.scopes.guidance import Guidance

from ..seams.conftest import Subject, build_image_subject, build_subject

STEPS = 8
WINDOW, LOW, HIGH = (-1.0, 960.0), (300.0, 950.0), (-1.0, 600.0)


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high frequencies of every image, as the authors split them: origin in the middle, element by element."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(values.double()), dim=(-2, -1))
    height, width = values.shape[-2:]
    low = torch.zeros_like(spectrum)
    for row in range(height):
        for column in range(width):
            if (row - height // 2) ** 2 + (column - width // 2) ** 2 <= (min(height, width) // 5) ** 2:
                low[..., row, column] = spectrum[..., row, column]
    return low, spectrum - low


def joined(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Back from frequencies."""
    values: torch.Tensor = torch.fft.ifft2(torch.fft.ifftshift(low + high, dim=(-2, -1))).real
    return values


class Unconditional:
    """The rule for the skipped branch, from its definition."""

    def __init__(self) -> None:
        self.low, self.high = torch.zeros(()), torch.zeros(())

    def computed(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> None:
        """Both branches are known."""
        own, other = split(unconditional), split(conditional)
        self.low, self.high = own[0] - other[0], own[1] - other[1]

    def skipped(self, conditional: torch.Tensor, timestep: float) -> torch.Tensor:
        """Only one is known."""
        self.low = self.low * (1.1 if LOW[0] < timestep < LOW[1] else 1)
        self.high = self.high * (1.2 if HIGH[0] < timestep < HIGH[1] else 1)
        low, high = split(conditional)
        return joined(low + self.low, high + self.high).to(conditional)


def skips(step: int, timestep: float) -> bool:
    """Every third step is computed, and those outside the window."""
    return step % 3 != 0 and WINDOW[0] < timestep < WINDOW[1]


GUIDANCE = Cache(Guidance(1.1, 1.2, LOW, HIGH), Broadcast({"guidance": 3}, WINDOW), decide="each", name="cfg")


def timestep_of(subject: Subject, step: int) -> float:
    """As the scheduler lists it."""
    return float(subject.pipe.scheduler.timesteps[step])


def hooked(subject: Subject, hook: Callable[..., Any], **changes: Any) -> torch.Tensor:
    """Latents of a generation with a hook on what the model gives."""
    handle = subject.root.register_forward_hook(hook)
    try:
        return subject.run(num_inference_steps=STEPS, **changes)
    finally:
        handle.remove()


def test_calls_apart(make_tiny_wan: Callable[[int], Any]) -> None:
    subject = build_subject(make_tiny_wan, "t2v")
    changes = {"height": 48, "width": 64, "num_frames": 1}
    stock = subject.run(num_inference_steps=STEPS, **changes)
    rule, calls, skipped = Unconditional(), [0], []
    conditional = torch.zeros(())

    def hook(module: Any, args: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        nonlocal conditional
        step, branch = divmod(calls[0], 2)
        calls[0] += 1
        if branch == 0:
            conditional = output[0]
        elif not skips(step, timestep_of(subject, step)):
            rule.computed(output[0], conditional)
        else:
            skipped.append(step)
            return (rule.skipped(conditional, timestep_of(subject, step)),)
        return None

    wanted = hooked(subject, hook, **changes)
    with accelerate(subject.pipe, cache=GUIDANCE) as acceleration:
        found = subject.run(num_inference_steps=STEPS, **changes)
        decisions = acceleration.caches.engines[0].record.decisions
        assert {each.branch for each in decisions} == {"uncond"}
        assert [each.step for each in decisions if not each.computed] == skipped
        assert torch.equal(subject.run(num_inference_steps=STEPS, **changes), found)
        unguided = subject.run(num_inference_steps=STEPS, guidance_scale=1.0, **changes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert 0 < len(skipped) < STEPS and not torch.equal(found, stock)
    assert torch.equal(unguided, subject.run(num_inference_steps=STEPS, guidance_scale=1.0, **changes))
    assert torch.equal(subject.run(num_inference_steps=STEPS, **changes), stock)


class BatchOracle:
    """Both branches of SD 3 always run; the rows of the skipped one are thrown away.

    Attention outputs of a step at which only the conditional branch counts are only known for that branch.
    """

    def __init__(self, subject: Subject, window: tuple[float, float] | None) -> None:
        self.subject, self.rule, self.step, self.window = subject, Unconditional(), 0, window
        self.kept: dict[str, list[tuple[bool, Any]]] = {}
        self.batches: list[int] = []
        self.handles = [subject.root.register_forward_hook(self._output)]
        for path, module in subject.root.named_modules():
            if window is not None and path.endswith((".attn", ".attn2")):
                self.handles.append(module.register_forward_hook(self._attention(path)))

    @property
    def skipping(self) -> bool:
        return skips(self.step, timestep_of(self.subject, self.step))

    def _output(self, module: Any, args: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        unconditional, conditional = output[0].chunk(2)
        skipping, timestep = self.skipping, timestep_of(self.subject, self.step)
        self.batches.append(1 if skipping else 2)
        self.step += 1
        if skipping:
            return (torch.cat([self.rule.skipped(conditional, timestep), conditional]),)
        self.rule.computed(unconditional, conditional)
        return None

    def _attention(self, path: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            assert self.window is not None
            is_tuple, past = isinstance(output, tuple), self.kept.setdefault(path, [])
            inside = self.window[0] < timestep_of(self.subject, self.step) < self.window[1]
            known = bool(past) and (self.skipping or past[0][0])
            if self.step % 2 == 0 or not inside or not known:
                past.insert(
                    0, (not self.skipping, tuple(x.clone() for x in output) if is_tuple else (output.clone(),))
                )
                return None
            given = tuple(self._moved(past, index) for index in range(len(past[0][1])))
            return given if is_tuple else given[0]

        return hook

    def _moved(self, past: list[tuple[bool, Any]], index: int) -> torch.Tensor:
        latest = past[0][1][index].clone()
        if len(past) > 1:
            change = latest - past[1][1][index]
            if not past[1][0]:
                change[:1] = 0  # the unconditional row was not known then
            latest += self.step / (STEPS - 1) * change
        return latest

    def run(self) -> torch.Tensor:
        """Latents of one generation."""
        try:
            return self.subject.run(num_inference_steps=STEPS)
        finally:
            for handle in self.handles:
                handle.remove()


@pytest.mark.parametrize("with_attention", [False, True])
def test_one_batch_for_both(with_attention: bool) -> None:
    subject = build_image_subject("sd35")
    window = (-1.0, 970.0) if with_attention else None
    oracle = BatchOracle(subject, window)
    wanted = oracle.run()
    attention = fastercache(window=(-1.0, 970.0))[1]
    batches: list[int] = []
    handle = subject.root.proj_out.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    with accelerate(subject.pipe, cache=[GUIDANCE, attention] if with_attention else GUIDANCE):
        found = subject.run(num_inference_steps=STEPS)
        assert batches == oracle.batches and set(batches) == {1, 2}
        assert torch.equal(subject.run(num_inference_steps=STEPS), found)
    handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_two_pictures_without_guidance_are_no_pair() -> None:
    subject = build_image_subject("sd35")
    draw = torch.Generator().manual_seed(2)
    inputs: dict[str, Any] = {
        key: torch.randn(2, *value.shape[1:], generator=draw) for key, value in subject.inputs.items() if "emb" in key
    }
    inputs |= {"guidance_scale": 1.0}
    inputs |= {"latents": torch.randn(1, 4, 2, 2, generator=draw).repeat(2, 1, 1, 1), "height": 16, "width": 16}
    stock = subject.run(**inputs)
    with accelerate(subject.pipe, cache=[*fastercache(uncond_window=(-1.0, 1001.0))][:1]) as acceleration:
        assert torch.equal(subject.run(**inputs), stock)
        assert not acceleration.caches.engines[0].record.decisions


@pytest.mark.parametrize("size", [(7, 9), (10, 16), (4, 4)])
def test_frequencies(size: tuple[int, int]) -> None:
    values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    low, high = split(values)
    torch.testing.assert_close(scale_frequencies(values, 1.5, 0.5), joined(1.5 * low, 0.5 * high).float())
    assert torch.equal(scale_frequencies(values, 2.0, 2.0), values * 2)


def test_rows() -> None:
    latents = torch.arange(4.0)[:, None]
    assert holds_both_branches(torch.cat([latents, latents]), None)
    assert not holds_both_branches(torch.cat([latents, latents]), False)
    assert not holds_both_branches(latents, True) and not holds_both_branches(latents[:3], True)
    nest = second_half({"a": [latents, None], "b": (torch.ones(3), torch.tensor(1.0), 4)}, 4)
    assert nest["a"][0].tolist() == [[2.0], [3.0]] and nest["a"][1] is None
    assert len(nest["b"][0]) == 3 and nest["b"][1:] == (torch.tensor(1.0), 4)


def test_refuses(make_tiny_wan: Callable[[int], Any]) -> None:
    with pytest.raises(ValueError, match=r"Guidance\.low is a factor above 0"):
        Guidance(low=0.0)
    subject = build_subject(make_tiny_wan, "t2v")
    with pytest.raises(ValueError, match='decide="each"'):
        accelerate(subject.pipe, cache=Cache(Guidance(), Broadcast({"guidance": 5})))
    blocks = static(every=2)
    sd3 = build_image_subject("sd35")
    with accelerate(sd3.pipe, cache=[GUIDANCE, blocks]), pytest.raises(ValueError, match="not of blocks"):
        sd3.run()
    with accelerate(subject.pipe, cache=[GUIDANCE, blocks]) as acceleration:  # calls apart have one batch each
        subject.run(num_inference_steps=STEPS)
        reused = [sum(engine.record.reused.values()) for engine in acceleration.caches.engines]
    assert all(reused)
    flux = build_image_subject("flux")
    with accelerate(flux.pipe, cache=GUIDANCE), pytest.raises(ValueError, match="without height and width"):
        flux.run()


def test_sparse_attention_is_told_which_calls_were_skipped(make_tiny_wan: Callable[[int], Any]) -> None:
    subject = build_subject(make_tiny_wan, "t2v")
    with accelerate(subject.pipe, "adaspa", cache=GUIDANCE, preset=None) as acceleration:
        subject.run(num_inference_steps=STEPS)
        decisions = acceleration.caches.engines[0].record.decisions
        ran = 2 * STEPS - sum(not each.computed for each in decisions)
        sites = acceleration.report().sites
    assert ran < 2 * STEPS and sites
    assert {site.sparse_calls + site.dense_calls for site in sites} == {ran}
