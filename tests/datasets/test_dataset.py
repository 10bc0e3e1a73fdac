import numpy as np
import pytest
from PIL import Image

from altopt.datasets.dataset import Objects, to_coco
from altopt.datasets.image_files import check_image, image_size, read_image
from altopt.datasets.shapes import ShapesDataset
from altopt.errors import DataError


def save(path, array, **options):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)[: 2 + (channels > 1)])


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


def test_colour_image_is_read_as_stored(tmp_path):
    pixels = noise(5, 7)
    read = read_image(save(tmp_path / "a.png", pixels), (7, 5))
    assert read.dtype == np.uint8
    assert (read == pixels).all()
    read[0, 0] = 0  # the caller's own


def test_grey_and_palette_images_become_rgb(tmp_path):
    grey = noise(5, 7, 1)
    assert (read_image(save(tmp_path / "grey.png", grey), (7, 5)) == grey[..., None]).all()
    palette = Image.fromarray(np.asarray(noise(5, 7) // 64 * 64, np.uint8)).quantize(256)
    palette.info["transparency"] = bytes(range(256))
    palette.save(tmp_path / "palette.png")
    expected = np.asarray(palette.convert("RGBA").convert("RGB"))
    assert (read_image(tmp_path / "palette.png", (7, 5)) == expected).all()


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = save(tmp_path / "a.jpg", noise(40, 60), exif=exif)
    assert image_size(path) == check_image(path) == (60, 40)
    assert read_image(path, (60, 40)).shape == (40, 60, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_image_is_named(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", noise(200, 300))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert image_size(path) == (300, 200)
    for read in (lambda: read_image(path, (300, 200)), lambda: check_image(path)):
        with pytest.raises(DataError, match=rf"a\.{suffix} cannot be read .*replace it"):
            read()


def test_trailing_bytes_are_no_truncation(tmp_path):
    path = save(tmp_path / "a.jpg", noise(20, 30))
    path.write_bytes(path.read_bytes() + bytes(10_000))
    assert check_image(path) == (30, 20)


def test_other_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.jpg is missing"):
        image_size(tmp_path / "b.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match="neither a JPEG nor a PNG"):
        image_size(tmp_path / "text.jpg")
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8 bits"):
        read_image(tmp_path / "deep.png", (4, 4))


def test_image_of_another_size_is_refused(tmp_path):
    path = save(tmp_path / "a.png", noise(5, 7))
    with pytest.raises(DataError, match="7 x 5 pixels, its annotation says 5 x 7, width and height swapped"):
        read_image(path, (5, 7))
    with pytest.raises(DataError, match="its annotation says 7 x 6: "):
        read_image(path, (7, 6))


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
