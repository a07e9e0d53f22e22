"""Finding a pipeline before loading it: the shipped one, a diffusers folder, or one from the hub."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EnvironmentProblem, UsageError, one_line
from .versions import installed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_accel.families import Family
    from dit_accel.shapes.info import ModelInfo

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ROOTS = ("transformer", "transformer_2", "unet")
INDEX = "model_index.json"
DAMAGED = "the folder may be incomplete or damaged: copy or download it again"


@dataclass(frozen=True)
class Model:
    """A pipeline that was found but not loaded.

    Attributes:
        name: as the user gave it.
        source: a folder, or a hub id.
        pipeline: its class.
        roots: classes of its transformers or UNet, by component.
        frame_step: frames per latent frame, if known; a video has a multiple of it plus one.
        height_step: pixels per token, if known; a frame's height is a multiple of it.
        width_step: likewise for the width.
        shapes: how it is sampled and what it was trained on, if it belongs to the shapes zoo and so speaks the shapes
            world's language only; else None.
        config: the configuration of its transformer; empty if it has none.
    """

    name: str
    source: Path | str
    pipeline: type[DiffusionPipeline]
    roots: dict[str, type]
    frame_step: int | None
    height_step: int | None
    width_step: int | None
    shapes: ModelInfo | None
    config: dict[str, Any]

    def families(self) -> list[Family]:
        """Those of its roots.

        Raises:
            UnknownModelError: if one of them is of no registered family.
        """
        from dit_accel.families import family_of

        # Only the class of a root is looked at, so an empty object will do.
        return [family_of(object.__new__(root)) for root in self.roots.values()]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that the pipeline's call takes."""
        return dict(inspect.signature(self.pipeline.__call__).parameters)


def locate(name: str, images: bool = False) -> Model:
    """Finds a model and reads its small files.

    Args:
        name: a shipped model, a folder, or a hub id.
        images: whether models of images will do.

    Raises:
        UsageError: if there is no such model, its index is damaged, or it does not turn a prompt into a video (or an
            image, if that will do).
        EnvironmentProblem: if diffusers, the shipped weights or the network are missing.
    """
    source = _source(name)
    index = _read_json(source, INDEX)
    if index is None:
        raise UsageError(f"'{name}' has no {INDEX}; give the folder that a diffusers pipeline was saved to")
    pipeline = _pipeline_class(name, index, images)
    if isinstance(source, Path):
        _check_components(source, index)
    vae, transformer = (_read_json(source, f"{part}/config.json") or {} for part in ("vae", "transformer"))
    patch = transformer.get("patch_size")
    spatial, temporal = vae.get("scale_factor_spatial"), vae.get("scale_factor_temporal")
    height_step = width_step = None
    if isinstance(spatial, int) and isinstance(patch, list) and len(patch) == 3:
        height_step, width_step = spatial * patch[1], spatial * patch[2]
    shapes = _shapes_info(source) if isinstance(source, Path) else None
    return Model(name, source, pipeline, _roots(index), temporal, height_step, width_step, shapes, transformer)


def model_files(name: str) -> list[Path]:
    """The files of a model that is a folder here; none of others. What else lies beside its index may be an output."""
    from dit_accel.shapes.info import FILE

    folder = Path(name).expanduser()
    return [folder / INDEX, folder / FILE, *folder.glob("*/*")] if (folder / INDEX).is_file() else []


def _source(name: str) -> Path | str:
    if installed("diffusers") is None:
        raise EnvironmentProblem("diffusers is not installed; pip install diffusers")
    from dit_accel import shapes

    if name in shapes.MODELS:
        try:
            return shapes.path(name)
        except FileNotFoundError as error:
            raise EnvironmentProblem(str(error)) from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        known = ", ".join(shapes.MODELS)
        raise UsageError(f"no model '{name}' here; give {known}, an existing diffusers folder, or a hub id owner/name")
    return name


