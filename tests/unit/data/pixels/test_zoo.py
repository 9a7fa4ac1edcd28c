"""Every exhibit of the zoo is shown as it was painted, or refused with its reason."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from imagezoo import GROUND, Exhibit, zoo

from raylora.base.errors import DataError
from raylora.data.pixels.decode import decode_image, decode_mask, decode_with_alpha, read_size

SHOWN = [name for name, exhibit in zoo().items() if not exhibit.refused]
REFUSED = [name for name, exhibit in zoo().items() if exhibit.refused]


def away(exhibit: Exhibit) -> np.ndarray:
    """Which pixels are compared."""
    assert exhibit.pixels is not None
    lines = [np.abs(np.arange(side) + 0.5 - side / 2) for side in exhibit.pixels.shape[:2]]
    return (lines[0][:, None] > exhibit.seam) & (lines[1] > exhibit.seam) | (exhibit.seam == 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHOWN)
def test_what_was_painted_is_shown(name: str):
    exhibit = zoo()[name]
    pixels, alpha = decode_with_alpha(exhibit.data, name, GROUND)
    assert exhibit.pixels is not None
    assert (pixels.shape, pixels.dtype) == (exhibit.pixels.shape, np.uint8)
    assert np.abs(pixels.astype(int) - exhibit.pixels)[away(exhibit)].max() <= exhibit.off_by
    if exhibit.alpha is None:
        assert alpha is None
    else:
        assert alpha is not None
        np.testing.assert_array_equal(alpha, exhibit.alpha)
    assert read_size(exhibit.data, name) == pixels.shape[1::-1]
    assert decode_mask(exhibit.data, name).shape == pixels.shape[:2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_refused_with_its_reason(name: str):
    exhibit = zoo()[name]
    with pytest.raises(DataError, match=exhibit.refused) as caught:
        decode_image(exhibit.data, name)
    assert str(caught.value).startswith(f"{name}: ")
    assert len(str(caught.value)) > len(name) + 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_takes_little_python_memory(name: str):
    data = zoo()[name].data
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            decode_with_alpha(data, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000 + 4 * len(data)  # Pillow unpacks a text of 1 MB at most; some copies


# These are of an allowed area: room is made for their pixels before they turn out to be missing,
# or (WebP) before the size is known.
ALLOWED = {"png of 9000 x 9000 without pixels", "webp of 10485772 x 8"}
CHILD = """
import re, resource, sys
sys.path[:0] = sys.argv[1:]
from imagezoo import zoo
from raylora.base.errors import DataError
from raylora.data.pixels.decode import decode_image, decode_mask, read_size

bombs = {name: zoo()[name] for name in sys.stdin.read().splitlines()}
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for name, bomb in bombs.items():
    for read in (read_size, decode_image, decode_mask):
        try:
            read(bomb.data, name)
        except DataError as error:
            assert "MemoryError" not in str(error), error
            assert read is read_size or re.search(bomb.refused, str(error)), error
print(len(bombs), "refused")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_bomb_takes_64_mib_of_any_memory():
    folder = Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), str(folder.parents[2])]
    bombs = set(REFUSED) - ALLOWED
    child = subprocess.run(
        command, input="\n".join(bombs), capture_output=True, text=True, timeout=100
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{len(REFUSED) - 2} refused\n"


WHOLE = ["rgb", "interlaced", "palette, each colour with its alpha", "jpeg", "jpeg, progressive"]
WHOLE += ["webp", "webp with alpha", "avif", "gif", "gif, interlaced", "bmp", "tiff", "tiff, lzw"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_anywhere_is_refused_or_shown_whole(name: str):
    exhibit = zoo()[name]
    whole = decode_image(exhibit.data, name, GROUND)
    refused = 0
    for end in range(0, len(exhibit.data), max(1, len(exhibit.data) // 60)):
        try:
            np.testing.assert_array_equal(decode_image(exhibit.data[:end], name, GROUND), whole)
        except DataError:
            refused += 1
    assert refused > 20


def test_the_zoo_is_large():
    assert len(SHOWN) + len(REFUSED) >= 60
