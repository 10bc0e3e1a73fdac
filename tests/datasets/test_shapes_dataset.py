import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from altopt.datasets import shapes
from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.datasets.shape_drawing import MAX_IOU, SIZES, Canvas, Dice, draw, enlarge, iou_percent, shape_mask
from altopt.datasets.shapes import GENERATOR, SHAPES, ShapesDataset
from altopt.errors import UsageError

DIGESTS = ["8acee30375c607e4", "7a9ba535dbdcdf86", "a61e3e52c51be8e8"]


def digest(dataset, image_id):
    objects = dataset.objects(image_id)
    content = dataset.image(image_id).tobytes() + objects.boxes.tobytes() + objects.labels.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def test_images_are_those_of_every_machine():
    """A change of the drawing changes these digests: then raise GENERATOR, so that nothing drawn before is reused."""
    dataset = ShapesDataset(("train:2", "val:1"))
    assert [digest(dataset, i) for i in dataset.ids] == DIGESTS
    assert dataset.description()["generator"] == 4


def test_memory_for_images_is_bounded_and_those_beyond_are_the_same(monkeypatch):
    monkeypatch.setattr(shapes, "KEPT_IMAGES", 2)
    dataset, other = (ShapesDataset(("train:4",), width=64, height=48) for _ in range(2))
    first = [digest(dataset, i) for i in dataset.ids]
    assert list(dataset._drawn) == ["train-00000", "train-00001"]
    assert [digest(dataset, i) for i in dataset.ids] == first
    monkeypatch.setattr(shapes, "KEPT_BYTES", 64 * 48 * 3)
    assert [digest(other, i) for i in other.ids] == first
    assert list(other._drawn) == ["train-00000"]


def test_ids_and_description():
    dataset = ShapesDataset(("train:3", "val:2"), width=64, height=48, seed=7)
    assert dataset.ids == ("train-00000", "train-00001", "train-00002", "val-00000", "val-00001")
    assert dataset.coco_image_id("val-00001") == "val-00001"
    assert dataset.size("val-00001") == (64, 48)
    assert dataset.image("val-00001").shape == (48, 64, 3)
    assert dataset.files() == []
    assert dataset.check() == []
    assert dataset.description() == {
        "kind": "shapes", "generator": 4, "splits": ["train:3", "val:2"], "width": 64, "height": 48, "seed": 7,
    }  # fmt: skip


def test_a_image_depends_on_what_it_should_only():
    base = digest(ShapesDataset(("train:2",), width=64, height=48), "train-00001")
    assert digest(ShapesDataset(("val:9", "train:9"), width=64, height=48), "train-00001") == base
    others = [
        digest(ShapesDataset(("train:2",), width=64, height=48), "train-00000"),
        digest(ShapesDataset(("train:2",), width=64, height=48, seed=1), "train-00001"),
        digest(ShapesDataset(("val:2",), width=64, height=48), "val-00001"),
        digest(ShapesDataset(("train:2",), width=65, height=48), "train-00001"),
    ]
    assert len({base, *others}) == 5


def test_objects_keep_to_the_rules():
    drawn = [draw(f"altopt shapes {GENERATOR}: 3 train {number} 320 240", SHAPES, 320, 240) for number in range(40)]
    assert {len(boxes) for _, boxes, _ in drawn} == {1, 2, 3, 4, 5}
    assert {label for _, _, labels in drawn for label in labels} == set(range(len(SHAPES)))
    for pixels, boxes, _ in drawn:
        assert pixels.shape == (240, 320, 3)
        assert pixels.std() > 5
        assert all(0 <= x1 < x2 <= 320 and 0 <= y1 < y2 <= 240 for x1, y1, x2, y2 in boxes)
        assert all(iou_percent(a, b) <= MAX_IOU for i, a in enumerate(boxes) for b in boxes[:i])


def test_sizes_span_a_factor_of_six():
    sides = [max(shape_mask(Dice(str(i)), SHAPES[i % 5], 240).shape) for i in range(300)]
    assert min(sides) <= 31
    assert max(sides) == max(SIZES) == 6 * min(SIZES)


def test_masks_are_cut_tight():
    masks = [shape_mask(Dice(f"{name} {i}"), name, 200) for name in SHAPES for i in range(20)]
    for mask in masks:
        assert mask[0].any()
        assert mask[-1].any()
        assert mask[:, 0].any()
        assert mask[:, -1].any()