def _shapes_info(folder: Path) -> ModelInfo | None:
    from dit_accel.shapes.info import FILE, read_info

    if not (folder / FILE).is_file():
        return None
    try:
        return read_info(folder)
    except ValueError as error:
        raise UsageError(f"{one_line(error)}; {DAMAGED}") from error


def _read_json(source: Path | str, file: str) -> dict[str, Any] | None:
    """Reads a small file of a model, or returns None if the model has no such file."""
    path = source / file if isinstance(source, Path) else _download(source, file)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}; {DAMAGED}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object; {DAMAGED}")
    return content


def _download(hub_id: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(hub_id, file))
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"'{hub_id}' is open to those alone who accepted its licence: do so on the model's page, then run "
            "hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"no folder '{hub_id}' here and no such model on the hub; check the name") from error
    except LocalEntryNotFoundError as error:
        raise EnvironmentProblem(
            f"no folder '{hub_id}' here, and the hub cannot be reached; check the name or the network"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise EnvironmentProblem(f"cannot get '{hub_id}' from the hub: {one_line(error)}") from error


def _pipeline_class(name: str, index: dict[str, Any], images: bool) -> type[DiffusionPipeline]:
    import diffusers

    class_name = index.get("_class_name")
    found = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UsageError(
            f"'{name}' is a {class_name!r}, which diffusers {diffusers.__version__} does not know; "
            "upgrade diffusers, or choose another model"
        )
    parameters = inspect.signature(found.__call__).parameters
    if "num_frames" not in parameters and not images:
        raise UsageError(
            f"'{name}' is a {class_name}, which makes no videos; choose a text-to-video model, or call "
            "dit_accel.accelerate(pipe, ...) in Python"
        )
    if "prompt" not in parameters or {"image", "video"} & set(parameters):
        wanted = "text-to-video or text-to-image" if images else "text-to-video"
        raise UsageError(
            f"'{name}' is a {class_name}, which needs more than a prompt; choose a {wanted} model, or call "
            "dit_accel.accelerate(pipe, ...) in Python"
        )
    return found


def _roots(index: dict[str, Any]) -> dict[str, type]:
    """The classes of the denoisers that the index lists and diffusers knows."""
    import diffusers

    entries = {part: index.get(part) for part in ROOTS}
    names = {part: str(entry[1]) for part, entry in entries.items() if isinstance(entry, list) and len(entry) == 2}
    return {part: getattr(diffusers, name) for part, name in names.items() if hasattr(diffusers, name)}


def _check_components(folder: Path, index: dict[str, Any]) -> None:
    """Every part that the index lists must be there, and diffusers must know its class."""
    import diffusers

    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        library, class_name = entry
        if library == "diffusers" and not hasattr(diffusers, str(class_name)):
            raise UsageError(
                f"{folder / INDEX} asks for {class_name} as {part}, which diffusers {diffusers.__version__} "
                "does not know; upgrade diffusers, or choose another model"
            )
        if not (folder / part).is_dir():
            raise UsageError(f"'{folder}' lacks its folder '{part}'; {DAMAGED}")


def check_multiple(name: str, value: int | None, step: int | None, offset: int = 0) -> None:
    """Refuses a size that the model would have to round, and names the nearest that fit.

    Args:
        name: of the option, for the message.
        value: what was asked for; None is fine.
        step: accepted are multiples of it, plus ``offset``; None accepts everything.
        offset: 1 for frames, because the first frame stands alone.

    Raises:
        UsageError: if the value does not fit.
    """
    if value is None or step is None or (value - offset) % step == 0:
        return
    below = math.floor((value - offset) / step) * step + offset
    choices = [str(choice) for choice in (below, below + step) if choice > 0]
    rule = f"a multiple of {step}" + (f" plus {offset}" if offset else "")
    raise UsageError(f"--{name} must be {rule} for this model, got {value}; use {' or '.join(choices)}")
