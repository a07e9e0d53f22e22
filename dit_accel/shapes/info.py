"""What a shapes pipeline was trained on and how it is sampled: ``shapes.json``, beside its ``model_index.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "shapes.json"
TRAINED_ON = ("basic", "all")


@dataclass(frozen=True)
class ModelInfo:
    """The content of ``shapes.json``.

    Attributes:
        subset: the sentences it was trained on: ``"basic"`` (one medium plain object moving straight on a plain
            background) or ``"all"``.
        motion: whether it makes clips, whose sentences say a motion, or images.
        frames: of a clip; 1 for images.
        height: in pixels.
        width: in pixels.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        fps: frames per second of a clip; None for images.
        attention: settings of sparse attention that suit its small token grid, by the names of
            :class:`.RadialAttnProcessor`.

    Raises:
        ValueError: if the subset is unknown, or images are to have several frames.
    """

    subset: str
    motion: bool
    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    fps: float | None = None
    attention: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.subset not in TRAINED_ON:
            raise ValueError(f"unknown subset {self.subset!r}; choose one of {', '.join(TRAINED_ON)}")
        if not self.motion and self.frames != 1:
            raise ValueError(f"a model of images has 1 frame, not {self.frames}")

    def check_prompt(self, prompt: str) -> None:
        """Refuses a sentence that the model was not trained on, which would show nothing of use.

        Raises:
            ValueError: if the sentence is none of the shapes world's, or none of this model's.
        """
        from .world import parse_prompt
        from .world.split import is_basic

        words = parse_prompt(prompt)
        says_motion = words.objects[0].motion is not None
        if self.motion != says_motion:
            wanted = 'how each object moves, such as "moving left"' if self.motion else "nothing about motion"
            raise ValueError(f"this model makes {'clips' if self.motion else 'images'}: say {wanted}; got {prompt!r}")
        if self.subset == "basic" and not is_basic(words):
            raise ValueError(
                "this model knows one object without size and texture that moves left, right, up or down on a plain"
                f' background, such as "a red circle moving left on a black background"; got {prompt!r}'
            )

    def words(self) -> tuple[str, ...]:
        """The words it was trained on, in the grammar's order."""
        from .world import grammar_words, held_out
        from .world.split import BASIC_HELD_OUT

        if self.subset == "all":
            return grammar_words()
        sentences = held_out("basic", BASIC_HELD_OUT, motion=True)  # every word is in some of them
        known = {word for words in sentences for word in words.prompt.split()}
        return tuple(word for word in grammar_words() if word in known)


def read_info(folder: Path) -> ModelInfo:
    """Reads the ``shapes.json`` of a pipeline folder.

    Raises:
        FileNotFoundError: if it holds none.
        ValueError: if the file is damaged, or says what no model can be.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {FILE}, which says what a shapes pipeline was trained on and how it is sampled;"
            " add one, on the pattern of dit_accel/shapes/weights/wan"
        )
    try:
        return ModelInfo(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # damaged JSON is a ValueError, wrong names are a TypeError
        reason = str(error).removeprefix("ModelInfo.__init__() ")
        raise ValueError(f"cannot read {file}: {reason}") from error
