"""The attend seam: the stock processor runs, and only its attention function is ours.

A stock processor reaches attention through one of two global names of its module, ``dispatch_attention_fn`` (tokens
before heads) or ``F.scaled_dot_product_attention`` (heads before tokens). We run the stock code with its own copy of
those globals, in which both names lead to a :class:`Site`. No projection, norm or rotary code is copied.

The copy of a class's code is shared by all modules of a root, and finds the site of the module that runs in the
:class:`Seat` of the root. Were the site part of the code itself, torch.compile would take the first block's site for
every block that it runs by the same graph, since it guards nothing in such globals.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .site import Site


class Seat:
    """Where the attention functions of one root find the site of the module that is running.

    Attributes:
        site: set by each processor before its stock code runs.
    """

    def __init__(self) -> None:
        self.site: Site | None = None
        self._codes: dict[type, Callable[..., Any]] = {}

    def code_of(self, stock: Any, path: str) -> Callable[..., Any]:
        """The rebound ``__call__`` of a stock processor at ``path``; one for each class."""
        if type(stock) not in self._codes:
            self._codes[type(stock)] = rebind(stock, self, path)
        return self._codes[type(stock)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Seat:
        """An empty one: code that leads to this seat is of no use to a copy."""
        memo[id(self)] = copied = Seat()
        return copied


class BoundProcessor:
    """Stands at one attention module in place of its stock processor, and runs that processor's own code.

    Args:
        stock: the processor found at the module; kept untouched, and put back on removal.
        site: where its attention calls are sent.
        seat: of the root that the module belongs to.

    Attributes:
        stock_class: of ``stock``; each class of bound processors has its own.
    """

    stock_class: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Without arguments a fresh stock processor: so diffusers' IP-Adapter loaders renew what they leave alone."""
        if cls.stock_class is not None and not args and not kwargs:
            return cls.stock_class()
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, Site, Seat]:
        """For ``copy.copy``, which would make a stock processor otherwise."""
        return self.stock, self.site, self.seat

    def __init__(self, stock: Any, site: Site, seat: Seat) -> None:
        self.stock = stock
        self.site = site
        self.seat = seat
        self._code = seat.code_of(stock, site.info.path)
        self._attention_backend = getattr(stock, "_attention_backend", None)
        self._parallel_config = getattr(stock, "_parallel_config", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the stock code; ``self`` takes the place of the stock processor, so later settings are seen."""
        self.seat.site = self.site
        self.site.reached = True
        return self._code(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProcessor:
        """The same at a copy of the model."""
        stock = copy.deepcopy(self.stock, memo)
        copied = type(self)(stock, copy.deepcopy(self.site, memo), copy.deepcopy(self.seat, memo))
        copied._attention_backend, copied._parallel_config = self._attention_backend, self._parallel_config
        return copied

    def give_settings(self) -> None:
        """Hands the stock processor what diffusers has set here meanwhile: backend and context parallelism."""
        for name in ("_attention_backend", "_parallel_config"):
            setting = getattr(self, name)
            if hasattr(self.stock, name) and getattr(self.stock, name) is not setting:
                setattr(self.stock, name, setting)

    def __getattr__(self, name: str) -> Any:
        if name in ("stock", "site", "seat", "_code"):  # not yet set: while unpickling or copying
            raise AttributeError(name)
        return getattr(self.stock, name)


@functools.cache
def bound_class(stock_class: Any) -> type[BoundProcessor]:
    """A :class:`BoundProcessor` whose ``__call__`` shows the stock signature.

    Attention modules drop keyword arguments that the signature of their processor does not name.
    """
    stock_call = inspect.unwrap(stock_class.__call__)
    call = functools.wraps(stock_call)(lambda self, *args, **kwargs: BoundProcessor.__call__(self, *args, **kwargs))
    return type(f"Bound{stock_class.__name__}", (BoundProcessor,), {"__call__": call, "stock_class": stock_class})


def bind(stock: Any, site: Site, seat: Seat) -> BoundProcessor:
    """A processor that runs ``stock`` with its attention calls sent to ``site``, which they find in ``seat``.

    Raises:
        TypeError: if the stock processor does not call attention by a name we can redirect.
        ValueError: if it is linear attention.
    """
    stock_class: Any = type(stock)
    return bound_class(stock_class)(stock, site, seat)


def rebind(stock: Any, seat: Seat, path: str) -> Callable[..., Any]:
    """The stock ``__call__`` with its own globals, in which the attention functions lead to the site in ``seat``."""
    call = inspect.unwrap(type(stock).__call__)
    scope = dict(call.__globals__)
    if not _is_redirectable(call):
        named = {"dispatch_attention_fn", "scaled_dot_product_attention"} & set(call.__code__.co_names)
        if "Linear" in type(stock).__name__ and not named:
            raise ValueError(
                f"{type(stock).__name__} at {path} is linear attention, which looks at no pairs of tokens, so no "
                "method can leave any out; let site_kind return None for it, and act on softmax attention alone"
            )
        raise TypeError(
            f"{type(stock).__name__} at {path} calls neither dispatch_attention_fn nor "
            "F.scaled_dot_product_attention by these global names of its module, so its attention cannot be "
            "redirected; restore the default processors"
        )
    scope.pop("__name__", None)  # with it, torch.compile would look names up in the real module
    if "dispatch_attention_fn" in scope:
        scope["dispatch_attention_fn"] = _dispatch_to(seat, scope["dispatch_attention_fn"])
    if scope.get("F") is F:
        scope["F"] = _functional_for(seat)
    rebound = types.FunctionType(call.__code__, scope, call.__name__, call.__defaults__, call.__closure__)
    rebound.__kwdefaults__ = call.__kwdefaults__
    return rebound


def _is_redirectable(call: Callable[..., Any]) -> bool:
    """Whether code looks attention up by a name that :func:`rebind` replaces; any other way leads past the site."""
    code = [(each.opname, each.argval) for each in dis.get_instructions(call) if each.opname != "EXTENDED_ARG"]
    if "dispatch_attention_fn" in call.__globals__ and ("LOAD_GLOBAL", "dispatch_attention_fn") in code:
        return True
    return call.__globals__.get("F") is F and any(
        here == ("LOAD_GLOBAL", "F") and name == "scaled_dot_product_attention"
        for here, (_, name) in itertools.pairwise(code)
    )


def _dispatch_to(seat: Seat, stock_dispatch: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def dispatch(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        site = seat.site
        if site is None or site.is_stock:
            return stock_dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options)
        plain = not dropout_p and not is_causal and options.get("parallel_config") is None and site.knows(attn_mask)

        def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            tokens_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            out = stock_dispatch(*tokens_first, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options)
            return out.transpose(1, 2)

        heads_first = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return site.attend(*heads_first, scale=scale, plain=plain, stock=stock).transpose(1, 2)

    return dispatch


def _functional_for(seat: Seat) -> types.ModuleType:
    """A copy of ``torch.nn.functional`` in which only the attention call differs."""

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        site = seat.site
        if site is None or site.is_stock:
            return stock(query, key, value)
        plain = not dropout_p and not is_causal and site.knows(attn_mask)
        return site.attend(query, key, value, scale=scale, plain=plain, stock=stock)

    functional = types.ModuleType("functional")
    functional.__dict__.update({name: value for name, value in vars(F).items() if not name.startswith("__")})
    functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
    return functional
