"""Command line of the training: ``python -m dit_accel.shapes.train STAGE``; stages can be stopped and repeated."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STAGES = ("video-vae", "wan", "image-vae", "sd3", "sd15", "psnr", "export")


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs one stage; returns 0, or 2 after naming what was wrong."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run: Callable[[argparse.Namespace], None] = {"psnr": _psnr, "export": _export}.get(arguments.stage, _train)
    try:
        run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder / f"{arguments.stage}-run"
    chosen = {"device": arguments.device} | ({"steps": arguments.steps} if arguments.steps else {})
    if arguments.stage == "video-vae":
        from .video_vae import train_video_vae

        train_video_vae(folder, **chosen)
    elif arguments.stage == "image-vae":
        from .image_vae import train_image_vae

        train_image_vae(folder, **chosen)
    else:
        _trainer(arguments.stage)(folder, _vae_folder(arguments, arguments.stage), init=arguments.init, **chosen)


def _trainer(model: str) -> Callable[..., None]:
    from .sd3 import train_sd3
    from .sd15 import train_sd15
    from .wan import train_wan

    return {"wan": train_wan, "sd3": train_sd3, "sd15": train_sd15}[model]


def _psnr(arguments: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL, AutoencoderKLWan

    from .image_vae import image_psnr
    from .video_vae import video_psnr

    video = arguments.model == "wan"
    kind, judge = (AutoencoderKLWan, video_psnr) if video else (AutoencoderKL, image_psnr)
    vae = kind.from_pretrained(_vae_folder(arguments, arguments.model), torch_dtype=torch.float32)
    values = judge(vae.to(arguments.device).eval(), arguments.clips)
    print(
        f"reconstruction of {len(values)} held-out {'clips' if video else 'images'}: {min(values):.1f} to"
        f" {max(values):.1f} dB, mean {statistics.fmean(values):.1f} dB"
    )


def _export(arguments: argparse.Namespace) -> None:
    from .export import export_wan
    from .export_images import export_sd3, export_sd15

    export = {"wan": export_wan, "sd3": export_sd3, "sd15": export_sd15}[arguments.model]
    out = arguments.out or Path(f"shapes-{arguments.model}")
    export(_vae_folder(arguments, arguments.model), arguments.folder / f"{arguments.model}-run", out)


def _vae_folder(arguments: argparse.Namespace, model: str) -> Path:
    """The autoencoder of a pipeline folder if one is given, else the trained one."""
    stage = "video-vae" if model == "wan" else "image-vae"
    folder: Path = (arguments.init or arguments.folder / f"{stage}-run") / "vae"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no autoencoder in {folder}; train first: python -m dit_accel.shapes.train {stage}")
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_accel.shapes.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES, help="an autoencoder, then its models, then export")
    parser.add_argument("--model", choices=("wan", "sd3", "sd15"), default="wan", help="psnr, export: of which model")
    parser.add_argument("--folder", type=Path, default=Path("training"), help="checkpoints, logs and encoded clips")
    parser.add_argument("--out", type=Path, help="export: folder of the finished pipeline (default: shapes-MODEL)")
    parser.add_argument("--init", type=Path, help="pipeline folder to go on from; its autoencoder serves")
    parser.add_argument("--clips", type=int, default=16, help="psnr: how many clips or images")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: what suits the stage and the device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
