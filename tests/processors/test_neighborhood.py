"""Neighborhood attention on whole pipelines: each site against dense attention under the mask of the formula."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import AttentionControl
from dit_accel.controls import AttentionCall, SiteInfo
from dit_accel.install.permutation import TokenPermutation
from dit_accel.layout import TokenLayout
from dit_accel.processors import NeighborhoodAttnProcessor, processor_by_name

from ..seams.conftest import Subject, build_image_subject, build_subject

ODD_VIDEO = {"height": 112, "width": 80, "num_frames": 17, "num_inference_steps": 2}  # 5 x 7 x 5 tokens
SPARSE: dict[str, Any] = {"dense_steps": 0, "block": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "sliding": {"window": (3, 5, 3)},
    "strided, causal in time": {"window": (4, 5, 3), "stride": (2, 3, 1), "causal": (True, False, False)},
    "blocked": {"window": 3, "stride": 3, "tile": (3, 3, 3)},
    "dilated": {"window": 2, "dilation": (1, 2, 2), "stride": "tile"},
    "alternate": {"window": 0.4, "dilation": "alternate"},
}


def kept(i: int, j: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """The formula of one dimension."""
    if i % dilation != j % dilation:
        return False
    own, other, size = i // dilation, j // dilation, len(range(i % dilation, length, dilation))
    leader = min(own // stride * stride + (stride - 1 if causal else stride // 2), size - 1)
    if causal:
        return other <= own and leader - other < window
    return 0 <= other - max(min(leader - window // 2, size - window), 0) < window


def mask_of(details: Any, layout: TokenLayout) -> Tensor:
    """Bool `[N, N]` of a layout, tokens outside the grid dense both ways."""
    names = ("grid", "window", "stride", "dilation", "causal")
    mask = torch.ones(1, 1, dtype=torch.int8)
    for n, *numbers in zip(*(details[name] for name in names), strict=True):
        along = torch.tensor([[kept(i, j, n, *numbers) for j in range(n)] for i in range(n)])
        mask = torch.kron(mask, along.to(torch.int8))
    start, stop = layout.visual
    outside = (start, layout.length - stop)
    return torch.nn.functional.pad(mask.bool(), (*outside, *outside), value=True)


class Oracle(AttentionControl):
    """Compares the output of every site with dense softmax under the mask of the formula."""

    def __init__(self, recipe: NeighborhoodAttnProcessor) -> None:
        super().__init__(kinds=("self", "joint"))
        self.recipe = recipe
        self.errors: list[float] = []
        self.densities: list[float] = []
        self.masks: dict[Any, Tensor] = {}

    def record(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Notes the largest error."""
        recipe = self.recipe.for_site(call.site)
        if (recipe, call.layout) not in self.masks:
            details = recipe.build_plan(call.layout, query.device).stats.details
            self.masks[recipe, call.layout] = mask_of(details, call.layout)
        mask = self.masks[recipe, call.layout]
        scores = (query.double() @ key.double().transpose(-1, -2)) * query.shape[-1] ** -0.5
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.double()
        self.errors.append(float((output - expected).abs().max()))
        self.densities.append(float(mask.double().mean()))


@pytest.fixture(scope="module")
def wan(make_tiny_wan: Callable[[int], Any]) -> Subject:
    return build_subject(make_tiny_wan, "t2v")


@pytest.fixture(scope="module", params=["sd3", "flux", "sd15"])
def image(request: pytest.FixtureRequest) -> Subject:
    """Text behind the image, before it, and none on the grids of two levels."""
    return build_image_subject(request.param)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_site_of_a_video_model_follows_the_formula(wan: Subject, settings: dict[str, Any]) -> None:
    recipe = NeighborhoodAttnProcessor(**SPARSE, **settings)
    oracle = Oracle(recipe)
    with dit_accel.accelerate(wan.pipe, recipe, controls=[oracle]) as handle:
        wan.run(**ODD_VIDEO)
        report = handle.report()
    assert len(oracle.errors) == 2 * 2 * 2  # layers, steps, branches
    assert max(oracle.errors) < 1e-5
    assert report.fallbacks == {} and all(site.dense_calls == 0 for site in report.sites)
    assert report.density == pytest.approx(sum(oracle.densities) / len(oracle.densities), abs=1e-9)
    assert report.density < 0.5


