"""The models we know. One file per family; :func:`register_family` adds more from outside."""

from . import cogvideox, flux, hunyuan, sd3, unet, wan
from .registry import Family, TokenStream, UnknownModelError, family_of, is_known, register_family
from .streams import (
    BlockStreams,
    block_arguments,
    modulated_input,
    pack_streams,
    read_streams,
    streams_of,
    unpack_streams,
)

__all__ = [
    "BlockStreams",
    "Family",
    "TokenStream",
    "UnknownModelError",
    "block_arguments",
    "cogvideox",
    "family_of",
    "flux",
    "hunyuan",
    "is_known",
    "modulated_input",
    "pack_streams",
    "read_streams",
    "register_family",
    "sd3",
    "streams_of",
    "unet",
    "unpack_streams",
    "wan",
]
