"""Loading a pipeline that was found."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import EnvironmentProblem, UsageError, one_line
from .models import DAMAGED, Model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .settings import Settings


@dataclass(frozen=True)
class Loaded:
    """A pipeline on its device, and the seconds it took to get there."""

    pipe: DiffusionPipeline
    load_s: float


def load(model: Model, settings: Settings, debug: bool = False) -> Loaded:
    """Loads a model onto its device.

    Raises:
        UsageError: if its files are damaged or do not fit each other.
        EnvironmentProblem: if a package or memory is missing.
    """
    import torch

    start = time.perf_counter()
    dtype = getattr(torch, settings.dtype)
    # Wan's autoencoder loses visible quality in 16 bits; its pipeline converts the latents to whatever it has.
    dtypes = {"default": dtype, "vae": torch.float32} if model.pipeline.__name__.startswith("Wan") else dtype
    with _quiet_libraries(debug):
        try:
            pipe = model.pipeline.from_pretrained(str(model.source), torch_dtype=dtypes)
            _check_complete(pipe)
            pipe.to(settings.device)
        except ImportError as error:
            raise EnvironmentProblem(f"'{model.name}' needs a package that is missing: {one_line(error)}") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise EnvironmentProblem(
                f"'{model.name}' does not fit into memory: {one_line(error)}; try --dtype bfloat16, or offload in "
                "Python (pipe.enable_model_cpu_offload(), then dit_accel.accelerate(pipe, ...))"
            ) from error
        except Exception as error:
            if "sentencepiece" in str(error):  # transformers says so by a ValueError
                raise EnvironmentProblem(
                    f"the tokenizer of '{model.name}' needs packages that are missing: "
                    "pip install sentencepiece protobuf"
                ) from error
            raise UsageError(f"cannot load '{model.name}': {one_line(error)}; {DAMAGED}") from error
    return Loaded(pipe, time.perf_counter() - start)


def _check_complete(pipe: DiffusionPipeline) -> None:
    """Weights that the files lack stay on torch's meta device, without values."""
    import torch

    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        missing = [name for name, weight in module.named_parameters() if weight.is_meta]
        if missing:
            raise ValueError(f"the weights of {part} lack {len(missing)} tensors, such as {missing[0]}")


@contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Silences loading bars, and diffusers, which logs every error before raising it.

    The warnings of transformers stay: it alone tells that a text encoder's file lacks weights.
    """
    if debug:
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("diffusers")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL + 1)
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()
