"""Conversion between RGB and BT.709 YCbCr with limited range, in float and rounded once.

Written out here because the default of most video tools is the older BT.601 matrix with truncation, which shifts
colours by up to 15 of 255. Coefficients: Recommendation ITU-R BT.709-6, items 3.2 to 3.5.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_RED, _GREEN, _BLUE = 0.2126, 0.7152, 0.0722
_RGB_TO_YUV = np.array(
    [
        [_RED, _GREEN, _BLUE],
        [-_RED / (2 - 2 * _BLUE), -_GREEN / (2 - 2 * _BLUE), 0.5],
        [0.5, -_GREEN / (2 - 2 * _RED), -_BLUE / (2 - 2 * _RED)],
    ],
    dtype=np.float64,
)
_YUV_TO_RGB = np.linalg.inv(_RGB_TO_YUV)
_SCALE = np.array([219.0, 224.0, 224.0])
_OFFSET = np.array([16.0, 128.0, 128.0])


def rgb_to_yuv444(rgb: Floats) -> Bytes:
    """Converts one frame to full-resolution planes.

    Args:
        rgb: ``[height, width, 3]`` in [0, 1].

    Returns:
        ``[3, height, width]`` planes Y (16 to 235), Cb and Cr (16 to 240).
    """
    return _quantise(_to_yuv(rgb)).transpose(2, 0, 1)


def rgb_to_yuv420(rgb: Floats) -> Bytes:
    """Converts one frame to planes with halved colour resolution, packed as PyAV expects ``yuv420p``.

    Args:
        rgb: ``[height, width, 3]`` in [0, 1], height and width even.

    Returns:
        ``[height * 3 / 2, width]``: the Y plane, then the Cb and the Cr plane row after row.
    """
    height, width = rgb.shape[:2]
    yuv = _to_yuv(rgb)
    chroma = yuv[..., 1:].reshape(height // 2, 2, width // 2, 2, 2).mean(axis=(1, 3))
    luma = _quantise(yuv[..., :1])[..., 0]
    planes = _quantise(chroma).transpose(2, 0, 1).reshape(height // 2, width)
    return np.concatenate([luma, planes])


def yuv444_to_rgb(yuv: Bytes) -> Bytes:
    """Inverse of :func:`rgb_to_yuv444`: planes ``[3, height, width]`` to ``[height, width, 3]`` in 0 to 255."""
    normalised = (yuv.transpose(1, 2, 0) - _OFFSET) / _SCALE
    rgb = normalised @ _YUV_TO_RGB.T
    return _quantise(rgb * 255)


def _to_yuv(rgb: Floats) -> npt.NDArray[np.float64]:
    yuv: npt.NDArray[np.float64] = (rgb @ _RGB_TO_YUV.T) * _SCALE + _OFFSET
    return yuv


def _quantise(values: npt.NDArray[np.float64]) -> Bytes:
    rounded: Bytes = np.rint(values).clip(0, 255).astype(np.uint8)
    return rounded
