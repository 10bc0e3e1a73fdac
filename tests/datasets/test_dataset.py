import numpy as np

from altopt.datasets.dataset import Objects, to_coco
from altopt.datasets.shapes import ShapesDataset


def test_usable_leaves_out_difficult_and_crowd():
    objects = Objects(
        boxes=np.arange(16, dtype=np.float32).reshape(4, 4),
        labels=np.array([3, 2, 1, 0]),
        difficult=np.array([False, True, False, True]),
        crowd=np.array([False, False, True, True]),
        areas=np.array([5, 6, 7, 8], np.float32),
    )
    usable = objects.usable()
    assert len(objects) == 4
    assert usable.boxes.tolist() == [[0, 1, 2, 3]]
    assert usable.labels.tolist() == [3]
    assert usable.areas.tolist() == [5]


def test_usable_of_no_objects():
    none = np.zeros(0, np.bool_)
    usable = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), none, none).usable()
    assert usable.boxes.shape == (0, 4)
    assert usable.areas is None


def test_to_coco_has_every_object_once():
    dataset = ShapesDataset(("train:5",), width=96, height=64)
    truth = to_coco(dataset)
    assert [image["id"] for image in truth["images"]] == list(dataset.ids)
    assert truth["images"][0] == {"id": "train-00000", "width": 96, "height": 64}
    assert truth["categories"][4] == {"id": 5, "name": "ring"}
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    for image_id in dataset.ids:
        of_image = [a for a in truth["annotations"] if a["image_id"] == image_id]
        objects = dataset.objects(image_id)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in of_image)]
        assert corners == objects.boxes.tolist()
        assert [a["category_id"] - 1 for a in of_image] == objects.labels.tolist()
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in of_image)
        assert all(a["iscrowd"] == a["difficult"] == 0 for a in of_image)
