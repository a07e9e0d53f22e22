"""The parts of a model that a cache may skip as one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Unit:
    """What is skipped or computed as one.

    Attributes:
        key: name within its root, such as ``"blocks 3-27"``, ``"blocks.4.attn1"`` or ``"output"``.
        kind: ``"blocks"`` (consecutive blocks, whose residual is kept), ``"self"``, ``"cross"``, ``"joint"``,
            ``"temporal"`` or ``"mlp"`` (one module, whose output is kept), ``"deep"`` (the inner part of a UNet),
            ``"guidance"`` (the unconditional branch) or ``"output"`` (the whole call).
        first: index of its first block, for ``"blocks"``; number of the skip connection, for ``"deep"``.
        last: index of its last block, included.
        path: name of the module, for single modules.
        inside: names of the modules that are skipped, each with a dot behind it, for ``"deep"``.
    """

    key: str
    kind: str
    first: int = 0
    last: int = 0
    path: str = ""
    inside: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def is_module(self) -> bool:
        """Whether it is one module within a block."""
        return self.kind in ("self", "cross", "joint", "temporal", "mlp")

    def covers(self, block: int | None, path: str, branch: str) -> bool:
        """Whether a module is skipped where the unit is.

        Args:
            block: index among all blocks of the one that it is in; None outside of them.
            path: its name within the root.
            branch: of guidance that is called; of a batch that holds both, guidance still runs one half.
        """
        return (
            self.kind == "output"
            or (self.kind == "blocks" and block is not None and self.first <= block <= self.last)
            or (self.is_module and self.path == path)
            or (self.kind == "deep" and f"{path}.".startswith(self.inside))
            or (self.kind == "guidance" and branch == "uncond")
        )
