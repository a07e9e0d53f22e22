"""What computes is named so exactly that results of two machines are never mixed."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from dit_accel import machine
from dit_accel.journal import Journal
from dit_accel.machine import device_name

CPUINFO = "processor\t: 0\nmodel\t\t: 85\nmodel name\t: {name}\nmodel name\t: of the next core\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of what Linux says; it is not there yet."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPUINFO", file)
    return file


def test_results_of_another_processor_are_never_mixed_in(cpuinfo: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    cpuinfo.write_text(CPUINFO.format(name="Intel(R) Xeon(R) Processor @ 2.60GHz"))
    assert device_name("cpu") == f"Intel(R) Xeon(R) Processor @ 2.60GHz, {torch.get_num_threads()} threads"
    Journal(file, {"machine": device_name("cpu")}).add(0, {"seconds": 1})
    cpuinfo.write_text(CPUINFO.format(name="AMD EPYC 9B14"))
    with pytest.raises(ValueError, match=r"machine was 'Intel\(R\) .* threads', is 'AMD EPYC 9B14, \d+ threads'"):
        Journal(file, {"machine": device_name("cpu")})


@pytest.mark.parametrize("text", [None, "processor\t: 0\nBogoMIPS\t: 50.00\n", "model name\t: \nflags\t: fpu\n"])
@pytest.mark.parametrize(("known", "name"), [("Apple M3", "Apple M3"), ("", "arm64")])
def test_where_linux_does_not_tell_python_may(
    text: str | None, known: str, name: str, cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        cpuinfo.write_text(text)
    monkeypatch.setattr(platform, "processor", lambda: known)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert device_name("cpu") == f"{name}, {torch.get_num_threads()} threads"


def test_a_gpu_of_apple_is_no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert device_name("mps") == "arm64 GPU (mps)"
