"""The table of caches with cache-dit among the caches of others.

cache-dit is no dependency of dit_accel. Install it into a folder of its own, to be used with the torch and diffusers
that are there:

    pip install --no-deps --target /tmp/peers cache-dit
    python benchmarks/cache_peers.py --packages /tmp/peers --prompts 16 --steps 50 --out docs/benchmarks/caches.json

Options besides `--packages` are those of `python -m dit_accel.shapes.caches`.  Without cache-dit that command has the
caches of diffusers alone; `--only "cache-dit DBCache"` picks a curve.  cache-dit measures PSNR modulo 256 unless told
otherwise; here all PSNR are those of `dit_accel.metrics`.  The version of cache-dit is part of what results depend on:
those of another one are never mixed in.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from dit_accel.shapes.caches.__main__ import main as compare
from dit_accel.shapes.caches.peers import has_cache_dit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--packages", type=Path, help="folder that cache-dit was installed into")
    parsed, others = parser.parse_known_args(arguments)
    if parsed.packages is not None:
        sys.path.append(str(parsed.packages))  # last, so that it brings no other torch or diffusers
    if not has_cache_dit():
        print(f"cache_dit cannot be imported.{__doc__}", file=sys.stderr)
        return 2
    print(f"cache-dit {import_module('cache_dit').__version__}", file=sys.stderr)
    return compare(others)


if __name__ == "__main__":
    sys.exit(main())