def test_a_box_bounds_the_pixels_that_are_painted():
    for i in range(20):
        canvas = Canvas(Dice(str(i)), 96, 64)
        before = canvas.planes.copy()
        canvas.add(i % 5, shape_mask(Dice(str(i)), SHAPES[i % 5], 64))
        rows, columns = (canvas.planes != before).any(0).nonzero()
        assert canvas.boxes == [(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
        assert canvas.labels == [i % 5]


def test_a_shape_is_not_buried_under_larger_ones():
    small, large = np.ones((10, 10), np.bool_), np.ones((30, 40), np.bool_)
    placed = 0
    for i in range(20):
        canvas = Canvas(Dice(str(i)), 64, 48)
        canvas.add(1, small)
        canvas.add(1, large)
        placed += len(canvas.boxes) - 1
        covered = np.zeros((48, 64), np.bool_)
        for x1, y1, x2, y2 in canvas.boxes[1:]:
            covered[y1:y2, x1:x2] = True
        x1, y1, x2, y2 = canvas.boxes[0]
        assert covered[y1:y2, x1:x2].sum() <= 40
    assert placed > 0


def test_masks_are_the_shapes_they_are_called():
    def filled(name):
        return np.mean([shape_mask(Dice(f"{name} {i}"), name, 240).mean() for i in range(60)])

    ring = shape_mask(Dice("ring"), "ring", 240)
    assert not ring[ring.shape[0] // 2, ring.shape[1] // 2]
    assert filled("circle") == pytest.approx(np.pi / 4, abs=0.02)
    assert filled("triangle") == pytest.approx(0.5, abs=0.08)
    assert filled("square") > 0.7
    assert filled("cross") < 0.55


def test_enlarge_meets_the_corners_and_is_smooth():
    corners = np.array([[[0, 100, -50], [20, 20, 20], [0, 0, 0]]], np.int16)
    large = enlarge(corners, 10)
    assert large.shape == (1, 20, 20)
    assert large[0, ::10, ::10].tolist() == [[0, 100], [20, 20]]
    assert abs(np.diff(large[0], axis=0)).max() < 20
    assert large[0, :11].min() >= -50


def test_iou_is_rounded_up():
    assert iou_percent((0, 0, 10, 10), (0, 0, 10, 10)) == 100
    assert iou_percent((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert iou_percent((0, 0, 10, 10), (5, 0, 15, 10)) == 34


def test_threads_see_the_same_images():
    dataset = ShapesDataset(("train:4",), width=64, height=48)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda image_id: digest(dataset, image_id), dataset.ids * 4))
    fresh = ShapesDataset(("train:4",), width=64, height=48)
    assert digests == [digest(fresh, image_id) for image_id in dataset.ids] * 4


def test_a_caller_cannot_spoil_what_is_kept():
    dataset = ShapesDataset(("train:1",), width=64, height=48)
    before = digest(dataset, "train-00000")
    dataset.image("train-00000")[:] = 0
    dataset.objects("train-00000").boxes[:] = 0
    assert digest(dataset, "train-00000") == before


@pytest.mark.parametrize("split", ["train", "train:0", "train:", ":5", "a b:5", "train:-1", "train:1:2"])
def test_a_malformed_split_is_refused(split):
    with pytest.raises(UsageError, match="train:400"):
        ShapesDataset((split,))


def test_other_mistakes_are_refused():
    with pytest.raises(UsageError, match="occurs twice"):
        ShapesDataset(("train:4", "train:5"))
    with pytest.raises(UsageError, match="at least 40"):
        ShapesDataset(("train:4",), width=31)
    with pytest.raises(UsageError, match="empty"):
        open_dataset(DataConfig(format="shapes", train=("a:1",), test=("b:1",), classes=("dog",)), "train", None)
    with pytest.raises(UsageError, match="no test split"):
        open_dataset(DataConfig(format="shapes", train=("a:1",), test=()), "test", None)


def test_opening_takes_the_split_that_is_asked_for():
    config = DataConfig(format="shapes", train=("a:2",), test=("b:1",), width=64, height=48, seed=3)
    assert open_dataset(config, "train", None).ids == ("a-00000", "a-00001")
    test = open_dataset(config, "test", None)
    assert test.ids == ("b-00000",)
    assert (test.description()["seed"], test.size("b-00000")) == (3, (64, 48))


def test_smallest_image_has_a_shape():
    drawn = [draw(f"altopt shapes {GENERATOR}: 0 train {number} 40 40", SHAPES, 40, 40) for number in range(20)]
    assert all(len(boxes) >= 1 for _, boxes, _ in drawn)
