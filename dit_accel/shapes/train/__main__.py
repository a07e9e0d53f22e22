"""Command line of the training: ``python -m dit_accel.shapes.train {vae,psnr,wan,export}``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs one stage; every stage can be stopped and started again."""
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder
    if arguments.stage == "vae":
        from .vae import train_vae

        train_vae(folder / "vae-run", arguments.steps or 4200, arguments.device)
    elif arguments.stage == "psnr":
        from diffusers import AutoencoderKLWan

        from .vae import reconstruction_psnr

        vae = AutoencoderKLWan.from_pretrained((arguments.init or folder / "vae-run") / "vae")
        values = sorted(reconstruction_psnr(vae, arguments.clips))
        print(f"reconstruction of {len(values)} held-out clips: {values[0]:.1f} to {values[-1]:.1f} dB")
    elif arguments.stage == "wan":
        from .wan import train_wan

        vae = arguments.init / "vae" if arguments.init else folder / "vae-run" / "vae"
        train_wan(folder / "wan-run", vae, arguments.steps or 4400, arguments.device, arguments.init)
    else:
        from .export import export_wan

        export_wan(folder / "vae-run" / "vae", folder / "wan-run", arguments.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.train", description=__doc__)
    parser.add_argument("stage", choices=("vae", "psnr", "wan", "export"), help="run them in this order")
    parser.add_argument("--folder", type=Path, default=Path("training"), help="checkpoints, logs and encoded clips")
    parser.add_argument("--out", type=Path, default=Path("shapes-wan"), help="export: folder of the finished pipeline")
    parser.add_argument("--init", type=Path, help="pipeline folder: what wan goes on from, and psnr judges")
    parser.add_argument("--clips", type=int, default=16, help="psnr: how many clips")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 4200 for vae, 4400 for wan)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser


if __name__ == "__main__":
    main()
