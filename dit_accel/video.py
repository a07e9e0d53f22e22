"""Video files: H.264 in MP4 with the size kept, colours tagged, and the settings inside.

PyAV is used directly: imageio's plugin for it offers neither encoder options nor colour tags.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .colour import Bytes, Floats, rgb_to_yuv420, rgb_to_yuv444, yuv444_to_rgb
from .files import staged

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

BT709 = 1  # the code of BT.709 in H.264's tables of matrices, primaries and transfer curves alike
LIMITED_RANGE = 1
ENCODER = "libx264"
STRIP_HEIGHT = 24  # pixels; even, so that labelled videos keep even sizes


def write_video(
    path: str | Path,
    frames: torch.Tensor | Floats,
    fps: float,
    metadata: dict[str, Any] | None = None,
    crf: float = 17,
) -> Path:
    """Writes an MP4 (H.264) that appears whole or not at all.

    Even sizes are stored as yuv420p, which every player knows; odd sizes as yuv444p, so that no pixel is added or
    rescaled. Colours are converted and tagged as BT.709, limited range.

    Args:
        path: the file to write; replaced if it exists.
        frames: ``[F, H, W, 3]`` or ``[F, 3, H, W]``, floats in [0, 1]; values slightly outside are clipped.
        fps: frames per second.
        metadata: stored as JSON in the file's ``comment`` field.
        crf: quality of x264, 0 (lossless) to 51; 17 is visually lossless.

    Returns:
        The path written.

    Raises:
        ValueError: if the frames have another shape or kind, or hold NaN or infinity; or if ``fps`` is not positive.
        ImportError: if PyAV is not installed.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    with staged(path) as (scratch,):
        encode_video(scratch, frames, fps, metadata, crf)
    return path


def encode_video(
    path: Path, frames: torch.Tensor | Floats, fps: float, metadata: dict[str, Any] | None = None, crf: float = 17
) -> None:
    """What :func:`write_video` does, straight into ``path``: for callers that stage several files themselves."""
    pixels = _as_channels_last(frames)
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    comment = json.dumps(metadata or {}, ensure_ascii=False, allow_nan=False)
    _encode(path, pixels, fps, comment, crf)


def require_encoder() -> None:
    """Checks that videos can be written here, before minutes are spent on making one.

    Raises:
        ImportError: if PyAV is missing or comes without the x264 encoder.
    """
    import av

    try:
        av.codec.Codec(ENCODER, "w")
    except ValueError as error:  # what PyAV's UnknownCodecError is
        raise ImportError(f"this PyAV lacks the encoder {ENCODER}") from error


def read_video(path: str | Path) -> tuple[Bytes, float]:
    """Reads all frames of a video.

    Returns:
        Frames ``[F, H, W, 3]`` in 0 to 255, and frames per second.

    Raises:
        ValueError: if the file is no video.
        OSError: if it cannot be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [_to_rgb(frame) for frame in container.decode(stream)]
            return np.stack(frames), float(stream.average_rate or 0)
    except (av.error.InvalidDataError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a readable video: {error}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads back what :func:`write_video` stored.

    Raises:
        ValueError: if the file is no video, or holds no settings.
        OSError: if it cannot be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            found = json.loads(container.metadata.get("comment", ""))
    except av.error.InvalidDataError as error:
        raise ValueError(f"{path} is not a readable video: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds no settings; only videos written by dit-accel do") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a comment, but no settings; only videos written by dit-accel do")
    return found


def side_by_side(left: torch.Tensor | Floats, right: torch.Tensor | Floats, labels: tuple[str, str]) -> Floats:
    """Puts two videos next to each other under a strip that names them.

    Args:
        left: ``[F, H, W, 3]`` or ``[F, 3, H, W]`` floats in [0, 1].
        right: the same shape.
        labels: the two names; cut where they do not fit.

    Returns:
        ``[F, 24 + H, 2 W, 3]`` float32 in [0, 1].

    Raises:
        ValueError: if the shapes differ or are not those of a video.
    """
    pair = [_as_channels_last(left), _as_channels_last(right)]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"side_by_side needs videos of one shape, got {pair[0].shape} and {pair[1].shape}")
    frames, _, width, _ = pair[0].shape
    strip = np.concatenate([_label(text, width) for text in labels], axis=1)
    return np.concatenate([np.repeat(strip[None], frames, axis=0), np.concatenate(pair, axis=2)], axis=1)


def _as_channels_last(frames: torch.Tensor | Floats) -> Floats:
    """Checks a video and brings it to ``[F, H, W, 3]`` float32 in [0, 1]."""
    tensor = torch.as_tensor(frames)
    if not tensor.is_floating_point():
        raise ValueError(f"frames must be floats in [0, 1], got {tensor.dtype}; divide 8-bit frames by 255")
    array = tensor.detach().float().cpu().numpy()
    if array.ndim != 4 or array.shape[0] == 0 or 3 not in (array.shape[-1], array.shape[1]):
        raise ValueError(f"frames must be [F, H, W, 3] or [F, 3, H, W] with F >= 1, got {list(array.shape)}")
    if array.shape[-1] != 3:
        array = array.transpose(0, 2, 3, 1)
    if not np.isfinite(array).all():
        raise ValueError("frames hold NaN or infinity; a wider dtype (float32, bfloat16) usually cures it")
    clipped: Floats = array.clip(0, 1)
    return clipped


def _encode(path: Path, pixels: Floats, fps: float, comment: str, crf: float) -> None:
    import av

    _, height, width, _ = pixels.shape
    even = height % 2 == 0 and width % 2 == 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(ENCODER, rate=Fraction(fps).limit_denominator(65535))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        # x264's fast arithmetic depends on where its buffers happen to lie; one video must always give one file.
        stream.options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        _tag_colours(stream)
        for frame in _planar_frames(pixels, even):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _tag_colours(stream: VideoStream) -> None:
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE


def _planar_frames(pixels: Floats, even: bool) -> Iterator[VideoFrame]:
    import av

    for rgb in pixels:
        planes = rgb_to_yuv420(rgb) if even else rgb_to_yuv444(rgb)
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p" if even else "yuv444p")
        frame.colorspace, frame.color_range = BT709, LIMITED_RANGE
        yield frame


def _to_rgb(frame: VideoFrame) -> Bytes:
    """Decodes with our own matrix what is tagged as ours; leaves other files to FFmpeg."""
    if frame.colorspace == BT709 and frame.color_range == LIMITED_RANGE:
        return yuv444_to_rgb(frame.reformat(format="yuv444p").to_ndarray())
    rgb: Bytes = frame.to_ndarray(format="rgb24")
    return rgb


def _label(text: str, width: int) -> Floats:
    """White text on black, ``[24, width, 3]``."""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, STRIP_HEIGHT))
    ImageDraw.Draw(strip).text((6, 5), text, fill="white", font=ImageFont.load_default())
    return np.asarray(strip, dtype=np.float32) / np.float32(255)
