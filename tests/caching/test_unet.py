"""DeepCache and T-GATE on tiny UNets, against the UNet itself with a feature put in by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from dit_accel import accelerate
from dit_accel.caching.engine.unet import deep_branches, install_deep
from dit_accel.caching.predictors.base import Kept, Place
from dit_accel.caching.predictors.branch_mean import BranchMean
from dit_accel.caching.presets.unet import deepcache, nonuniform_steps, tgate
from dit_accel.caching.scopes.base import RootView
from dit_accel.caching.scopes.unet import Deep

from ..seams.conftest import Subject, build_image_subject

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def build_unet(kinds: tuple[tuple[str, str], ...] = (CROSS, CROSS, PLAIN), layers: int = 2, xl: bool = False) -> Any:
    """Untrained, of some levels from the outside to the inside."""
    torch.manual_seed(0)
    extra: dict[str, Any] = {}
    if xl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
            "transformer_layers_per_block": tuple(range(1, len(kinds) + 1)),
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        block_out_channels=tuple(4 * (level + 1) for level in range(len(kinds))),
        layers_per_block=layers,
        sample_size=16,
        down_block_types=tuple(down for down, _ in kinds),
        up_block_types=tuple(up for _, up in reversed(kinds)),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        **extra,
    ).eval()


def inputs_of(unet: Any, step: int, batch: int = 2) -> dict[str, Any]:
    """Arguments of one call; latents of 9 x 13, which no number of halvings divides."""
    draw = torch.Generator().manual_seed(step)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, 9, 13, generator=draw),
        "timestep": torch.tensor(900 - 100 * step),
        "encoder_hidden_states": torch.randn(batch, 5, 8, generator=draw),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 24, generator=draw),
            "time_ids": torch.randn(batch, 6, generator=draw),
        }
    return inputs


@torch.no_grad()
def call(unet: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of one call."""
    output: torch.Tensor = unet(**inputs).sample
    return output


def up_layers(unet: Any) -> list[Any]:
    """The residual blocks of the way up, from the outside to the inside."""
    return [resnet for block in reversed(unet.up_blocks) for resnet in reversed(block.resnets)]


