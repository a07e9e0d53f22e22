"""What computes here, in words, for records of what was measured."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")  # of Linux


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's model and how many threads torch uses."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == "mps":
        return f"{platform.machine()} GPU (mps)"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The model, so that results of two processors of one architecture are told apart; else what Python knows."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()
