"""What takes part in the table of caches: something that is put on a pipeline and taken off again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

Options = dict[str, Any]
PRESETS, PEERS, TOGETHER = "presets", "peers", "with sparse attention"


@dataclass(frozen=True)
class Contender(ABC):
    """A cache with its settings.

    Attributes:
        name: of its row.
        group: ``PRESETS``, ``PEERS`` or ``TOGETHER``.
        curve: name that rows of one rule share, which differ in a setting.
        settings: what differs from the defaults.
        refusals: errors by which it says that it cannot act on a model.
    """

    refusals: ClassVar[tuple[type[Exception], ...]] = (ValueError, NotImplementedError)

    name: str
    group: str
    curve: str
    settings: Options = field(default_factory=dict)

    @property
    def key(self) -> Options:
        """Settings that its results are told apart by, beside its name."""
        return self.settings

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        """What has to be found on the model once, as JSON values; by default nothing.

        Args:
            pipe: the pipeline.
            generate: one generation with it, at the settings of the comparison.
            steps: of that generation.
        """
        return {}

    def shares_calibration(self, other: Contender) -> bool:
        """Whether what :meth:`calibrate` finds for another one of the same class is the same."""
        return True

    @abstractmethod
    def install(self, pipe: Any, steps: int, found: Options) -> Any:
        """Puts it on.

        Args:
            pipe: the pipeline.
            steps: of the generations to come.
            found: what :meth:`calibrate` gave.

        Returns:
            an :class:`dit_accel.Acceleration`, or None for the caches of others.

        Raises:
            ValueError: if it does not work with the pipeline.
        """

    @abstractmethod
    def remove(self, pipe: Any) -> None:
        """Takes it off."""