def skip_widths(unet: Any) -> list[int]:
    """Channels of the skip connections, from the outside to the inside."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        widths += [block.resnets[-1].out_channels] * bool(block.downsamplers)
    return widths


class Oracle:
    """The whole UNet always runs; on reuse the first channels of what enters one up layer are put back by hand."""

    def __init__(self, unet: Any, branch: int) -> None:
        self.unet, self.layer = unet, up_layers(unet)[branch]
        self.width = self.layer.in_channels - skip_widths(unet)[branch]
        self.kept: torch.Tensor | None = None

    def __call__(self, inputs: dict[str, Any], reuses: bool) -> torch.Tensor:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not reuses:
                self.kept = args[0][:, : self.width].clone()
                return None
            assert self.kept is not None
            return torch.cat([self.kept, args[0][:, self.width :]], dim=1), *args[1:]

        handle = self.layer.register_forward_pre_hook(hook)
        try:
            return call(self.unet, inputs)
        finally:
            handle.remove()


class Driver:
    """Stands for the engine: a list says which calls reuse."""

    def __init__(self) -> None:
        self.reuses, self.asked = False, 0
        self.kept: torch.Tensor | None = None

    def ask(self, entered: torch.Tensor) -> torch.Tensor | None:
        self.asked += 1
        assert entered.ndim == 4
        return self.kept.clone() if self.reuses and self.kept is not None else None

    def keep(self, feature: torch.Tensor) -> None:
        self.kept = feature.clone()


@contextmanager
def count_resnets(unet: Any) -> Iterator[set[str]]:
    """Names of the residual blocks that are truly computed."""
    ran: set[str] = set()
    handles = [
        module.conv1.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in unet.named_modules()
        if hasattr(module, "conv1")
    ]
    yield ran
    for handle in handles:
        handle.remove()


SHAPES: dict[str, Callable[[], Any]] = {
    "sd": build_unet,
    "sd2": lambda: build_unet((PLAIN, CROSS), layers=1),
    "sdxl": lambda: build_unet((PLAIN, CROSS, CROSS), xl=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_deep_matches_the_feature_put_in_by_hand(shape: str) -> None:
    unet = SHAPES[shape]()
    stock = call(unet, inputs_of(unet, 7))
    for branch in range(deep_branches(unet)):
        plan = [False, True, False, True]
        oracle = Oracle(unet, branch)
        wanted = [oracle(inputs_of(unet, step), reuses) for step, reuses in enumerate(plan)]
        driver = Driver()
        undo = install_deep(unet, branch, driver.ask, driver.keep)
        for step, reuses in enumerate(plan):
            driver.reuses = reuses
            torch.testing.assert_close(call(unet, inputs_of(unet, step)), wanted[step], rtol=0, atol=0)
        assert driver.asked == len(plan)
        undo()
        assert not any({"forward", "compile"} & vars(module).keys() for module in unet.modules())
    assert torch.equal(call(unet, inputs_of(unet, 7)), stock)


@pytest.mark.parametrize("branch", [0, 2, 4, 8])
def test_deep_computes_nothing_else(branch: int) -> None:
    unet, driver = build_unet(), Driver()  # nine skip connections: 3 + 3 + 2 layers going down, and conv_in
    names = {module: name for name, module in unet.named_modules()}
    down: list[Any] = []
    for block in unet.down_blocks:
        down += [*block.resnets, *([None] if block.downsamplers else [])]
    wanted = {names[layer] for layer in [*down[:branch], *up_layers(unet)[: branch + 1]] if layer is not None}
    install_deep(unet, branch, driver.ask, driver.keep)
    call(unet, inputs_of(unet, 0))
    driver.reuses = True
    with count_resnets(unet) as ran:
        call(unet, inputs_of(unet, 1))
    assert ran == wanted


def controlled(unet: Any, inputs: dict[str, Any], adapter: bool) -> dict[str, Any]:
    """With what a ControlNet adds to every skip connection, or a T2I adapter to the end of every down block."""
    with torch.no_grad():
        sample, skips = inputs["sample"], []
        hooks = [
            module.register_forward_hook(lambda _, __, output: skips.append(output[0]))  # by block, for the adapter
            for module in unet.down_blocks
        ]
        call(unet, inputs)
        for hook in hooks:
            hook.remove()
    draw = torch.Generator().manual_seed(3)
    noise = lambda like: torch.randn(like.shape, generator=draw)  # noqa: E731
    if adapter:
        ends: list[
            tuple[torch.Tensor, tuple[int, ...]]
        ] = []  # what the last layer of each block gave, before its downsampler
        for block, output in zip(unet.down_blocks, skips, strict=True):
            width = block.resnets[-1].out_channels
            height, side = (9, 13) if not ends else ends[-1][1]
            ends.append((torch.randn(2, width, height, side, generator=draw), tuple(output.shape[-2:])))
        return inputs | {"down_intrablock_additional_residuals": [residual for residual, _ in ends]}
    sides = [sample.shape[-2:]]
    for block in unet.down_blocks:
        sides += [sides[-1]] * len(block.resnets)
        sides += [torch.Size((side + 1) // 2 for side in sides[-1])] * bool(block.downsamplers)
    down = [torch.randn(2, width, *side, generator=draw) for width, side in zip(skip_widths(unet), sides, strict=True)]
    return inputs | {
        "down_block_additional_residuals": tuple(down),
        "mid_block_additional_residual": noise(skips[-1]),
    }


@pytest.mark.parametrize("what", ["controlnet", "adapter", "freeu"])
@pytest.mark.parametrize("branch", [1, 5])
def test_deep_with_additions_of_others(what: str, branch: int) -> None:
    unet, driver = build_unet(), Driver()
    if what == "freeu":
        unet.enable_freeu(0.9, 0.2, 1.2, 1.4)

    def inputs(step: int) -> dict[str, Any]:
        plain = inputs_of(unet, step)
        return plain if what == "freeu" else controlled(unet, plain, what == "adapter")

    oracle, plan = Oracle(unet, branch), [False, True, True]
    wanted = [oracle(inputs(step), reuses) for step, reuses in enumerate(plan)]
    given = [inputs(step) for step in range(len(plan))]
    install_deep(unet, branch, driver.ask, driver.keep)
    for step, reuses in enumerate(plan):
        driver.reuses = reuses
        assert torch.equal(call(unet, given[step]), wanted[step])


def test_deep_refuses() -> None:
    unet = build_unet()
    view = RootView(unet, "UNet2DConditionModel", (), (), is_unet=True)
    (unit,) = Deep(3).units(view)
    assert (unit.kind, unit.first) == ("deep", 3)
    for branch in (-1, 9, True, 1.5):
        with pytest.raises(ValueError, match="0 to 8"):
            Deep(branch).units(view)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no UNet"):
        Deep().units(RootView(unet, "Other", (), (), is_unet=False))
    strange = build_unet((("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), PLAIN), layers=1)
    with pytest.raises(ValueError, match=r"down_blocks\.0 is ResnetDownsampleBlock2D"):
        install_deep(strange, 0, Driver().ask, Driver().keep)
    assert not any("forward" in vars(module) for module in strange.modules())


def run(subject: Subject, steps: int = 6, **changes: Any) -> torch.Tensor:
    """Latents of one generation."""
    return subject.run(num_inference_steps=steps, **changes)


@pytest.mark.parametrize("mode", ["uniform", "nonuniform"])
def test_deepcache_matches_the_feature_put_in_by_hand(mode: str) -> None:
    subject = build_image_subject("sdxl")
    stock, unet = run(subject), subject.root
    computed = (0, 3) if mode == "uniform" else nonuniform_steps(6, 3, 2)
    oracle, calls, original = Oracle(unet, 1), [0], unet.forward

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        step = calls[0]
        calls[0] += 1

        def hook(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if step in computed:
                oracle.kept = given[0][:, : oracle.width].clone()
                return None
            assert oracle.kept is not None
            return torch.cat([oracle.kept, given[0][:, oracle.width :]], dim=1), *given[1:]

        handle = oracle.layer.register_forward_pre_hook(hook)
        try:
            return original(*args, **kwargs)
        finally:
            handle.remove()

    unet.forward = by_hand
    wanted = run(subject)
    del unet.forward
    settings: dict[str, Any] = {} if mode == "uniform" else {"mode": mode, "steps": 6, "center": 2}
    with accelerate(subject.pipe, cache=deepcache(branch=1, **settings)) as acceleration:
        assert torch.equal(run(subject), wanted)
        decisions = acceleration.caches.engines[0].record.decisions
        assert tuple(each.step for each in decisions if each.computed) == computed
        assert torch.equal(run(subject), wanted)
    assert torch.equal(run(subject), stock) and not torch.equal(wanted, stock)


class ByHand:
    """A processor around the stock one, with T-GATE's rule written out."""

    def __init__(self, stock: Any, is_cross: bool, clock: Any) -> None:
        self.stock, self.is_cross, self.clock = stock, is_cross, clock
        self.kept: torch.Tensor | None = None

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        step, gate = self.clock.step, self.clock.gate
        if self.is_cross:
            computes = step < gate
        else:  # warm-up to step 1, then each second step, the last before the gate, and all behind it
            computes = step <= 1 or step % 2 == 0 or step >= gate - 1
        if computes:
            output: torch.Tensor = self.stock(attn, hidden_states, *args, **kwargs)
            self.kept = output
            return output
        assert self.kept is not None
        if not self.is_cross:
            return self.kept
        first, second = self.kept.chunk(2) if len(self.kept) == 2 else (self.kept, self.kept)
        return ((first + second) / 2).repeat(len(self.kept), 1, 1)


