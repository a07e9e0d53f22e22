"""Video files: size, colours, metadata, and that nothing half-written stays."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dit_accel.colour import rgb_to_yuv420
from dit_accel.video import read_metadata, read_video, side_by_side, write_video


def flat_frames(colours: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(colours[:, None, None] / 255.0, (len(colours), height, width, 3)).astype(np.float32)


def stream_of(path: Path) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    container = av.open(str(path))
    return container, container.streams.video[0]


@pytest.mark.parametrize(
    ("height", "width", "pixel_format"),
    [(32, 48, "yuv420p"), (34, 18, "yuv420p"), (33, 47, "yuv444p"), (32, 47, "yuv444p")],
)
def test_size_and_colours_survive(tmp_path: Path, height: int, width: int, pixel_format: str) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (24, 3))
    colours[0] = (230, 30, 40)
    path = write_video(tmp_path / "out.mp4", flat_frames(colours, height, width), fps=16)
    frames, fps = read_video(path)
    assert frames.shape == (24, height, width, 3) and frames.dtype == np.uint8
    assert fps == 16
    assert np.abs(frames.astype(int) - colours[:, None, None]).max() <= 2
    container, stream = stream_of(path)
    with container:
        assert stream.codec_context.pix_fmt == pixel_format
        assert stream.codec_context.name == "h264"


def test_colour_tags_and_fast_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "out.mp4", torch.rand(3, 3, 32, 32), fps=24000 / 1001)
    container, stream = stream_of(path)
    with container:
        context = stream.codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)
        assert stream.average_rate == Fraction(24000, 1001)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_values_are_rounded_not_truncated(tmp_path: Path) -> None:
    """A grey just below a step must come back as that step; truncation would lose one."""
    levels = np.arange(20, 240, 10)
    frames = np.repeat(levels[:, None], 3, axis=1)
    path = write_video(tmp_path / "out.mp4", flat_frames(frames - 0.3, 32, 32), fps=8, crf=0)
    back, _ = read_video(path)
    error = back[:, 16, 16].astype(float) - (frames - 0.3)
    assert abs(error.mean()) < 0.3


def test_both_layouts_and_kinds_write_the_same_video(tmp_path: Path) -> None:
    video = torch.rand(4, 3, 32, 48)
    first, _ = read_video(write_video(tmp_path / "a.mp4", video, fps=8))
    second, _ = read_video(write_video(tmp_path / "b.mp4", video.permute(0, 2, 3, 1).numpy(), fps=8))
    assert np.array_equal(first, second)


def test_one_video_always_gives_one_file(tmp_path: Path) -> None:
    """x264 by default differs from run to run where its buffers lie differently; small noisy frames show it."""
    generator = torch.Generator().manual_seed(0)
    sizes = np.random.default_rng(0).integers(1, 5_000_000, 15)
    for _ in range(10):
        coarse = torch.rand(9, 3, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1)
        video = 0.425 + 0.15 * smooth + 0.02 * torch.randn(smooth.shape, generator=generator)
        files = set()
        for size in sizes:
            bytes(size)  # moves what is allocated next
            files.add(write_video(tmp_path / "out.mp4", video, fps=16).read_bytes())
        assert len(files) == 1


def test_metadata_comes_back(tmp_path: Path) -> None:
    settings = {"prompt": 'a "red" círcle; \\ = #\n' + "x" * 70_000, "seed": 2**63 - 1, "nested": {"steps": [1, 2]}}
    path = write_video(tmp_path / "out.mp4", torch.rand(2, 3, 32, 32), 8, settings)
    assert read_metadata(path) == settings


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.rand(2, 4, 32, 32), r"\[2, 4, 32, 32\]"),
        (torch.rand(0, 3, 32, 32), "F >= 1"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "divide"),
        (np.zeros((2, 32, 32, 3), dtype=np.uint8), "divide"),
        (torch.full((2, 3, 32, 32), float("nan")), "NaN"),
    ],
)
def test_bad_frames_are_refused_before_anything_is_written(tmp_path: Path, frames: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "out.mp4", frames, fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    old = tmp_path / "out.mp4"
    old.write_bytes(b"old")
    calls = []

    def fail_late(rgb: np.ndarray) -> np.ndarray:
        calls.append(list(tmp_path.iterdir()))
        if len(calls) == 60:
            raise error("half way")
        return rgb_to_yuv420(rgb)

    monkeypatch.setattr("dit_accel.video.rgb_to_yuv420", fail_late)
    with pytest.raises(error):
        write_video(old, torch.rand(64, 3, 32, 32), fps=8)
    assert len(calls[-1]) == 2, "the scratch file was there while writing"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("reader", [read_video, read_metadata])
def test_reading_something_else_is_a_clear_error(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="not a readable video"):
        reader(tmp_path / "text.mp4")


def test_a_video_without_settings_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "foreign.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="holds no settings"):
        read_metadata(path)
    assert read_video(path)[0].shape == (1, 32, 32, 3)


def test_side_by_side_keeps_both_and_draws_the_labels() -> None:
    left, right = torch.rand(2, 3, 32, 64), torch.rand(2, 3, 32, 64)
    joined = side_by_side(left, right, ("dense", "radial"))
    assert joined.shape == (2, 56, 128, 3)
    assert np.array_equal(joined[:, 24:, :64], left.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(joined[:, 24:, 64:], right.permute(0, 2, 3, 1).numpy())
    strips = joined[0, :24, :64], joined[0, :24, 64:]
    assert all(strip.max() > 0.8 and strip.mean() < 0.3 for strip in strips)
    assert not np.array_equal(*strips)


def test_side_by_side_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        side_by_side(torch.rand(2, 3, 32, 32), torch.rand(3, 3, 32, 32), ("a", "b"))
