"""How the command line offers a setting of an attention method."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option.

    Attributes:
        name: as in the parsed options; ``search_every`` is ``--search-every``.
        help: what it does.
        how: the other arguments of argparse's ``add_argument``.
        setting: name in the method's constructor, if that is another.
    """

    name: str
    help: str
    how: dict[str, Any]
    setting: str | None = None

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    def add_to(self, group: argparse._ActionsContainer, *, before: str = "", after: str = "") -> None:
        """Declares it, with words before and after its help. An option that is not given is None."""
        group.add_argument(self.flag, help=f"{before}{self.help}{after}", default=None, **self.how)


def option(name: str, text: str, *, setting: str | None = None, **how: Any) -> Option:
    """One with a value; ``how`` as for ``add_argument``."""
    return Option(name, text, how, setting)


def switch(name: str, text: str) -> Option:
    """One that is given as ``--name`` or ``--no-name``."""
    return Option(name, text, {"action": argparse.BooleanOptionalAction})
