from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def untrained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pipeline's architecture with random weights, in diffusers' format."""
    from diffusers import WanPipeline

    from dit_accel.shapes import recipe

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    WanPipeline(
        tokenizer=recipe.build_tokenizer(),
        text_encoder=recipe.build_text_encoder(),
        vae=recipe.build_vae(),
        scheduler=recipe.build_scheduler(),
        transformer=recipe.build_transformer(),
    ).save_pretrained(folder)
    return folder
