"""Whole steps of video transformers at 720p with random weights: dense with cuDNN, then with sparse methods.

Configurations are those of the published models, written down as numbers; nothing is downloaded.  One step is one call
of the transformer without guidance.  Every layer is sparse, without a dense warm-up, so the speed-up of a whole
generation is lower.

A mask that is all True, which HunyuanVideo always has, costs kernels of dense attention time.  So a model with a mask
is timed with it and without, and speed-ups are over the faster of the two.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.families import is_known
from dit_accel.processors import ATTENTION, processor_by_name

from .session import Row, Session, Timing

# By short name; those that this version does not have are listed as skipped.
METHODS = ("radial", "block_routing")
# Seconds that a model and its dense steps need: less is not worth starting.
_NEEDED = 90.0
# What a sparse method may need, in dense steps: it runs two, and compiles.
_STEPS_NEEDED = 2.5
_MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class Model:
    """A transformer of diffusers, its sizes, its inputs, and published settings of methods where they differ."""

    name: str
    root_class: str
    config: dict[str, Any]
    inputs: Callable[[torch.device, torch.dtype], dict[str, Tensor]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def _wan_inputs(latent: tuple[int, int, int], text: int, text_dim: int) -> Callable[..., dict[str, Tensor]]:
    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(1, 16, *latent, device=device, dtype=dtype),
            "timestep": torch.tensor([500], device=device),
            "encoder_hidden_states": torch.randn(1, text, text_dim, device=device, dtype=dtype),
        }

    return inputs


def _hunyuan_inputs(
    latent: tuple[int, int, int], text: int, text_dim: int, pooled: int
) -> Callable[..., dict[str, Tensor]]:
    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return _wan_inputs(latent, text, text_dim)(device, dtype) | {
            _MASK: torch.ones(1, text, device=device, dtype=torch.bool),
            "pooled_projections": torch.randn(1, pooled, device=device, dtype=dtype),
            "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
        }

    return inputs


# 81 frames at 720 x 1280: latents of 21 x 90 x 160, 75,600 tokens.
WAN = Model(
    "Wan2.1-T2V-14B, 81 x 720 x 1280",
    "WanTransformer3DModel",
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    },
    _wan_inputs((21, 90, 160), 512, 4096),
)
# 129 frames at 720 x 1280: latents of 33 x 90 x 160, 118,800 tokens and 256 of text.
HUNYUAN = Model(
    "HunyuanVideo, 129 x 720 x 1280",
    "HunyuanVideoTransformer3DModel",
    {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_theta": 256.0,
        "rope_axes_dim": (16, 56, 56),
    },
    _hunyuan_inputs((33, 90, 160), 256, 4096, 768),
    {"radial": {"decay": 0.95, "sink": False}},
)

_TOY_SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
TOY_WAN = Model(
    "toy Wan",
    WAN.root_class,
    WAN.config | _TOY_SIZES | {"text_dim": 24, "freq_dim": 32, "ffn_dim": 32, "rope_max_seq_len": 64},
    _wan_inputs((5, 16, 16), 7, 24),
)
TOY_HUNYUAN = Model(
    "toy HunyuanVideo",
    HUNYUAN.root_class,
    HUNYUAN.config
    | _TOY_SIZES
    | {"num_single_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)},
    _hunyuan_inputs((5, 16, 16), 7, 24, 8),
)


def run(session: Session) -> Iterator[Row]:
    """Rows of seconds per step; the sparse ones name the dense row they are compared with."""
    for model in (TOY_WAN, TOY_HUNYUAN) if session.smoke else (WAN, HUNYUAN):
        if not session.smoke and session.left() < _NEEDED:
            yield {"model": model.name, "skipped": f"less than {_NEEDED:.0f} s of the budget are left"}
            continue
        yield from _steps(session, model)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


def _steps(session: Session, model: Model) -> Iterator[Row]:
    dtype = torch.float32 if session.smoke else torch.bfloat16
    try:
        # Without weights first: a model that nobody can accelerate need not fill the memory.
        known = is_known(build(model, torch.device("meta"), dtype))
        transformer = build(model, session.device, dtype) if known else None
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        yield {"model": model.name, "skipped": f"{type(error).__name__}: {error}".splitlines()[0]}
        return
    if transformer is None:
        yield {"model": model.name, "skipped": f"{model.root_class} is not a family that dit_accel knows"}
        return
    inputs = model.inputs(session.device, dtype)

    @torch.no_grad()
    def step() -> None:
        transformer(**inputs, return_dict=False)

    if session.device.type == "cuda":
        transformer.set_attention_backend("_native_cudnn")
    dense: dict[str, Timing] = {}
    case: Row = {
        "model": model.name,
        "config": model.config,
        "parameters": sum(p.numel() for p in transformer.parameters()),
    }
    case |= {"backend": "cuDNN" if session.device.type == "cuda" else "torch"}
    for method in _dense_methods(inputs):
        yield _in_time(
            session, dense, case | {"method": method}, _dense_step(session, transformer, method, step, dense)
        )
        case = {key: case[key] for key in ("model", "backend")}
    for method in METHODS:
        case = {"model": model.name, "method": method}
        if method not in ATTENTION:
            yield case | {"skipped": "this version has no such method"}
            continue
        yield _in_time(session, dense, case, _sparse_step(session, model, transformer, method, step, dense))


def _dense_methods(inputs: dict[str, Tensor]) -> tuple[str, ...]:
    return ("dense, full masks left out", "dense, masks as given") if _MASK in inputs else ("dense",)


def _in_time(session: Session, dense: dict[str, Timing], case: Row, measured: Callable[[], Row]) -> Row:
    """The row, unless its steps would outlast the budget by far."""
    needed = _STEPS_NEEDED * min((timing.p50 for timing in dense.values()), default=0.0)
    if not session.smoke and session.left() < needed:
        return case | {"skipped": f"less than {needed:.0f} s of the budget are left"}
    return session.attempt(case, measured)


@contextmanager
def full_masks_left_out(transformer: nn.Module) -> Iterator[None]:
    """Takes masks that are all True from attention, whose kernels would read them as a bias on every key."""
    module: Any = sys.modules[type(transformer).__module__]
    before = module.dispatch_attention_fn
    # All blocks of a call share one mask, so the device is waited for once.
    last: list[Any] = [None, False]

    def dispatch(*args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not last[0]:
            last[:] = attn_mask, attn_mask is not None and attn_mask.dtype == torch.bool and bool(attn_mask.all())
        out: Tensor = before(*args, attn_mask=None if last[1] else attn_mask, **options)
        return out

    module.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        module.dispatch_attention_fn = before


def build(model: Model, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with random weights, made on the device; tables of positions keep their own dtype."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        transformer = getattr(diffusers, model.root_class).from_config(model.config).eval()
    for parameter in transformer.parameters():
        parameter.requires_grad_(False).data = parameter.data.to(dtype)
    return transformer


def _dense_step(
    session: Session, transformer: nn.Module, method: str, step: Callable[[], None], dense: dict[str, Timing]
) -> Callable[[], Row]:
    def measured() -> Row:
        with full_masks_left_out(transformer) if "left out" in method else nullcontext():
            timing, memory = _timed_step(session, step)
        dense[method] = timing
        return timing.row() | memory

    return measured


def _sparse_step(
    session: Session,
    model: Model,
    transformer: nn.Module,
    method: str,
    step: Callable[[], None],
    dense: dict[str, Timing],
) -> Callable[[], Row]:
    def measured() -> Row:
        processor = processor_by_name(method, dense_steps=0, dense_layers=0, **model.settings.get(method, {}))
        with dit_accel.accelerate(transformer, processor) as accelerated:
            timing, memory = _timed_step(session, step)
            report = accelerated.report()
        row: Row = {"settings": repr(processor), "backend": report.backend, "density": report.density}
        row |= {"fallbacks": report.fallbacks} | timing.row() | memory
        if dense and not session.smoke:
            fastest = min(dense, key=lambda name: dense[name].p50)
            row |= {"speedup": round(dense[fastest].p50 / timing.p50, 3), "over": fastest}
        return row

    return measured


def _timed_step(session: Session, step: Callable[[], None]) -> tuple[Timing, Row]:
    cuda = session.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timing = session.time(step, seconds=8.0, least=1, most=5, warmup=1)
    return timing, {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)} if cuda else {}