def test_snapped_plans_keep_more(wan: Subject) -> None:
    densities = []
    for snap in (False, True):
        with dit_accel.accelerate(wan.pipe, "neighborhood", window=0.3, snap=snap, **SPARSE) as handle:
            wan.run(**ODD_VIDEO)
            densities.append(handle.report().density)
    assert densities[0] < densities[1] < 1


@pytest.mark.parametrize("settings", [{}, {"window": (4, 3), "stride": 2}, {"window": 2, "dilation": 2}])
def test_every_site_of_an_image_model_follows_the_formula(image: Subject, settings: dict[str, Any]) -> None:
    recipe = NeighborhoodAttnProcessor(**SPARSE, **settings)
    oracle = Oracle(recipe)
    with dit_accel.accelerate(image.pipe, recipe, controls=[oracle]):
        image.run()
    assert oracle.errors and max(oracle.errors) < 1e-5
    assert max(oracle.densities) < 1


def test_videos_remove_bit_equal_and_batch_as_their_samples(wan: Subject) -> None:
    check_removal_and_batch(wan, ODD_VIDEO, (16, 5, 14, 10))


def test_images_remove_bit_equal_and_batch_as_their_samples(image: Subject) -> None:
    check_removal_and_batch(image, {}, image.run().shape[1:])


