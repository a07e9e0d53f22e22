"""Caches of others: those that diffusers ships, and cache-dit where its package can be imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...roots import find_roots
from .contender import PEERS, Contender, Options

ATTENTION_AND_MLP = (r".*blocks\.\d+\.attn\d?", r".*blocks\.\d+\.(ffn|ff|ff_context)")  # in diffusers' transformers
_RATIOS = re.compile(r"^\[[-\d., e]+\]$", re.MULTILINE)


class Peer(Contender):
    """A cache of others. Whatever it raises is a reason why it cannot act: how it refuses is its own affair."""

    refusals: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def install(self, pipe: Any, steps: int, found: Options) -> None:
        """See :meth:`Contender.install`."""
        try:
            self._put_on(pipe, steps, found)
        except Exception as error:
            with contextlib.suppress(Exception):  # part of it may be on
                self.remove(pipe)
            raise ValueError(f"{self.curve} cannot be put on {type(pipe).__name__}: {error}") from error

    @abstractmethod
    def _put_on(self, pipe: Any, steps: int, found: Options) -> None: ...


@dataclass(frozen=True)
class DiffusersPeer(Peer):
    """A cache of diffusers (``transformer.enable_cache``).

    Attributes:
        config: name of its class of settings.
    """

    config: str = ""

    def _put_on(self, pipe: Any, steps: int, found: Options) -> None:
        for root in self._roots(pipe):
            root.enable_cache(self._config(steps, found))

    def remove(self, pipe: Any) -> None:
        """See :meth:`Contender.remove`."""
        for root in self._roots(pipe):
            root.disable_cache()

    def _config(self, steps: int, found: Options) -> Any:
        return getattr(importlib.import_module("diffusers"), self.config)(**self.settings | found)

    @staticmethod
    def _roots(pipe: Any) -> list[Any]:
        return list(find_roots(pipe).values())


@dataclass(frozen=True)
class MagCachePeer(DiffusersPeer):
    """MagCache of diffusers, with the magnitude ratios that its own calibration prints for the model."""

    config: str = "MagCacheConfig"

    def calibrate(self, pipe: Any, generate: Callable[[], object], steps: int) -> Options:
        """One generation in its calibration mode; of several branches the ratios of the first count."""
        with self._calibrating(pipe, steps), contextlib.redirect_stdout(io.StringIO()) as printed:
            generate()
        lists = _RATIOS.findall(printed.getvalue())
        if not lists:
            raise ValueError(f"{self.config} printed no ratios in {steps} steps")
        return {"mag_ratios": json.loads(lists[0])}

    def _config(self, steps: int, found: Options) -> Any:
        return super()._config(steps, {"num_inference_steps": steps} | found)

    @contextlib.contextmanager
    def _calibrating(self, pipe: Any, steps: int) -> Iterator[None]:
        self.install(pipe, steps, {"calibrate": True})
        try:
            yield
        finally:
            self.remove(pipe)


@dataclass(frozen=True)
class CacheDitPeer(Peer):
    """DBCache of cache-dit.

    Attributes:
        order: of its TaylorSeer; None to reuse what was kept as it is.
    """

    order: int | None = None

    def _put_on(self, pipe: Any, steps: int, found: Options) -> None:
        cache_dit: Any = importlib.import_module("cache_dit")
        config = cache_dit.DBCacheConfig(num_inference_steps=steps, **self.settings)
        predictor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order) if self.order else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=predictor)

    def remove(self, pipe: Any) -> None:
        """See :meth:`Contender.remove`."""
        importlib.import_module("cache_dit").disable_cache(pipe)


def has_cache_dit() -> bool:
    """Whether cache-dit can be imported; it is no dependency (see ``benchmarks/cache_peers.py``)."""
    return importlib.util.find_spec("cache_dit") is not None


def peer_versions() -> dict[str, str]:
    """Versions of the packages that take part and are no dependencies; those of dependencies are told elsewhere."""
    return {"cache-dit": importlib.import_module("cache_dit").__version__} if has_cache_dit() else {}


def peers() -> list[Contender]:
    """All of them, with several settings each. Those of cache-dit are there only if it is."""
    settings: Options
    found: list[Contender] = []
    for threshold in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3):
        name = f"diffusers FirstBlockCache {threshold:g}"
        curve, settings = "diffusers FirstBlockCache", {"threshold": threshold}
        found.append(DiffusersPeer(name, PEERS, curve, settings, "FirstBlockCacheConfig"))
    for threshold, most in ((0.03, 2), (0.06, 3), (0.12, 4), (0.24, 5), (0.24, 6)):
        name = f"diffusers MagCache {threshold:g}, K {most}"
        settings = {"threshold": threshold, "max_skip_steps": most}
        found.append(MagCachePeer(name, PEERS, "diffusers MagCache", settings))
    for interval in (2, 3, 4, 5, 6, 7, 8, 10):
        every = {"cache_interval": interval}
        modules: Options = {"cache_identifiers": list(ATTENTION_AND_MLP)}
        for curve, settings in (
            ("diffusers TaylorSeer", every | modules),  # its own patterns match nothing on Wan
            ("diffusers TaylorSeer lite", every | {"use_lite_mode": True}),
        ):
            found.append(DiffusersPeer(f"{curve} {interval}", PEERS, curve, settings, "TaylorSeerCacheConfig"))
    return [*found, *(_cache_dit() if has_cache_dit() else ())]


def _cache_dit() -> list[Contender]:
    found: list[Contender] = []
    for front, threshold in ((1, 0.04), (1, 0.08), (1, 0.12), (1, 0.24), (2, 0.08), (2, 0.12), (2, 0.24)):
        settings = {"Fn_compute_blocks": front, "Bn_compute_blocks": 0, "residual_diff_threshold": threshold}
        for order, text in ((None, ""), (1, " + TaylorSeer")):
            curve = f"cache-dit DBCache{text}"
            found.append(CacheDitPeer(f"{curve} F{front} {threshold:g}", PEERS, curve, settings, order))
    return found
