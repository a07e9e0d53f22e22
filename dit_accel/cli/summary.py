"""The record of a rendering in a few lines of text."""

from __future__ import annotations

from typing import Any


def summarise(record: dict[str, Any]) -> str:
    """Says what was made, how long it took, what it cost, and where it is."""
    size = f"{record['frames']} frames, {record['width']}x{record['height']}, {record['fps']:g} fps"
    timings = record["timings"]
    lines = [
        f"{record['model']}: {size}, {record['steps']} steps, seed {record['seed']}",
        f"sampling {timings['sampling_s']:.2f} s, decoding {timings['decode_s']:.2f} s, "
        f"loading {timings['load_s']:.2f} s",
    ]
    if record["acceleration"] is not None:
        lines.append(record["acceleration"]["summary"])
    if "comparison" in record:
        lines += _comparison(record["comparison"])
    return "\n".join([*lines, "wrote " + ", ".join(record["files"])])


def _comparison(measured: dict[str, Any]) -> list[str]:
    return [
        f"wall time of dense / accelerated: sampling {measured['sampling_ratio']:.2f}, "
        f"in all {measured['total_ratio']:.2f}",
        f"against dense, same noise: PSNR {_decibels(measured['psnr_db'])} dB, SSIM {measured['ssim']:.4f}",
        f"noise floor {measured['noise_floor']}",
    ]


def _decibels(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"
