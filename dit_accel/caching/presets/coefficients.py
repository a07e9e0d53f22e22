"""Polynomials of TeaCache, as published with it (github.com/ali-vilab/TeaCache at 7c10efc), by model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .models import Published

_REPO = "github.com/ali-vilab/TeaCache: "


@dataclass(frozen=True)
class TeaCacheSettings(Published):
    """Settings of TeaCache for one model.

    Attributes:
        coefficients: of the polynomial, highest power first.
        threshold: of the published ones that for about twice the speed, or the nearest to it.
        signal: the modulated input that the polynomial was fitted to (``Family.modulated``).
        warmup: first steps that are computed.
        cooldown: last steps that are computed.
    """

    coefficients: tuple[float, ...] = ()
    threshold: float = 0.0
    signal: str = "default"
    warmup: int | float = 1
    cooldown: int | float = 1


_COG_5B = (-1.53880483e3, 8.43202495e2, -1.34363087e2, 7.97131516, -5.23162339e-2)
_LUMINA = (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)
_WAN, _COG = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
_WAN_13B = {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16}
_WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16}
_WAN_I2V = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 36}


def _wan(
    model: str, config: Mapping[str, object], hint: str, plain: tuple[float, ...], plain_threshold: float,
    projection: tuple[float, ...], projection_threshold: float,
) -> tuple[TeaCacheSettings, TeaCacheSettings]:  # fmt: skip
    """Two polynomials of a Wan model: of the time embedding, and of its projection, which wants five first steps."""
    source = _REPO + "TeaCache4Wan2.1"
    return (
        TeaCacheSettings(
            model, _WAN, config, hint, source=source, coefficients=plain, threshold=plain_threshold
        ),
        TeaCacheSettings(
            model, _WAN, config, hint, source=source + ", use_ret_steps", coefficients=projection,
            threshold=projection_threshold, signal="projection", warmup=5, cooldown=0,
        ),
    )  # fmt: skip


#: All polynomials. Models of Wan have two, told apart by their signal.
TEACACHE: tuple[TeaCacheSettings, ...] = (
    TeaCacheSettings(
        "FLUX.1", "FluxTransformer2DModel",
        {"num_layers": 19, "num_single_layers": 38, "in_channels": 64, "guidance_embeds": True},
        source=_REPO + "TeaCache4FLUX; 0.25, 0.4, 0.6, 0.8: 1.5x, 1.8x, 2.0x, 2.25x",
        coefficients=(4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1), threshold=0.6,
    ),
    TeaCacheSettings(
        "HunyuanVideo", "HunyuanVideoTransformer3DModel",
        {"num_layers": 20, "num_single_layers": 40, "image_condition_type": None},
        source=_REPO + "TeaCache4HunyuanVideo; 0.1, 0.15: 1.6x, 2.1x",
        coefficients=(7.33226126e2, -4.01131952e2, 6.75869174e1, -3.149878, 9.61237896e-2), threshold=0.15,
    ),
    TeaCacheSettings(
        "CogVideoX 2B", _COG, {"num_layers": 30, "use_rotary_positional_embeddings": False},
        source=_REPO + "eval/teacache/experiments/cogvideox.py; 0.1 slow, 0.2 fast",
        coefficients=(-3.10658903e1, 2.54732368e1, -5.92380459, 1.75769064, -3.61568434e-3), threshold=0.1,
    ),
    TeaCacheSettings(
        "CogVideoX 5B", _COG, {"num_layers": 42, "patch_size_t": None},
        source=_REPO + "eval/teacache/experiments/cogvideox.py; 0.1 slow, 0.2 fast; also for I2V",
        coefficients=_COG_5B, threshold=0.1,
    ),
    TeaCacheSettings(
        "CogVideoX 1.5 5B", _COG, {"num_layers": 42, "patch_size_t": 2, "in_channels": 16},
        source=_REPO + "TeaCache4CogVideoX1.5; 0.1, 0.2, 0.3: 1.3x, 1.8x, 2.1x",
        coefficients=(2.50210439e2, -1.65061612e2, 3.57804877e1, -7.81551492e-1, 3.58559703e-2), threshold=0.2,
    ),
    TeaCacheSettings(
        "CogVideoX 1.5 5B I2V", _COG, {"num_layers": 42, "patch_size_t": 2, "in_channels": 32},
        source=_REPO + "TeaCache4CogVideoX1.5; 0.1, 0.2, 0.3: 1.3x, 1.8x, 2.1x",
        coefficients=(1.22842302e2, -1.04088754e2, 2.62981677e1, -3.06009921e-1, 3.7121322e-2), threshold=0.2,
    ),
    TeaCacheSettings(
        "ConsisID", "ConsisIDTransformer3DModel", {"num_layers": 42},
        source=_REPO + "TeaCache4ConsisID; 0.1, 0.15, 0.2: 1.6x, 2.1x, 2.5x",
        coefficients=_COG_5B, threshold=0.15,
    ),
    TeaCacheSettings(
        "LTX-Video 0.9.1", "LTXVideoTransformer3DModel", {"num_layers": 28},
        source=_REPO + "TeaCache4LTX-Video; 0.03, 0.05: 1.6x, 2.1x",
        coefficients=(2.14700694e1, -1.28016453e1, 2.31279151, 7.92487521e-1, 9.69274326e-3), threshold=0.05,
    ),
    TeaCacheSettings(
        "Mochi 1", "MochiTransformer3DModel", {"num_layers": 48},
        source=_REPO + "TeaCache4Mochi; 0.06, 0.09: 1.5x, 2.1x",
        coefficients=(-3.51241319e3, 8.11675948e2, -6.09400215e1, 2.42429681, 3.05291719e-3), threshold=0.09,
    ),
    TeaCacheSettings(
        "HiDream I1", "HiDreamImageTransformer2DModel", {"num_layers": 16, "num_single_layers": 32},
        source=_REPO + "TeaCache4HiDream-I1; 0.17, 0.25, 0.3, 0.45: 1.5x, 1.7x, 2x, 2.6x",
        coefficients=(-3.13605009e4, -7.12425503e2, 4.91363285e1, 8.2651549, 1.08053901e-1), threshold=0.3,
        warmup=0.1, cooldown=0,
    ),
    TeaCacheSettings(
        "Lumina Next", "LuminaNextDiT2DModel", {},
        source=_REPO + "TeaCache4Lumina-T2X; 0.2, 0.3, 0.4, 0.5: 1.5x, 1.9x, 2.4x, 2.8x",
        coefficients=_LUMINA, threshold=0.3,
    ),
    TeaCacheSettings(
        "Lumina 2", "Lumina2Transformer2DModel", {"num_layers": 26},
        source=_REPO + "TeaCache4Lumina2", coefficients=_LUMINA, threshold=0.3,
    ),
    TeaCacheSettings(
        "Cosmos 1", "CosmosTransformer3DModel", {"num_layers": 28},
        source=_REPO + "TeaCache4Cosmos; 0.3, 0.4: 1.4x, 2.0x",
        coefficients=(2.71156237e2, -9.19775607e1, 2.2443725, 2.08355751, 1.4177633e-1), threshold=0.4,
    ),
    TeaCacheSettings(
        "Latte", "LatteTransformer3DModel", {"num_layers": 28},
        source=_REPO + "eval/teacache/experiments/latte.py; 0.1 slow, 0.2 fast",
        coefficients=(-2.46434137e3, 3.08044764e2, 8.07447667e1, -4.11385132, 1.11001402e-1), threshold=0.1,
    ),
    *_wan(
        "Wan 2.1 T2V 1.3B", _WAN_13B, "",
        (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1), 0.08,
        (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2), 0.05,
    ),
    *_wan(
        "Wan 2.1 T2V 14B", _WAN_14B, "wan2.1",
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 0.15,
        (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1), 0.1,
    ),
    *_wan(
        "Wan 2.1 I2V 480P", _WAN_I2V, "480p",
        (-3.0233167e2, 2.23948934e2, -5.2546397e1, 5.8734844, -2.01973289e-1), 0.19,
        (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1), 0.2,
    ),
    *_wan(
        "Wan 2.1 I2V 720P", _WAN_I2V, "720p",
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), 0.2,
        (8.1070546e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2), 0.2,
    ),
)  # fmt: skip
