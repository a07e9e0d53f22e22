"""Truth measures for edits and for masks: what only a world with known truth can tell.

Videos are ``[frames, 3, height, width]`` floats in [0, 1]. Masks are ``[frames, height, width]`` or
``[frames, objects, height, width]``, bool or coverage (more than half counts); of several objects, all count together.
``margin`` grows a mask by so many pixels before its outside is measured, because edges belong to neither side.
"""

from .colors import color_drift, color_mask, color_share, leak
from .fidelity import hole_psnr, outside_psnr, outside_ssim, synthesis_psnr
from .places import centroid_error, centroids, mask_iou, trajectory_error
from .steadiness import flicker

__all__ = [
    "centroid_error",
    "centroids",
    "color_drift",
    "color_mask",
    "color_share",
    "flicker",
    "hole_psnr",
    "leak",
    "mask_iou",
    "outside_psnr",
    "outside_ssim",
    "synthesis_psnr",
    "trajectory_error",
]
