"""How far one video is from another, and what the dense model itself would score: floats in [0, 1], no surprises."""

from .fidelity import describe_noise_floor, noise_floor, psnr
from .perceptual import lpips
from .structure import ssim
from .temporal import flicker, motion_ratio

__all__ = ["describe_noise_floor", "flicker", "lpips", "motion_ratio", "noise_floor", "psnr", "ssim"]
