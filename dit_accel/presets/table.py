"""The settings that papers, or the authors' own scripts, publish for a method on a model.

Dense steps are fractions of the published number of steps, so that other numbers of steps keep the share; models
distilled to few steps have whole numbers. A setting that was not published is left out, and stays at the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..processors import VMOBA_PRESETS

WAN, HUNYUAN, COSMOS = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CosmosTransformer3DModel"
WAN_14B = {"num_layers": 40, "num_attention_heads": 40}
WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12}
HUNYUAN_13B = {"num_layers": 20, "num_single_layers": 40}
COSMOS_7B = {"num_layers": 28, "num_attention_heads": 32}
COSMOS_14B = {"num_layers": 36, "num_attention_heads": 40}


@dataclass(frozen=True)
class Preset:
    """Settings of one method for one model.

    Attributes:
        method: name of the method.
        name: of the preset, unique within the method.
        root_class: name of the transformer's or UNet's class.
        settings: what was published, by the names of the method's constructor.
        source: where, and for which size and number of steps.
        config: entries of the model's configuration that tell it from others of its class.
        experts: number of transformers in the pipeline.
        by_name: whether it is used only if asked for by name, because a model does not show that it fits: it was
            distilled to few steps, or is to make pictures of one size.
        grid: frames, rows and columns of tokens that it was published for; where these are known, it is used for as
            many and more without being named.
    """

    method: str
    name: str
    root_class: str
    settings: Mapping[str, Any]
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 1
    by_name: bool = False
    grid: tuple[int, int, int] | None = None


_RADIAL = "Radial Attention, arXiv 2506.19852, the authors' script"
_SOL = (
    "Sol-Attn, arXiv 2607.24027: the threshold and the warm-up that its public integrations start from, not tuned for "
    "this model"
)
_GNA = "Generalized Neighborhood Attention, arXiv 2504.16922"

RADIAL = (
    Preset(
        "radial",
        "wan2.1-14b",
        WAN,
        {"rule": "authors", "block": 128, "decay": 0.2, "sink": True, "dense_steps": 12 / 50, "dense_layers": 1},
        f"{_RADIAL}: text to video, 69 frames of 768x1280, 12 of 50 steps dense",
        WAN_14B,
    ),
    Preset(
        "radial",
        "wan2.2-a14b",
        WAN,
        {"rule": "authors", "block": 128, "decay": 0.8, "sink": True, "dense_steps": 11 / 40, "dense_layers": 1},
        f"{_RADIAL}: text to video, 77 frames of 768x1280, 11 of 40 steps dense",
        WAN_14B,
        experts=2,
    ),
    Preset(
        "radial",
        "hunyuanvideo",
        HUNYUAN,
        {"rule": "authors", "block": 128, "decay": 0.95, "sink": False, "dense_steps": 12 / 50, "dense_layers": 0},
        f"{_RADIAL}: text to video, 117 frames of 768x1280, 12 of 50 steps dense",
        HUNYUAN_13B,
    ),
    Preset(
        "radial",
        "wan2.1-14b-4-steps",
        WAN,
        {"rule": "authors", "block": 128, "decay": 0.2, "sink": True, "dense_steps": 1, "dense_layers": 1},
        f"{_RADIAL}: LightX2V's LoRA of 4 steps, 69 frames of 768x1280, the first step dense",
        WAN_14B,
        by_name=True,
    ),
    Preset(
        "radial",
        "wan2.1-14b-8-steps",
        WAN,
        {"rule": "authors", "block": 128, "decay": 0.2, "sink": True, "dense_steps": 2, "dense_layers": 1},
        f"{_RADIAL}: the FusionX LoRA of 8 steps, 69 frames of 768x1280, the first 2 steps dense",
        WAN_14B,
        by_name=True,
    ),
    Preset(
        "radial",
        "wan2.1-14b-2x-length",
        WAN,
        {"rule": "authors", "block": 128, "decay": 1.0, "sink": True, "dense_steps": 2, "dense_layers": 2},
        f"{_RADIAL}: 161 frames of 720x1280 with the authors' LoRA for that length, the first 2 steps dense",
        WAN_14B,
        by_name=True,
    ),
    Preset(
        "radial",
        "hunyuanvideo-4x-length",
        HUNYUAN,
        {"rule": "authors", "block": 128, "decay": 1.0, "sink": False, "dense_steps": 2, "dense_layers": 2},
        f"{_RADIAL}: 509 frames of 720x1280 with the authors' LoRA for that length, the first 2 steps dense",
        HUNYUAN_13B,
        by_name=True,
    ),
)

_ADASPA_SETTINGS = {
    "density": 0.2,
    "levels": True,
    "block": 64,
    "search_again": (30 / 50,),
    "dense_steps": 10 / 50,
    "dense_layers": 0,
}
_ADASPA = "AdaSpa, arXiv 2502.21079: sparsity 0.8, searches at steps 10 and 30 of 50"

ADASPA = (
    Preset(
        "adaspa",
        "hunyuanvideo",
        HUNYUAN,
        _ADASPA_SETTINGS,
        f"{_ADASPA}, 129 frames of 720p",
        HUNYUAN_13B,
    ),
    Preset(
        "adaspa",
        "cogvideox1.5-5b",
        "CogVideoXTransformer3DModel",
        _ADASPA_SETTINGS,
        f"{_ADASPA}, 161 frames of 720p",
        {"num_layers": 42, "patch_size_t": 2},
    ),
)

_VMOBA = "VMoBA, arXiv 2506.23858, FastVideo's configuration"

VMOBA = (
    Preset(
        "vmoba",
        "wan2.1-1.3b",
        WAN,
        VMOBA_PRESETS["wan-1.3b-480x832"] | {"dense_steps": 12 / 50},
        f"{_VMOBA}: 77 frames of 480x832, 12 of 50 steps dense",
        WAN_1_3B,
    ),
    Preset(
        "vmoba",
        "wan2.1-1.3b-448x832",
        WAN,
        VMOBA_PRESETS["wan-1.3b-448x832"] | {"dense_steps": 12 / 50},
        f"{_VMOBA}: 448x832, which publishes no numbers of cells, so the paper's threshold of 0.25",
        WAN_1_3B,
        by_name=True,
    ),
)

NEIGHBORHOOD = (
    Preset(
        "neighborhood",
        "hunyuanvideo",
        HUNYUAN,
        {"window": (18 / 30, 24 / 48, 24 / 80), "stride": "tile", "dense_steps": 15 / 50, "dense_layers": 0},
        f"{_GNA}: 18x24x24 of 30x48x80 tokens, 15 of 50 steps dense; here as parts of any grid, with the stride of a "
        "tile",
        HUNYUAN_13B,
    ),
    Preset(
        "neighborhood",
        "hunyuanvideo-117f-768x1280",
        HUNYUAN,
        {"window": (18, 24, 24), "stride": (16, 8, 8), "dense_steps": 15 / 50, "dense_layers": 0},
        f"{_GNA}: a grid of 30x48x80 tokens, 91 % of the pairs left out, 15 of 50 steps dense",
        HUNYUAN_13B,
        by_name=True,
        grid=(30, 48, 80),
    ),
    Preset(
        "neighborhood",
        "cosmos-7b",
        COSMOS,
        {"window": (16 / 16, 32 / 44, 48 / 80), "stride": "tile", "dense_steps": 12 / 35, "dense_layers": 0},
        f"{_GNA}: 16x32x48 of 16x44x80 tokens, 12 of 35 steps dense; here as parts of any grid, with the stride of a "
        "tile",
        COSMOS_7B,
    ),
    Preset(
        "neighborhood",
        "cosmos-7b-121f-704x1280",
        COSMOS,
        {"window": (16, 32, 48), "stride": (1, 8, 16), "dense_steps": 12 / 35, "dense_layers": 0},
        f"{_GNA}: a grid of 16x44x80 tokens, 56 % of the pairs left out, 12 of 35 steps dense",
        COSMOS_7B,
        by_name=True,
        grid=(16, 44, 80),
    ),
    Preset(
        "neighborhood",
        "flux.1-dev-4k",
        "FluxTransformer2DModel",
        {"window": (80, 80), "stride": (16, 16), "dense_steps": 9 / 28, "dense_layers": 0},
        f"{_GNA}: a grid of 256x256 tokens, 90 % of the pairs left out, 9 of 28 steps dense",
        {"num_layers": 19, "num_single_layers": 38},
        by_name=True,
        grid=(1, 256, 256),
    ),
)

_SOL_SETTINGS = {"tau": 1.0, "variance": "diag", "block": 64, "dense_steps": 10 / 50, "dense_layers": 1}

COMPENSATED = (
    Preset("compensated", "wan2.1-14b", WAN, _SOL_SETTINGS, _SOL, WAN_14B),
    Preset("compensated", "hunyuanvideo", HUNYUAN, _SOL_SETTINGS, _SOL, HUNYUAN_13B),
)

_AGENT_SETTINGS = {
    "mode": "merge",
    "cell": (4, 2),
    "merge": 0.4,
    "agent_ratio": (0.95, 0.5),
    "switch": 20 / 50,
    "max_downsample": 1,
    "second_scale_power": 0.3,
    "shortcut": 0.075,
    "dense_steps": 0,
    "dense_layers": 0,
}
_AGENT = "AgentSD, arXiv 2312.08874, the authors' script: 512x512, 50 steps, of which the first 20 have few agents"

AGENT = (
    Preset(
        "agent",
        "stable-diffusion-1.5",
        "UNet2DConditionModel",
        _AGENT_SETTINGS,
        _AGENT,
        {"cross_attention_dim": 768},
    ),
    Preset(
        "agent",
        "stable-diffusion-2",
        "UNet2DConditionModel",
        _AGENT_SETTINGS,
        _AGENT,
        {"cross_attention_dim": 1024},
    ),
)

_SVG_SETTINGS = {"pattern": "spatial_temporal", "probe_rows": 64, "search_every": 1, "dense_layers": 1}
_SVG = "Sparse VideoGen, arXiv 2502.01776, the authors' script"

GRID = (
    Preset(
        "grid",
        "wan2.1-t2v-14b",
        WAN,
        _SVG_SETTINGS | {"density": 0.3, "first_frame": True, "dense_steps": 10 / 50},
        f"{_SVG}: 720x1280, the first 20 % of 50 steps and 1 layer (3 %, rounded down) dense",
        WAN_14B | {"in_channels": 16},
    ),
    Preset(
        "grid",
        "wan2.1-i2v-14b",
        WAN,
        _SVG_SETTINGS | {"density": 0.3, "first_frame": True, "dense_steps": 14 / 40},
        f"{_SVG}: 720x1280, the first 35 % of 40 steps and 1 layer (3 %, rounded down) dense",
        WAN_14B | {"in_channels": 36},
    ),
    Preset(
        "grid",
        "hunyuanvideo",
        HUNYUAN,
        _SVG_SETTINGS | {"density": 0.25, "first_frame": False, "dense_steps": 5 / 50},
        f"{_SVG}: 720x1280, the first 10 % of 50 steps and 1 layer (3 %, rounded down) dense",
        HUNYUAN_13B,
    ),
    Preset(
        "grid",
        "cosmos-14b",
        COSMOS,
        _SVG_SETTINGS | {"density": 0.25, "dense_steps": 10 / 35},
        f"{_SVG}: 704x1280, the first 10 of 35 steps and 1 layer (3 %, rounded down) dense",
        COSMOS_14B,
    ),
)

_SVG2_SETTINGS = {
    "top_p": 0.9,
    "min_kc_ratio": 0.1,
    "q_clusters": 400,
    "k_clusters": 1000,
    "first_iterations": 50,
    "iterations": 2,
    "search_every": 1,
    "dense_layers": 1,
}
_SVG2 = "Sparse VideoGen 2, arXiv 2505.18875, the authors' script"

CLUSTER = (
    Preset(
        "cluster",
        "wan2.1-t2v-14b",
        WAN,
        _SVG2_SETTINGS | {"q_clusters": 300, "dense_steps": 10 / 50},
        f"{_SVG2}: 720x1280, the first 20 % of 50 steps and 1 layer (3 %, rounded down) dense",
        WAN_14B | {"in_channels": 16},
    ),
    Preset(
        "cluster",
        "wan2.1-i2v-14b",
        WAN,
        _SVG2_SETTINGS | {"q_clusters": 300, "dense_steps": 14 / 40},
        f"{_SVG2}: 720x1280, the first 35 % of 40 steps and 1 layer (3 %, rounded down) dense",
        WAN_14B | {"in_channels": 36},
    ),
    Preset(
        "cluster",
        "hunyuanvideo",
        HUNYUAN,
        _SVG2_SETTINGS | {"dense_steps": 5 / 50},
        f"{_SVG2}: 720x1280, the first 10 % of 50 steps and 1 layer (3 %, rounded down) dense",
        HUNYUAN_13B,
    ),
    Preset(
        "cluster",
        "cosmos-14b",
        COSMOS,
        _SVG2_SETTINGS | {"dense_steps": 10 / 35},
        f"{_SVG2}: 704x1280, the first 10 of 35 steps and 1 layer (3 %, rounded down) dense",
        COSMOS_14B,
    ),
)

PRESETS: tuple[Preset, ...] = (*RADIAL, *ADASPA, *VMOBA, *NEIGHBORHOOD, *COMPENSATED, *AGENT, *GRID, *CLUSTER)

REPLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "all": {"schedule": ("dense_steps", "dense_layers")},
    "adaspa": {"recall": ("density",), "density": ("recall",)},
    "agent": {"mode": ("dense_steps", "shortcut")},
    "grid": {"pattern": ("first_frame",)},
    "cluster": {"density": ("top_p", "min_kc_ratio"), "top_p": ("density",), "min_kc_ratio": ("density",)},
    "compensated": {"density": ("tau", "variance"), "tau": ("density",), "variance": ("density",)},
    "learned_gate": {"density": ("threshold",), "threshold": ("density",)},
    "neighborhood": {"window": ("stride",)},
    "vmoba": {"select": ("amount", "scope")},
}
"""By method: settings of a preset or a model that are left out where the user gives another in their place."""