def check_removal_and_batch(subject: Subject, size: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Same weights, with and without; two samples together and one by one."""
    stock = subject.run(**size)
    prompts = {key: torch.randn(2, *part.shape[1:]) for key, part in subject.inputs.items() if "embeds" in key}
    both: dict[str, Any] = prompts | {"latents": torch.randn(2, *shape)}
    with dit_accel.accelerate(subject.pipe, "neighborhood", window=0.5, **SPARSE):
        assert not torch.allclose(subject.run(**size), stock)
        together = subject.run(**size | both)
        for i in range(2):
            one = {key: part[i : i + 1] for key, part in both.items()}
            assert torch.allclose(subject.run(**size | one)[0], together[i], atol=1e-4)
    assert torch.equal(subject.run(**size), stock)


def test_a_second_run_equals_a_fresh_one_and_each_resolution_has_its_plan(wan: Subject) -> None:
    recipe = NeighborhoodAttnProcessor(**SPARSE)
    with dit_accel.accelerate(wan.pipe, recipe):
        wan.run(seed=5, height=32, width=32, num_frames=9)
        second = wan.run(**ODD_VIDEO)
    with dit_accel.accelerate(wan.pipe, recipe):
        assert torch.equal(wan.run(**ODD_VIDEO), second)


def test_tokens_can_be_permuted_once_per_call(wan: Subject) -> None:
    recipe = NeighborhoodAttnProcessor(**SPARSE, tile=(1, 4, 4))
    with dit_accel.accelerate(wan.pipe, recipe):
        expected = wan.run(**ODD_VIDEO)
    permutation = TokenPermutation(recipe.token_order)
    with dit_accel.accelerate(wan.pipe, recipe, block_hooks=[permutation]):
        assert torch.allclose(wan.run(**ODD_VIDEO), expected, atol=1e-5)
    layout = TokenLayout.video_only((5, 7, 5))
    order = permutation.order(layout, torch.device("cpu"))
    assert order is not None and not torch.equal(order, torch.arange(175))


def test_warm_up_is_the_published_one() -> None:
    schedule = NeighborhoodAttnProcessor().schedule
    assert schedule.dense_step_count(50) == 15 and not schedule.is_dense(15, 50, 0)


def test_dilation_alternates_over_layers() -> None:
    recipe = NeighborhoodAttnProcessor(window=0.3, dilation="alternate", block=64)
    layout, device = TokenLayout.video_only((5, 13, 11)), torch.device("cpu")
    plans = [
        recipe.for_site(SiteInfo("blocks", "self", layer, 4, "transformer")).build_plan(layout, device)
        for layer in range(4)
    ]
    assert [plan.stats.details["window"] for plan in plans] == [(2, 4, 4)] * 4
    assert [plan.stats.details["dilation"] for plan in plans] == [(1, 1, 1), (2, 3, 2)] * 2
    with pytest.raises(ValueError, match="for_site"):
        recipe.build_plan(layout, device)


def test_references_count_as_text_and_padding_is_refused() -> None:
    layout = TokenLayout((1, 5, 7), (3, 38), text=(0, 3), references=((38, 48),))
    plan = NeighborhoodAttnProcessor(window=3, block=64).build_plan(layout, torch.device("cpu"))
    mask = plan.element_mask()[0, 0]
    outside = [*range(3), *range(38, 48)]
    assert mask[outside].all() and mask[:, outside].all()
    assert mask[3:38, 3:38].sum(1).eq(9).all()
    with pytest.raises(ValueError, match="2 padding tokens"):
        NeighborhoodAttnProcessor().build_plan(TokenLayout((1, 2, 2), (0, 4), padding=2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0.0}, r"\(0, 1\]"),
        ({"window": (3, 3, 3, 3)}, "4 entries"),
        ({"window": 4, "stride": 5}, "stride of 1 to 4"),
        ({"stride": "tiles"}, "'tile'"),
        ({"dilation": "alternating"}, "'widest'"),
        ({"dilation": "alternate"}, "at most half a side"),
        ({"dilation": "alternate", "window": 0.4, "stride": 0}, "whole numbers from 1"),
        ({"snap": 1}, "True or False"),
        ({"block": 96}, "64 or 128"),
        ({"windows": 3}, "unexpected keyword argument"),
    ],
)
def test_bad_settings_say_what_is_valid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor_by_name("neighborhood", **settings)


def test_a_window_that_the_model_cannot_have_is_refused_by_its_first_call(wan: Subject) -> None:
    stock = wan.run(**ODD_VIDEO)
    message = "window 6 is larger than the 5 frames of the grid; give 1 to 5"
    handle = dit_accel.accelerate(wan.pipe, "neighborhood", window=6, **SPARSE)
    with handle, pytest.raises(ValueError, match=message):
        wan.run(**ODD_VIDEO)
    assert torch.equal(wan.run(**ODD_VIDEO), stock)


def test_two_dimensions_are_for_images() -> None:
    family: Any = SimpleNamespace(makes_video=True, root_class="WanTransformer3DModel")
    with pytest.raises(ValueError, match="stride has 2 entries, but WanTransformer3DModel makes videos"):
        NeighborhoodAttnProcessor(window=(3, 3, 3), stride=(1, 1)).check_family(family)
    family.makes_video = False
    NeighborhoodAttnProcessor(window=(3, 3), stride=(1, 1)).check_family(family)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_build_an_equal_recipe(settings: dict[str, Any]) -> None:
    recipe = NeighborhoodAttnProcessor(**settings, snap=True, dense_layers=[0, 2])
    again = NeighborhoodAttnProcessor(**recipe.settings())
    assert repr(again) == repr(recipe)
    layout, device = TokenLayout.video_only((5, 7, 5)), torch.device("cpu")
    for layer in range(2):
        site = SiteInfo("blocks", "self", layer, 2, "transformer")
        first, second = (one.for_site(site).build_plan(layout, device) for one in (recipe, again))
        assert torch.equal(first.element_mask(), second.element_mask())
