"""What the installed xformers can do here, found out by asking it to do it."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

# What xformers' own checks look at beyond device, dtype and head dim: rows and keys in plain multiples.
_ROWS, _KEYS = 16, 32


@cache
def xformers_problem(
    device_type: str, dtype: torch.dtype, head_dim: int, bias: bool = False, device_index: int | None = None
) -> str | None:
    """Says what keeps xformers from running dense attention with log-sum-exp, or None.

    A tiny call decides: an extension that does not load, a GPU that is too old or too new, and a head dimension that
    no operator takes all show there, and nowhere else as surely.  Answers are kept; a call is made once per question.
    A GPU whose memory is full says nothing about xformers, so that is raised and not kept.

    Args:
        device_type: "cuda", "cpu", ...
        dtype: Of q, k and v.
        head_dim: Likewise.
        bias: Whether an additive bias per pair is needed, as partial blocks do.
        device_index: Which of the devices; None for the current one.

    Returns:
        The obstacle in xformers' words with what to do, or None.

    Raises:
        torch.OutOfMemoryError: There is no room for a tiny call.
    """
    if importlib.util.find_spec("xformers") is None:
        return "the xformers package is not installed; run: pip install xformers"
    try:
        import xformers.ops as xops
    except Exception as error:
        return f"xformers does not import ({_first_line(error)}); install a build for torch {torch.__version__}"
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    try:
        q = torch.zeros(1, _ROWS, 1, head_dim, dtype=dtype, device=device)
        k = torch.zeros(1, _KEYS, 1, head_dim, dtype=dtype, device=device)
        mask = torch.zeros(1, 1, _ROWS, _KEYS, dtype=dtype, device=device) if bias else None
        xops.memory_efficient_attention_forward_requires_grad(q, k, k, attn_bias=mask)
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        return f"xformers has no operator for it ({_reasons(error)}); use backend='gather'"
    except Exception as error:
        return f"xformers fails on a tiny call ({_first_line(error)}); use backend='gather'"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _reasons(error: NotImplementedError) -> str:
    """The reasons out of xformers' report of all operators, each once; they are indented by four spaces."""
    lines = str(error).splitlines()
    reasons = [line.strip() for line in lines if line.startswith("    ") and not line.startswith("     ")]
    return "; ".join(dict.fromkeys(reasons)) or _first_line(error)
