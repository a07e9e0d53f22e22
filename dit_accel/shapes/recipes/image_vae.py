"""The image autoencoder that both image pipelines use, each with its own copy of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

IMAGE_SIDE = 256  # pixels of the default image
LATENT_CHANNELS = 4  # as in Stable Diffusion 1.5
SHRINK = 4  # pixels of a latent's side; small objects need it, and 64 x 64 latents make long attention


def build_image_vae() -> AutoencoderKL:
    """An image autoencoder of 0.65 M parameters without attention; it serves every size that 4 divides.

    Its scaling and shift factors stand at one and zero until they are measured after training.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