class Steps:
    """Counts the calls of a UNet; behind the gate the second row of its output stands for both."""

    def __init__(self, unet: Any, gate: int) -> None:
        self.step, self.gate = -1, gate
        self.handles = [unet.register_forward_pre_hook(self.count), unet.register_forward_hook(self.copy)]

    def count(self, module: Any, args: Any) -> None:
        self.step += 1

    def copy(self, module: Any, args: Any, output: Any) -> Any:
        if self.step >= self.gate and len(output[0]) == 2:
            return (output[0][1:].repeat(2, 1, 1, 1),)
        return None


@pytest.mark.parametrize(("shape", "guidance"), [("sd15", 7.5), ("sdxl", 5.0), ("sd15", 1.0)])
def test_tgate_matches_processors_written_by_hand(shape: str, guidance: float) -> None:
    subject, gate = build_image_subject(shape), 4
    stock, unet = run(subject, guidance_scale=guidance), subject.root
    processors, clock = dict(unet.attn_processors), Steps(unet, gate)
    unet.set_attn_processor(
        {name: ByHand(processor, ".attn2." in name, clock) for name, processor in processors.items()}
    )
    wanted = run(subject, guidance_scale=guidance)
    for handle in clock.handles:
        handle.remove()
    unet.set_attn_processor(processors)
    batches: list[int] = []
    handle = unet.conv_out.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    with accelerate(subject.pipe, cache=tgate(gate_step=gate, sp_interval=2, warmup=1)):
        found = run(subject, guidance_scale=guidance)
        assert batches == ([2, 2, 2, 2, 1, 1] if guidance > 1 else [1] * 6)
        assert torch.equal(run(subject, guidance_scale=guidance), found)
    handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(subject, guidance_scale=guidance), stock)


