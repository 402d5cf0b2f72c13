"""Random changes of training images, as people and cameras make them."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Largest rotation (rad), change of scale (1) and shift (pixels) of an augmentation of strength 1.
ROTATION, SCALE, SHIFT = math.radians(8), 0.08, 1.5
# For digits and letters also: largest shear (1) and change of the aspect ratio (log); share of
# images whose strokes become thicker or thinner; share of images that pass through a coarse scan,
# and its pixels a side. docs/lab-log.md has the effect of each on digits of other collections.
SHEAR, ASPECT = 0.15, 0.12
STROKES, SCANS, SCAN_SIDES = 0.5, 0.15, (9, 16)


@dataclass(frozen=True)
class PictureLimits:
    """Largest changes of a picture: rotation (rad), scale (log), shift (share of its side),
    contrast (share), and twice the brightness of each channel (share)."""

    rotation: float
    scale: float
    shift: float
    light: float


# Things stand upright, as in Fashion-MNIST; photos are also tilted, near or far, light or dark.
PICTURE_LIMITS = {
    "thing": PictureLimits(0.0, 0.0, 1 / 28, 0.0),
    "photo": PictureLimits(math.radians(10), 0.15, 0.1, 0.3),
}
MIRRORED_SHARE = 0.5  # share of mirrored pictures where no class is another one's mirror image
KINDS = ("digit", *PICTURE_LIMITS, "none")
"""Kinds of random changes to training images; docs/your-data.md explains each."""


def change_images(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    kind: str = "digit",
    *,
    is_ink: bool = True,
    mirror: float = 0.0,
) -> torch.Tensor:
    """Change each image (N, C, H, W) float32, 0..1, at random, by `strength`.

    `kind` is one of KINDS. `is_ink`: the images are bright ink on 0 (images.normalise, recipe
    "digit"), so that the kind "digit" also changes strokes, slant, aspect ratio and resolution, and
    pixels from outside an image are 0; otherwise these are the nearest edge pixel. `mirror`: of the
    kinds "thing" and "photo", the share (0..1) of images that exchange left and right.
    """
    if kind == "none":
        return images
    if kind == "digit":
        return change_writing(images, generator, strength, is_ink)
    return change_picture(images, generator, strength, PICTURE_LIMITS[kind], mirror)


def change_writing(
    images: torch.Tensor, generator: torch.Generator, strength: float, is_ink: bool
) -> torch.Tensor:
    """The kind "digit": rotate, scale and shift; for ink also what another hand would change."""
    n, size = len(images), images.shape[-1]
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
    images = _transform(images, torch.stack(rows, 1), "zeros" if is_ink else "border")
    return scan(images, generator, strength) if is_ink else images


def _transform(images: torch.Tensor, matrices: torch.Tensor, padding: str) -> torch.Tensor:
    """Apply affine maps (N, 2, 3), from the new image to the old one in halves of a side."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


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
    """Reduce some images to a few pixels a side, and enlarge them; their peak stays 1."""
    n = round(SCANS * strength * len(images))
    if not n:
        return images
    low, high = SCAN_SIDES
    side = int(torch.randint(low, high + 1, (1,), generator=generator))
    chosen = torch.randperm(len(images), generator=generator)[:n].to(images.device)
    small = F.interpolate(images[chosen], size=(side, side), mode="area")
    large = F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)
    peaks = large.amax((1, 2, 3), keepdim=True).clamp(min=0.1)
    return images.index_copy(0, chosen, large / peaks)


def change_picture(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float,
    limits: PictureLimits,
    mirror: float,
) -> torch.Tensor:
    """The kinds "thing" and "photo": shift and mirror; for photos also tilt, distance and light."""
    n, channels, _, size = images.shape
    random = torch.rand(n, 6 + channels, generator=generator).to(images.device)
    flip = torch.where(random[:, 0] < mirror, -1.0, 1.0)
    uniform = (random[:, 1:] * 2 - 1) * strength
    angle, zoom = uniform[:, 0] * limits.rotation, torch.exp(uniform[:, 1] * limits.scale)
    shift = uniform[:, 2:4] * limits.shift * 2  # affine_grid's unit is half an image
    if not (limits.rotation or limits.scale):  # whole pixels stay sharp
        shift = (shift * size / 2).round() * 2 / size
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = (
        torch.stack([cos * flip, -sin, shift[:, 0]], 1),
        torch.stack([sin * flip, cos, shift[:, 1]], 1),
    )
    images = _transform(images, torch.stack(rows, 1), "border")
    return _change_light(images, uniform[:, 4:] * limits.light) if limits.light else images


def _change_light(images: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Change contrast and the brightness of each channel by `change` (N, 1 + C)."""
    contrast, light = 1 + change[:, :1, None, None], change[:, 1:, None, None] / 2
    return ((images - 0.5) * contrast + 0.5 + light).clamp(0, 1)
