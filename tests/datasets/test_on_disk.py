import numpy as np
import pytest
from PIL import Image

from altopt.datasets.on_disk import below, check_image, image_size, inside, read_image
from altopt.errors import DataError


def save(path, array, **options):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)[: 2 + (channels > 1)])


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_any_size_is_turned_as_exif_says(tmp_path, suffix, orientation):
    turned = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.swapaxes(0, 1),
              lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", noise(40, 60), exif=exif)
    with Image.open(path) as image:  # Pillow turns TIFF by itself
        stored = noise(40, 60) if suffix == "tif" else np.asarray(image.convert("RGB"))
    assert (read_image(path, None, "apply") == turned[orientation - 1](stored)).all()


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
    assert check_image(path) == ((30, 20), 1)


def test_other_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.jpg is missing"):
        image_size(tmp_path / "b.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match="is not a JPEG, PNG, WebP, BMP or TIFF image"):
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


@pytest.mark.parametrize("name", ["../a.jpg", "sub/../../a.jpg", "/etc/passwd", "a\0b"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out"):
        below(tmp_path, name)


def test_a_link_must_not_lead_out_but_the_folder_may_be_one(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jpg").touch()
    (root / "linked").symlink_to(elsewhere)
    assert inside(root, root / "linked", "a.jpg").exists()
    (root / "kept.jpg").touch()
    (elsewhere / "back.jpg").symlink_to(root / "kept.jpg")
    assert inside(root, root / "linked", "back.jpg").exists()
    (root / "b.jpg").symlink_to(elsewhere / "a.jpg")
    for name in ("b.jpg", "linked/a.jpg"):
        with pytest.raises(DataError, match="leads out of the data root to"):
            inside(root, root, name)
