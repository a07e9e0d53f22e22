"""What cannot be cached is refused in plain words, and every cache has hooks; metrics have known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.caching.presets.fbcache import fbcache
from dit_accel.caching.presets.static import static
from dit_accel.caching.recipe import Cache
from dit_accel.families import Family, register_family
from dit_accel.families.registry import _FAMILIES
from dit_accel.metrics import flicker, motion_ratio, psnr, ssim

from .affine import AffineModel
from .defects import wrapping_psnr
from .recipes import OUTPUT, pairs, recipes_for
from .subjects import built, clean

Psnr = Callable[[Tensor, Tensor], float]


@pytest.mark.parametrize(("name", "cache"), pairs())
def test_every_cache_hooks_something(name: str, cache: str) -> None:
    with clean(built(name)) as case:
        plain = [len(vars(module)) for root in case.roots() for module in root.modules()]
        with dit_accel.accelerate(case.pipe, cache=recipes_for(name)[cache]):
            hooked = [len(vars(module)) for root in case.roots() for module in root.modules()]
        assert sum(now > before for now, before in zip(hooked, plain, strict=True)) >= len(case.roots())
        assert [len(vars(module)) for root in case.roots() for module in root.modules()] == plain


@pytest.mark.parametrize("cache", [static(every=2), fbcache()], ids=["static", "fbcache"])
@pytest.mark.parametrize("lists", [(), ("blocks",)], ids=["no blocks", "no streams"])
def test_a_family_that_says_nothing_of_its_blocks_is_refused(
    cache: Cache, lists: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unsaid(AffineModel):
        """Of a family that names no blocks, or not what they return."""

    known = _FAMILIES["AffineModel"]
    monkeypatch.setitem(_FAMILIES, "Unsaid", known)  # taken out again at the end
    register_family(Family("Unsaid", known.layout, known.site_kind, lists, makes_video=False))
    root = Unsaid()
    before = [vars(module).keys() for module in root.modules()]
    with pytest.raises(ValueError, match=r"Unsaid.*block_(lists|streams)|block_streams.*CONTRIBUTING"):
        dit_accel.accelerate(root, cache=cache)
    assert [vars(module).keys() for module in root.modules()] == before
    assert dit_accel.acceleration_of(root) is None


def test_blocks_of_a_unet_are_refused_and_what_works_is_named() -> None:
    with clean(built("sd15")) as case, pytest.raises(ValueError, match=r"Deep, Output.*deepcache"):
        dit_accel.accelerate(case.pipe, cache=static(every=2))


def test_the_output_of_a_model_without_blocks_can_still_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blockless(AffineModel):
        """Of a family that names no blocks."""

    known = _FAMILIES["AffineModel"]
    monkeypatch.setitem(_FAMILIES, "Blockless", Family("Blockless", known.layout, known.site_kind, ()))
    with dit_accel.accelerate(Blockless(), cache=OUTPUT) as handle:
        assert handle is not None


def flat(level: int) -> Tensor:
    """A clip of one 8-bit gray, as floats."""
    return torch.full((2, 3, 16, 16), level / 255)


def check_psnr(measure: Psnr) -> None:
    """Known answers: black and white are 0 dB apart, black and gray 16 24.05 dB, and so the other way round."""
    assert measure(flat(0), flat(255)) == pytest.approx(0, abs=1e-4)
    for level in (1, 15, 16, 17, 100, 200):
        wanted = -20 * math.log10(level / 255)
        assert measure(flat(0), flat(level)) == pytest.approx(wanted, abs=1e-4)
        assert measure(flat(level), flat(0)) == pytest.approx(wanted, abs=1e-4)
    assert measure(flat(7), flat(7)) == math.inf


def test_psnr_has_known_answers_and_does_not_wrap() -> None:
    check_psnr(psnr)
    with pytest.raises(AssertionError):
        check_psnr(wrapping_psnr)
    assert wrapping_psnr(flat(0), flat(16)) == math.inf  # as others report it
    assert wrapping_psnr(flat(0), flat(255)) == pytest.approx(48.13, abs=0.01)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="divide 8-bit frames by 255"):
            metric((flat(0) * 255).byte(), (flat(16) * 255).byte())


def test_the_other_metrics_have_known_answers() -> None:
    black, white = flat(0), flat(255)
    assert ssim(white, white) == pytest.approx(1)
    assert ssim(black, white) == pytest.approx(0.01**2 / (1 + 0.01**2), rel=1e-3)  # only the constant C1 is left
    moving = torch.cat([flat(0)[:1], flat(255)[:1]])
    assert motion_ratio(moving * 0.5, moving) == pytest.approx(0.5)
    assert motion_ratio(flat(9), moving) == 0
    assert motion_ratio(black, black) == 1
    assert flicker(moving) == pytest.approx(1)
    assert flicker(moving, moving) == 0
