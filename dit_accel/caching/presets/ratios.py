"""Ratios of MagCache, as published with it (github.com/Zehong-Ma/MagCache at df81cb1), by model.

Where both branches of guidance were measured, these are of the conditional one; the other's differ by less than 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass

from .models import Published

_REPO = "github.com/Zehong-Ma/MagCache: "
_WAN = "WanTransformer3DModel"
_FLUX = {"num_layers": 19, "num_single_layers": 38, "in_channels": 64, "guidance_embeds": True}
_HUNYUAN = {"num_layers": 20, "num_single_layers": 40, "image_condition_type": None}
_QWEN = {"num_layers": 60}
_WAN_13B = {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16}
_WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16}
_WAN_I2V = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 36}
_WAN_5B = {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48}


@dataclass(frozen=True)
class MagCacheSettings(Published):
    """Settings of MagCache for one model.

    Attributes:
        ratios: size of the residual over that at the step before; one for each step of the calibration, the first 1.
        threshold: on the summed error of size.
        max_skips: steps in a row that may be skipped.
        retention: share of first steps that are computed.
        always: indices into the ratios whose steps are computed in any case.
    """

    ratios: tuple[float, ...] = ()
    threshold: float = 0.0
    max_skips: int = 0
    retention: float = 0.2
    always: tuple[int, ...] = ()


#: All published ratios.
MAGCACHE: tuple[MagCacheSettings, ...] = (
    MagCacheSettings(
        "FLUX.1", "FluxTransformer2DModel", _FLUX,
        source=_REPO + "MagCache4FLUX",
        threshold=0.24, max_skips=5, retention=0.1, always=(11,),
        ratios=(
            1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047,
            1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484,
            0.95703, 0.93359, 0.89062,
        ),
    ),
    MagCacheSettings(
        "FLUX.1 Kontext", "FluxTransformer2DModel", _FLUX,
        hint="kontext", source=_REPO + "MagCache4FLUX_Kontext",
        threshold=0.05, max_skips=4, retention=0.2, always=(11,),
        ratios=(
            1.0, 1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0, 1.01562, 1.0, 1.00781,
            1.0, 1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219, 0.98438, 0.99609, 0.96484, 0.96094,
            0.9375, 0.93359,
        ),
    ),
    MagCacheSettings(
        "HunyuanVideo 720p", "HunyuanVideoTransformer3DModel", _HUNYUAN,
        source=_REPO + "MagCache4HunyuanVideo",
        threshold=0.24, max_skips=6, retention=0.2,
        ratios=(
            1.0, 1.0754, 1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142, 1.03101, 1.00679,
            1.02556, 1.00908, 1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779, 1.03381, 1.01886, 1.01161,
            1.02968, 1.00544, 1.02822, 1.00689, 1.02119, 1.0105, 1.01044, 1.01572, 1.02972, 1.0094, 1.02368, 1.0226,
            0.98965, 1.01588, 1.02146, 1.0018, 1.01687, 0.99436, 1.00283, 1.01139, 0.97122, 0.98251, 0.94513,
            0.97656, 0.90943, 0.85703, 0.75456,
        ),
    ),
    MagCacheSettings(
        "HunyuanVideo 544p", "HunyuanVideoTransformer3DModel", _HUNYUAN,
        only_named=True, source=_REPO + "MagCache4HunyuanVideo",
        threshold=0.24, max_skips=6, retention=0.2,
        ratios=(
            1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632, 1.02974, 1.00984,
            1.03028, 1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726, 1.03727, 1.01502, 1.00992,
            1.03371, 0.9976, 1.02742, 1.0093, 1.01869, 1.00815, 1.01461, 1.01152, 1.03082, 1.0061, 1.02162, 1.01999,
            0.99063, 1.01186, 1.0217, 0.99947, 1.01711, 0.9904, 1.00258, 1.00878, 0.97039, 0.97686, 0.94315, 0.97728,
            0.91154, 0.86139, 0.76592,
        ),
    ),
    MagCacheSettings(
        "Qwen-Image", "QwenImageTransformer2DModel", _QWEN,
        source=_REPO + "MagCache4QwenImage",
        threshold=0.06, max_skips=2, retention=0.2,
        ratios=(
            1.0, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281, 1.11719, 1.07812,
            1.07031, 1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812, 1.07031, 1.03125, 1.07812, 1.04688,
            1.04688, 1.04688, 1.03906, 1.01562, 1.03125, 1.02344, 1.02344, 1.02344, 1.03906, 1.0, 1.01562, 1.0,
            0.99219, 1.00781, 0.98047, 0.95703, 0.96875, 0.99219, 0.92578, 0.92578, 0.90625, 0.85938, 0.80469,
            0.87891, 0.75, 0.60938, 0.55078,
        ),
    ),
    MagCacheSettings(
        "Qwen-Image-Edit", "QwenImageTransformer2DModel", _QWEN,
        hint="edit", source=_REPO + "MagCache4QwenImageEdit",
        threshold=0.06, max_skips=2, retention=0.2,
        ratios=(
            1.0, 1.41406, 1.09375, 1.3125, 1.20312, 1.0625, 1.125, 1.14062, 1.17969, 1.09375, 1.10938, 1.10938,
            1.07031, 1.04688, 1.09375, 1.03906, 1.0625, 1.04688, 1.0625, 1.04688, 1.07031, 1.03125, 1.03906, 1.03906,
            1.02344, 1.01562, 1.03125, 1.00781, 1.01562, 1.00781, 1.01562, 1.0, 1.0, 0.98828, 0.98047, 0.98047,
            0.97266, 0.92578, 0.94922, 0.98438, 0.89844, 0.91797, 0.92188, 0.84375, 0.82812, 0.78516, 0.87891,
            0.71094, 0.56641, 0.50781,
        ),
    ),
    MagCacheSettings(
        "Wan 2.1 T2V 1.3B", _WAN, _WAN_13B,
        source=_REPO + "MagCache4Wan2.1",
        threshold=0.12, max_skips=4, retention=0.2,
        ratios=(
            1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535,
            0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388,
            0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758,
            0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013,
            0.92402, 0.90241, 0.86821, 0.81838,
        ),
    ),
    MagCacheSettings(
        "Wan 2.1 T2V 14B", _WAN, _WAN_14B,
        hint="wan2.1", source=_REPO + "MagCache4Wan2.1",
        threshold=0.24, max_skips=6, retention=0.2,
        ratios=(
            1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468,
            0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313,
            0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573,
            0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926,
            0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
        ),
    ),
    MagCacheSettings(
        "Wan 2.1 I2V 480P", _WAN, _WAN_I2V,
        hint="480p", source=_REPO + "MagCache4Wan2.1",
        threshold=0.24, max_skips=6, retention=0.2,
        ratios=(
            1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065,
            0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157,
            0.98411, 0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961,
            0.93973, 0.93217, 0.91878, 0.90955, 0.92617,
        ),
    ),
    MagCacheSettings(
        "Wan 2.1 I2V 720P", _WAN, _WAN_I2V,
        hint="720p", source=_REPO + "MagCache4Wan2.1",
        threshold=0.24, max_skips=6, retention=0.2,
        ratios=(
            1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215,
            0.99515, 0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848,
            0.98862, 0.98718, 0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335,
            0.94649, 0.93397, 0.91636, 0.89088, 0.8679,
        ),
    ),
    MagCacheSettings(
        "Wan 2.2 T2V A14B", _WAN, _WAN_14B,
        hint="wan2.2", source=_REPO + "MagCache4Wan2.2",
        threshold=0.06, max_skips=2, retention=0.4,
        ratios=(
            1.0, 1.00124, 0.99822, 0.99696, 0.99703, 0.9966, 0.99602, 0.99578, 0.99484, 0.99633, 0.99659, 0.99534,
            0.99584, 0.99681, 0.99563, 0.9944, 0.99594, 0.99466, 0.99453, 0.99389, 0.99391, 0.99354, 0.99283,
            0.99268, 0.99057, 0.99125, 0.65523, 0.98808, 0.98765, 0.9851, 0.98311, 0.9805, 0.97776, 0.97278, 0.96731,
            0.95857, 0.94385, 0.92118, 0.88108, 0.80263,
        ),
    ),
    MagCacheSettings(
        "Wan 2.2 I2V A14B", _WAN, _WAN_I2V,
        hint="wan2.2", source=_REPO + "MagCache4Wan2.2",
        threshold=0.06, max_skips=2, retention=0.1,
        ratios=(
            1.0, 0.99191, 0.99356, 0.99326, 0.99251, 0.99393, 0.9943, 0.99276, 0.99389, 0.99274, 0.99316, 0.99379,
            0.99268, 0.99222, 0.99175, 0.91076, 0.98931, 0.99087, 0.98852, 0.98895, 0.98806, 0.9871, 0.98613,
            0.98434, 0.983, 0.98185, 0.98131, 0.9783, 0.97619, 0.97264, 0.97088, 0.96568, 0.96045, 0.95322, 0.94579,
            0.93297, 0.91699, 0.89174, 0.8541, 0.79823,
        ),
    ),
    MagCacheSettings(
        "Wan 2.2 TI2V 5B", _WAN, _WAN_5B,
        source=_REPO + "MagCache4Wan2.2, from text",
        threshold=0.06, max_skips=2, retention=0.2,
        ratios=(
            1.0, 0.99505, 0.99441, 0.99558, 0.99499, 0.99534, 0.99468, 0.99463, 0.9946, 0.99408, 0.9945, 0.99409,
            0.99403, 0.99382, 0.99349, 0.99377, 0.9933, 0.99303, 0.99217, 0.992, 0.99201, 0.99133, 0.99112, 0.99155,
            0.98958, 0.98959, 0.98838, 0.98826, 0.9883, 0.98711, 0.98562, 0.98511, 0.98414, 0.98284, 0.98104,
            0.97981, 0.97849, 0.97557, 0.97398, 0.97171, 0.96917, 0.96511, 0.96263, 0.95839, 0.95483, 0.94942,
            0.9468, 0.94583, 0.94843, 0.96949,
        ),
    ),
    MagCacheSettings(
        "Wan 2.2 TI2V 5B from image", _WAN, _WAN_5B,
        only_named=True, source=_REPO + "MagCache4Wan2.2, from an image",
        threshold=0.06, max_skips=2, retention=0.2,
        ratios=(
            1.0, 0.99512, 0.99559, 0.99595, 0.99512, 0.99546, 0.99543, 0.99496, 0.99504, 0.99444, 0.99481, 0.99435,
            0.9943, 0.99411, 0.99373, 0.99413, 0.99363, 0.99335, 0.99244, 0.99229, 0.99239, 0.99163, 0.99149,
            0.99191, 0.9898, 0.9899, 0.98849, 0.98846, 0.98861, 0.9874, 0.98588, 0.98539, 0.98444, 0.9831, 0.98119,
            0.98001, 0.97862, 0.97555, 0.97392, 0.97152, 0.96871, 0.96435, 0.96129, 0.95639, 0.95176, 0.94446,
            0.93972, 0.93575, 0.93537, 0.96655,
        ),
    ),
)  # fmt: skip
