"""Random changes of training images, as people and cameras make them."""

import math

import torch
from torch.nn import functional as F

# Largest rotation (rad), change of scale (1) and shift (pixels) of an augmentation of strength 1.
ROTATION, SCALE, SHIFT = math.radians(8), 0.08, 1.5
# For digits and letters also: largest shear (1) and change of the aspect ratio (log); share of
# images whose strokes become thicker or thinner; share of images that pass through a coarse scan,
# and its pixels a side. docs/lab-log.md has the effect of each on digits of other collections.
SHEAR, ASPECT = 0.15, 0.12
STROKES, SCANS, SCAN_SIDES = 0.5, 0.15, (9, 16)


def augment(
    images: torch.Tensor, generator: torch.Generator, strength: float = 1.0, recipe: str = "digit"
) -> torch.Tensor:
    """Change each image (N, C, H, W) float32, 0..1, at random, by `strength`.

    Each is rotated, scaled and shifted. Pixels from outside the image are 0 with the recipe "digit"
    (images.normalise), otherwise the nearest edge pixel. With "digit", strokes, slant, aspect ratio
    and resolution are changed, too.
    """
    n, size = len(images), images.shape[-1]
    is_ink = recipe == "digit"
    if is_ink:
        images = change_strokes(images, generator, strength)
    uniform = (torch.rand(n, 6, generator=generator).to(images.device) * 2 - 1) * strength
    angle, zoom = uniform[:, 0] * ROTATION, 1 + uniform[:, 1] * SCALE
    shift = uniform[:, 2:4] * SHIFT * 2 / size  # affine_grid's unit is half an image
    shear, aspect = uniform[:, 4] * SHEAR * is_ink, uniform[:, 5] * ASPECT * is_ink
    cos, sin, stretch = torch.cos(angle) / zoom, torch.sin(angle) / zoom, torch.exp(aspect)
    rows = (
        torch.stack([cos * stretch, cos * shear - sin / stretch, shift[:, 0]], 1),
        torch.stack([sin * stretch, sin * shear + cos / stretch, shift[:, 1]], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    padding = "zeros" if is_ink else "border"
    images = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
    return scan(images, generator, strength) if is_ink else images


def change_strokes(
    images: torch.Tensor, generator: torch.Generator, strength: float
) -> torch.Tensor:
    """Make the strokes of some images up to two pixels thicker, and of some up to one thinner."""
    amount, kind = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images.device)
    thick = F.max_pool2d(images, 3, 1, 1) - images
    thin = -F.max_pool2d(-images, 3, 1, 1) - images
    share = STROKES * strength
    change = torch.where(kind < 0.65 * share, amount * thick, 0.6 * amount * thin)
    return images + change * (kind < share)


def scan(images: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Reduce the first images to a few pixels a side, and enlarge them; their peak stays 1."""
    n = round(SCANS * strength * len(images))
    if not n:
        return images
    low, high = SCAN_SIDES
    side = int(torch.randint(low, high + 1, (1,), generator=generator))
    small = F.interpolate(images[:n], size=(side, side), mode="area")
    large = F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)
    peaks = large.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    return torch.cat([large / peaks, images[n:]])
