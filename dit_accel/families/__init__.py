"""The models we know. One file per family; :func:`register_family` adds more from outside."""

from . import flux, sd3, unet, wan
from .registry import Family, TokenStream, UnknownModelError, family_of, is_known, register_family

__all__ = [
    "Family",
    "TokenStream",
    "UnknownModelError",
    "family_of",
    "flux",
    "is_known",
    "register_family",
    "sd3",
    "unet",
    "wan",
]
