"""Random changes of training images."""

import math

import torch
from torch.nn import functional as F

# Largest rotation (rad), change of scale (1) and shift (pixels) of an augmentation of strength 1.
ROTATION, SCALE, SHIFT = math.radians(8), 0.08, 1.5


def augment(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    padding: str = "zeros",
) -> torch.Tensor:
    """Rotate, scale and shift each image (N, C, H, W) float32 at random, by `strength`.

    Pixels from outside the image are 0, or with padding "border" the nearest edge pixel.
    """
    n, size = len(images), images.shape[-1]
    uniform = (torch.rand(n, 4, generator=generator).to(images.device) * 2 - 1) * strength
    angle, zoom = uniform[:, 0] * ROTATION, 1 + uniform[:, 1] * SCALE
    shift = uniform[:, 2:] * SHIFT * 2 / size  # affine_grid's unit is half an image
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = (torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
