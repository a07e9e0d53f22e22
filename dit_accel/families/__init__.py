"""The models we know. One file per family; :func:`register_family` adds more from outside."""

from . import sd3, unet, wan
from .registry import Family, UnknownModelError, family_of, is_known, register_family

__all__ = ["Family", "UnknownModelError", "family_of", "is_known", "register_family", "sd3", "unet", "wan"]
