"""The front door: ``accelerate(pipe, attention="radial", cache="teacache")`` and the ``set_attn_processor`` routes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .acceleration import Acceleration, acceleration_of, check_anchor
from .caching.together import Anchor, recipes_of
from .controls import AttentionControl
from .install import BlockHook, TokenPermutation
from .presets import AUTO, AutoAttnProcessor, facts_of, recipe_by_name
from .processors.base import DynamicAttnProcessor, SparseAttnProcessor, StaticAttnProcessor
from .processors.operator import OperatorAttnProcessor
from .roots import find_roots

if TYPE_CHECKING:
    from pathlib import Path

    from .caching.recipe import Cache
    from .install.permutation import OrderFor
    from .quality import Profile


def accelerate(
    target: Any,
    attention: str | SparseAttnProcessor | None = None,
    *,
    cache: str | Cache | Sequence[str | Cache] | None = None,
    cache_settings: Mapping[str, Any] | None = None,
    anchor: Anchor | None = None,
    timed: bool = False,
    target_psnr: float | None = None,
    target_ssim: float | None = None,
    max_rel_error: float | None = None,
    max_time: float | None = None,
    profile: Profile | str | Path | None = None,
    prompts: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
    strict: bool = False,
    controls: Sequence[AttentionControl] = (),
    block_hooks: Sequence[BlockHook] = (),
    token_order: OrderFor | None = None,
    preset: str | None = AUTO,
    **settings: Any,
) -> Acceleration:
    """Accelerates a pipeline or a bare transformer in place.

    Args:
        target: a diffusers pipeline, or its transformer or UNet.
        attention: a method's name such as ``"radial"``, ``"auto"`` for the one that suits model, tokens, steps and
            device, one of :mod:`dit_accel.processors`, or None to leave attention as it is (with controls or hooks
            alone).
        cache: what to reuse between steps: a preset's name such as ``"teacache"``
            (:mod:`dit_accel.caching.presets`), a :class:`dit_accel.caching.Cache`, several of these (the last is
            outermost), or None.
        cache_settings: settings of the preset, when given by name.
        anchor: lets the first computed call after skipped ones keep more, when a cache runs with a sparse method
            (:class:`dit_accel.caching.Anchor`); None: it keeps what it always does.
        timed: whether the report splits wall time into attention, work of the cache and all other.
        target_psnr: instead of a cache, what it has to keep on every prompt: least PSNR in dB against dense. The cache
            comes from a profile that was tuned for this target (:mod:`dit_accel.quality`). If none kept it beside
            ``attention``, all is dense, with a warning.
        target_ssim: likewise, least SSIM.
        max_rel_error: likewise, largest relative error of the final latents.
        max_time: likewise, most seconds for one generation, as well as can be in them.
        profile: of :func:`dit_accel.tune`, or its file. With a target: None for the one saved for it.
        prompts: with a target: to tune on now, if no profile is saved for it. Takes many generations.
        held_out: with them, others for the last check.
        call: with them, arguments of the pipeline's call, such as ``{"num_inference_steps": 50}``.
        strict: whether a run that a profile was not measured for is refused; else it is told once.
        controls: attention controls, in the order in which they act.
        block_hooks: hooks around every transformer block, outermost first.
        token_order: gives the order in which the blocks have their video tokens, see
            :class:`dit_accel.install.TokenPermutation`; None for frame by frame, row by row.
        preset: where a method given by name has the settings from that are not given here: ``"auto"``, those
            published for the model, if any; the name of a preset (:data:`dit_accel.presets.PRESETS`); None, the
            method's own defaults.
        **settings: settings of the method, when given by name.

    Returns:
        a handle with ``report()`` and ``remove()``; also a context manager.

    Raises:
        UnknownModelError: if the model is of no registered family.
        ValueError: for bad settings, a method that does nothing for the model, a control that acts nowhere, a target
            accelerated already, or one that is compiled already.
    """
    from .quality.asked import profile_asked  # tuning accelerates pipelines itself

    targets = {
        "target_psnr": target_psnr,
        "target_ssim": target_ssim,
        "max_rel_error": max_rel_error,
        "max_time": max_time,
    }
    if cache is not None and (profile is not None or any(value is not None for value in targets.values())):
        raise ValueError("a target or a profile says which cache; leave cache out, or leave them out")
    completed = None
    if isinstance(attention, str):
        attention, completed = recipe_by_name(attention, settings, facts_of(find_roots(target)), preset)
    elif settings or preset not in (AUTO, None):
        given = [*sorted(settings), *(["preset"] if preset not in (AUTO, None) else [])]
        raise ValueError(f"settings {given} belong to a method given by name; give them to the processor")
    if attention is not None and not is_ours(attention):
        raise ValueError(
            "attention is a method's name or a dit_accel processor, that is an OperatorAttnProcessor, "
            f"StaticAttnProcessor or DynamicAttnProcessor; got {type(attention).__name__}"
        )
    if prompts and (controls or block_hooks or token_order is not None):
        raise ValueError(
            "tuning compares with what the pipeline makes by itself, so it knows no controls, block_hooks or "
            "token_order; tune without them, then give the profile with them"
        )
    beside = {name: value for name, value in (("attention", attention), ("anchor", anchor)) if value is not None}
    found = profile_asked(target, targets, profile, prompts, held_out, beside, call)
    if found is not None:
        cache = found.cache()
    if found is not None and found.misses_target and attention is not None:
        _warn_of_dense(attention, found.reason)
        attention, anchor, completed = None, None, None
    if token_order is not None:
        block_hooks = (TokenPermutation(token_order), *block_hooks)
    root = next(iter(find_roots(target).values()))
    caches = recipes_of(cache, cache_settings, root)
    handle = Acceleration(target, attention, controls, block_hooks, completed, caches, anchor, timed)
    if found is None or found.is_off:
        handle.profile = found  # one that is off is dense on any run
        return handle
    try:
        handle.keep_to(found, target, beside, strict)
    except BaseException:
        handle.remove()
        raise
    return handle


def _warn_of_dense(attention: SparseAttnProcessor, reason: str) -> None:
    from .quality import ProfileWarning

    warnings.warn(
        f"dit_accel: attention stays dense as well: {type(attention).__name__} was measured with caches beside it, "
        f"and none serves the target ({reason}); leave out the target and the profile to run it all the same",
        ProfileWarning,
        stacklevel=3,
    )


def is_ours(processor: object) -> bool:
    """Whether an object is one of our recipes."""
    ours = (StaticAttnProcessor, DynamicAttnProcessor, OperatorAttnProcessor, AutoAttnProcessor)
    return isinstance(processor, ours)


def replace_processor(target: Any, processor: Any) -> None:
    """What ``set_attn_processor`` does on pipelines, and on models for our processors: the new one replaces ours.

    Where a pipeline is accelerated, a model of it stands for all of its models: the new method replaces the old one on
    each. Caches, controls and hooks stay, and the anchor as long as the new method is ours; :func:`acceleration_of`
    gives the handle that they have now.

    Raises:
        ValueError: if a cache is on the pipeline that was tuned with the attention it has, or that has an anchor which
            the new method cannot keep more at; and if the new method is refused. The old one stays then.
    """
    current = acceleration_of(target)
    if current is not None and current.profile is not None and not current.profile.is_off:
        raise ValueError(
            "the cache on this pipeline was tuned for a quality target with the attention it has; call "
            "dit_accel.acceleration_of(...).remove() first, and tune with the new one beside it"
        )
    if current is None:
        _put_on(target, processor)
        return
    anchor = current.caches.anchor if is_ours(processor) else None
    if anchor is not None:
        check_anchor(anchor, processor)
    whole = target if current.pipeline is None else current.pipeline
    before = current.processor, current.caches.anchor
    stands: dict[Any, dict[str, Any]] = {}
    current.remove()
    try:
        if not is_ours(processor):
            stands = {root: dict(root.attn_processors) for root in _models(target)}
            _put_on(target, processor)
            processor = None
        if processor is not None or current.caches or current.controls or current.block_hooks:
            current.replaced(whole, processor, anchor)
    except BaseException:
        for root, processors in stands.items():
            root.set_attn_processor(processors)
        current.replaced(whole, *before)
        raise


def _put_on(target: Any, processor: Any) -> None:
    """Sets a processor where nothing of ours is."""
    if is_ours(processor):
        Acceleration(target, processor)
        return
    for root in _models(target):
        root.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)


def _models(target: Any) -> list[Any]:
    return list(find_roots(target).values())