def test_tgate_with_deepcache() -> None:
    """What DeepCache kept of both branches serves the one that is run behind the gate."""
    subject, entered = build_image_subject("sd15"), list[torch.Tensor]()
    layer = up_layers(subject.root)[0]
    width = layer.in_channels - skip_widths(subject.root)[0]
    with accelerate(subject.pipe, cache=[*tgate(gate_step=3), deepcache(interval=2)]) as acceleration:
        hook = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
        found = run(subject, steps=5)
        hook.remove()
        decisions = acceleration.caches.engines[-1].record.decisions
        assert [each.computed for each in decisions] == [True, False, True, False, True]
        assert torch.equal(run(subject, steps=5), found)
    assert [len(each) for each in entered] == [2, 2, 2, 1, 1]
    assert torch.equal(entered[3][:, :width], entered[2][1:, :width])  # what step 2 kept, its conditional half


def test_nonuniform_steps() -> None:
    # From the authors' function for 50 steps, with centers 15, 10 and 0 and powers 1.4, 1.2 and 1.4.
    assert nonuniform_steps(50, 5) == (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    assert nonuniform_steps(50, 5, 10, 1.2) == (0, 5, 9, 12, 16, 21, 26, 32, 38, 43)
    assert nonuniform_steps(50, 5, 0) == (0, 1, 5, 9, 13, 18, 24, 30, 36, 43)
    assert nonuniform_steps(50, 10, 15, 1.3) == (0, 10, 17, 26, 37)
    assert nonuniform_steps(6, 1) == tuple(range(6))
    for bad in ({"center": 50}, {"power": 1.0}, {"interval": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"center|power|whole number"):
            nonuniform_steps(**({"steps": 50, "interval": 5} | bad))
    with pytest.raises(ValueError, match=r"give steps="):
        deepcache(mode="nonuniform")


def test_sparse_attention_is_told_what_deepcache_skips() -> None:
    subject = build_image_subject("sd15")
    with accelerate(subject.pipe, "agent", cache=deepcache(interval=2), preset=None) as acceleration:
        run(subject, steps=4)
        sites = {site.path.partition(":")[2]: site for site in acceleration.report().sites}
    calls = {path: site.sparse_calls + site.dense_calls for path, site in sites.items()}
    # Branch 0 runs the last up layer alone, whose attention is that of up_blocks.1.attentions.1.
    assert calls and all(
        count == (4 if path.startswith("up_blocks.1.attentions.1.") else 2) for path, count in calls.items()
    )


def test_branch_mean() -> None:
    value = torch.tensor([[1.0], [2.0], [5.0], [8.0]])  # two pictures, unconditional first
    kept = [Kept(Place(3, None), value)]
    assert BranchMean().predict(kept, Place(4, None, paired=True)).tolist() == [[3.0], [5.0], [3.0], [5.0]]
    assert BranchMean().predict(kept, Place(4, None)) is value


def test_tgate_refuses_other_models(make_tiny_wan: Callable[[int], Any]) -> None:
    with pytest.raises(ValueError, match="is none; take"):
        accelerate(make_tiny_wan(0), cache="tgate")
    with pytest.raises(ValueError, match=r"Gate\.step is a whole number from 1"):
        tgate(gate_step=0)
