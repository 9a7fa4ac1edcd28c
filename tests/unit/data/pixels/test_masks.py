"""A mask goes the way of its picture, and counts in latents what it covers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.base.errors import DataError
from raylora.data.pixels.augment import Look, apply_look
from raylora.data.pixels.bucket import Buckets, Geometry
from raylora.data.pixels.masks import fit_mask, latent_mask

BLACK = (0, 0, 0)


def spot(width: int, height: int) -> np.ndarray:
    """(H, W): white in one place off the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 8 : height // 2, width // 2 : width * 7 // 8] = 255
    return mask


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_mask_lies_where_its_picture_lies(fit: str, flip: bool):
    mask = spot(160, 96)
    picture = np.repeat(mask[..., None], 3, axis=2)
    look = Look(Buckets((64, 64), minimum=32, step=8).place((160, 96), fit), flip=flip)
    fitted = fit_mask(mask, look)
    assert fitted.dtype == np.uint8
    np.testing.assert_array_equal(fitted, apply_look(picture, look, BLACK)[..., 0])
    assert fitted.max() == 255


def test_padding_does_not_count():
    look = Look(Buckets((64, 64), enabled=False).place((100, 50), "pad"))
    fitted = fit_mask(np.full((50, 100), 255, np.uint8), look)
    assert look.geometry.paste == (0, 16)
    assert (fitted[16:48] == 255).all()
    assert not fitted[:16].any()
    assert not fitted[48:].any()


def test_a_cut_is_that_of_the_look():
    mask = spot(128, 64)
    look = Look(Geometry((64, 64), (128, 64), (40, 0), (0, 0)))
    np.testing.assert_array_equal(fit_mask(mask, look), mask[:, 40:104])


@pytest.mark.parametrize("size", [(80, 48), (320, 192), (333, 200)])
def test_a_mask_of_another_size_and_the_same_shape_covers_the_same(size: tuple[int, int]):
    look = Look(Buckets((64, 64), minimum=32, step=8).place((160, 96)))
    fitted = fit_mask(spot(*size), look, picture=(160, 96)).astype(int)
    off = np.abs(fitted - fit_mask(spot(160, 96), look))
    assert np.mean(off > 32) < 0.06  # the edges of the spot, half a pixel of each mask off


def test_enlarging_a_mask_makes_no_value_that_it_has_not():
    mask = np.where(spot(20, 12) > 0, 200, 100).astype(np.uint8)
    fitted = fit_mask(mask, Look(Geometry((160, 96), (160, 96), (0, 0), (0, 0))))
    assert (fitted.min(), fitted.max()) == (100, 200)


def test_a_mask_of_another_shape_is_refused_with_both_sizes():
    look = Look(Buckets((64, 64), enabled=False).place((160, 96)))
    with pytest.raises(DataError, match=r"a mask of 96x160 px does not fit a picture of 160x96 px"):
        fit_mask(spot(96, 160), look, picture=(160, 96))
    with pytest.raises(DataError, match=r"of 96x160 px .* a picture, 107x64 px when resized"):
        fit_mask(spot(96, 160), look)
    with pytest.raises(DataError, match="a mask of 160x90 px"):
        fit_mask(spot(160, 90), look, picture=(160, 96))


@given(st.integers(8, 500), st.integers(8, 500), st.floats(0.25, 4), st.booleans())
def test_a_mask_that_was_resized_with_its_picture_is_never_refused(
    width: int, height: int, scale: float, known: bool
):
    try:
        place = Buckets((64, 64), minimum=32, step=8).place((width, height))
    except DataError:
        return
    size = (max(1, int(width * scale)), max(1, int(height * scale + 0.5)))
    mask = np.broadcast_to(np.uint8(255), size[::-1])
    fitted = fit_mask(mask, Look(place), picture=(width, height) if known else None)
    assert fitted.shape == place.bucket[::-1]
    assert (fitted == 255).all()


def test_a_latent_cell_counts_the_share_of_it_that_the_mask_covers():
    mask = np.zeros((16, 24), np.uint8)
    mask[:8, :8] = 255
    mask[:8, 8:12] = 255
    mask[8:, 16:] = 51
    cells = latent_mask(mask, (2, 3))
    assert (cells.shape, cells.dtype) == ((1, 2, 3), np.float32)
    np.testing.assert_array_equal(cells[0], np.float32([[1, 0.5, 0], [0, 0, 0.2]]))


def test_the_average_of_the_cells_is_that_of_the_mask():
    mask = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
    cells = latent_mask(mask, (8, 6))
    assert cells.mean() == pytest.approx(mask.mean() / 255, rel=1e-6)  # float32 holds 7 digits
    assert cells.min() >= 0
    assert cells.max() <= 1
