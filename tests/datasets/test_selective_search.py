import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from altopt.errors import UsageError

ROOT = Path(__file__).parents[2]
LOADS = "import sys, altopt.datasets.selective_search; print('torch' in sys.modules)"


def image():
    """A red and a blue rectangle on grey noise."""
    pixels = np.random.default_rng(0).integers(110, 120, (48, 64, 3), dtype=np.uint8)
    pixels[8:28, 10:30] = (200, 20, 20)
    pixels[20:40, 40:60] = (20, 20, 200)
    return pixels


@pytest.fixture
def search():
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "ximgproc"):
        pytest.skip("OpenCV without its contrib modules")
    from altopt.datasets.selective_search import selective_search

    return selective_search


def test_finds_the_rectangles(search):
    boxes = search(image(), "fast", 0)
    assert boxes.dtype == np.int32
    for wanted in ((10, 8, 20, 20), (40, 20, 20, 20)):
        assert np.abs(boxes - wanted).max(1).min() <= 1
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (64, 48)).all()


def test_no_box_twice_and_more_of_quality(search):
    fast, quality = search(image(), "fast", 0), search(image(), "quality", 0)
    assert len({tuple(box) for box in fast.tolist()}) == len(fast)
    assert len(quality) > len(fast)


def test_the_seed_decides_the_order_and_nothing_else_does(search):
    first = search(image(), "fast", 1)
    other = search(image(), "fast", 2)
    assert not np.array_equal(first, other)
    assert np.array_equal(first, search(image(), "fast", 1))
    assert sorted(first.tolist()) == sorted(other.tolist())


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 2), (3, 3), (3, 40)])
def test_tiny_and_plain_images(search, shape):
    boxes = search(np.zeros((*shape, 3), np.uint8), "fast", 0)
    assert boxes.tolist() == [[0, 0, shape[1], shape[0]]]


@pytest.mark.parametrize("there", ["nothing", "plain OpenCV"])
def test_without_opencvs_contrib_modules(monkeypatch, there):
    from altopt.datasets.selective_search import require_opencv

    monkeypatch.setitem(sys.modules, "cv2", None if there == "nothing" else type(sys)("cv2"))
    with pytest.raises(UsageError, match=r"\.\[selective-search\].*altopt proposals import"):
        require_opencv()


def test_processes_do_not_import_torch():
    done = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
