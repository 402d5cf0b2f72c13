"""mnist.augmentation: digits stay digits, pictures stay pictures, within the stated limits."""

import pytest
import torch
from scipy import ndimage

from mnist import augmentation
from mnist.data import Dataset


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ink(images: torch.Tensor) -> torch.Tensor:
    """The mean level of each image (N,)."""
    return images.mean((1, 2, 3))


@pytest.fixture
def digit_images(digits: Dataset) -> torch.Tensor:
    return digits.train.images[:200].float() / 255


def test_the_ink_moves_a_little_and_the_paper_stays_empty(digit_images: torch.Tensor) -> None:
    changed = augmentation.change_images(digit_images, seeded())
    assert changed.shape == digit_images.shape
    assert 0 <= float(changed.min()) < float(changed.max()) <= 1.001
    for before, after in zip(digit_images[:, 0].numpy(), changed[:, 0].numpy(), strict=True):
        assert not (before == after).all()
        centres = ndimage.center_of_mass(before), ndimage.center_of_mass(after)
        assert max(abs(a - b) for a, b in zip(*centres, strict=True)) < augmentation.SHIFT + 1.5


@pytest.mark.parametrize(
    ("strength", "kind"), [(0.0, "digit"), (0.0, "thing"), (0.0, "photo"), (1.0, "none")]
)
def test_a_strength_of_0_and_the_kind_none_change_nothing(
    digit_images: torch.Tensor, strength: float, kind: str
) -> None:
    changed = augmentation.change_images(digit_images, seeded(), strength, kind)
    assert torch.allclose(changed, digit_images, atol=1e-5)


@pytest.mark.parametrize("kind", ["digit", "thing", "photo"])
def test_the_same_seed_makes_the_same_changes(digit_images: torch.Tensor, kind: str) -> None:
    one, two, other = (
        augmentation.change_images(digit_images, seeded(seed), kind=kind) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_some_strokes_become_thicker_and_some_thinner(digit_images: torch.Tensor) -> None:
    changed = augmentation.change_strokes(digit_images, seeded(), 1.0)
    growth = ink(changed) - ink(digit_images)
    thicker, thinner = (growth > 0).float().mean(), (growth < 0).float().mean()
    assert float(thicker) == pytest.approx(0.65 * augmentation.STROKES, abs=0.1)
    assert float(thinner) == pytest.approx(0.35 * augmentation.STROKES, abs=0.1)
    assert 0 <= float(changed.min()) < float(changed.max()) <= 1


def test_scans_are_coarse_and_as_dark_as_before(digit_images: torch.Tensor) -> None:
    changed = augmentation.scan(digit_images, seeded(), 1.0)
    scanned = (changed != digit_images).any((1, 2, 3))
    n = round(augmentation.SCANS * len(digit_images))
    assert int(scanned.sum()) == n
    assert torch.allclose(changed[scanned].amax((1, 2, 3)), torch.ones(n))
    edges = [
        (images[..., 1:] - images[..., :-1]).abs().mean() for images in (changed, digit_images)
    ]
    assert float(edges[0]) < float(edges[1])


def test_any_image_of_a_batch_may_be_scanned(digit_images: torch.Tensor) -> None:
    """The outliers at the end of a batch, too: to be coarse must not be the sign of a class."""
    generator, images = seeded(), digit_images[:10]
    scanned = [augmentation.scan(images, generator, 1.0) != images for _ in range(100)]
    assert torch.stack(scanned).any(0).any((1, 2, 3)).all()


def test_a_slant_moves_the_top_against_the_bottom() -> None:
    bars = torch.zeros(300, 1, 28, 28)
    bars[..., 4:24, 13:15] = 1
    changed = augmentation.change_images(bars, seeded())
    columns = torch.arange(28.0)
    ends = [changed[:, 0, rows] for rows in (slice(5, 9), slice(19, 23))]
    top, bottom = ((part.sum(1) * columns).sum(1) / part.sum((1, 2)) for part in ends)
    # Rotation alone: 14 rows apart times the tangent of 8 degrees, 2 pixels; with the shear, 4.
    assert 2.2 < float((top - bottom).abs().max()) < 4.5


def test_plain_pictures_keep_their_strokes_and_are_padded_with_their_edge() -> None:
    white = torch.ones(50, 3, 28, 28)
    assert torch.allclose(augmentation.change_images(white, seeded(), is_ink=False), white)
    assert float(augmentation.change_images(white[:, :1], seeded()).min()) == 0


def gradients(n: int, channels: int = 1) -> torch.Tensor:
    """Images that grow brighter from left to right (n, channels, 28, 28)."""
    return torch.linspace(0.2, 0.8, 28).expand(n, channels, 28, 28)


def is_mirrored(images: torch.Tensor) -> torch.Tensor:
    """Whether each image grows darker from left to right (N,)."""
    return images[..., 18:].mean((1, 2, 3)) < images[..., :10].mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["thing", "photo"])
def test_half_of_the_pictures_are_mirrored_where_their_classes_allow_it(kind: str) -> None:
    images = gradients(400)
    changed = augmentation.change_images(images, seeded(), kind=kind, mirror=0.5)
    assert float(is_mirrored(changed).float().mean()) == pytest.approx(0.5, abs=0.1)
    kept = augmentation.change_images(images, seeded(), kind=kind, mirror=0.0)
    assert not is_mirrored(kept).any()


def test_things_stay_upright_and_sharp() -> None:
    bright = torch.ones(200, 1, 28, 28)
    bright[..., :14] = 0
    changed = augmentation.change_images(bright, seeded(), kind="thing")
    assert set(changed.round(decimals=5).unique().tolist()) == {0, 1}
    assert torch.equal(changed.amax(2), changed.amin(2))
    columns = changed[:, 0, 0].argmax(1)  # of the edge
    assert set(columns.tolist()) == {13, 14, 15}


def test_photos_change_their_light_and_color() -> None:
    grey = torch.full((200, 3, 28, 28), 0.5)
    changed = augmentation.change_images(grey, seeded(), kind="photo").mean((2, 3))
    assert 0.3 < float(changed.min()) < 0.4 < 0.6 < float(changed.max()) < 0.7
    assert float((changed.amax(1) - changed.amin(1)).mean()) > 0.05
