import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from altopt.datasets.on_disk import below, check_image, image_size, inside, read_image, read_text, short
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


def test_colours_of_sixteen_bits_are_refused_and_those_of_few_bits_read(tmp_path):
    """Pillow writes no such png, so it is put together here; it reads one, and keeps half of the bits."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(3))
    deep = tmp_path / "deep.png"
    deep.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with Image.open(deep) as image:
        assert image.mode == "RGB"
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits a channel"):
        check_image(deep)
    for name in ("a.png", "a.bmp", "a.tif", "a.webp", "a.jpg"):
        for mode in ("RGB", "L"):
            Image.new(mode, (4, 3)).save(tmp_path / name)
            assert read_image(tmp_path / name, (4, 3)).shape == (3, 4, 3)


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


def turned(path, orientation, height=40, width=60):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, noise(height, width), exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_that_exif_turns_is_read_as_is_asked_for(tmp_path, suffix, orientation):
    path = turned(tmp_path / f"a.{suffix}", orientation)
    with Image.open(path) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    sideways = orientation >= 5
    for look in (lambda: read_image(path, (60, 40)), lambda: check_image(path)):
        with pytest.raises(DataError, match=rf'has EXIF orientation {orientation} .*data\.exif = "apply".*"ignore"'):
            look()
    size = shown.shape[1::-1]
    assert image_size(path, "apply") == check_image(path, "apply").size == size == ((40, 60) if sideways else (60, 40))
    assert (read_image(path, size, "apply") == shown).all()
    assert image_size(path, "ignore") == check_image(path, "ignore").size == (60, 40)
    stored = read_image(path, (60, 40), "ignore")
    if suffix != "jpg":
        assert (stored == noise(40, 60)).all()
    assert stored.shape == (40, 60, 3)
    assert (stored != shown).any() if not sideways else True


@pytest.mark.parametrize("orientation", [0, 1, 9, 6000])
def test_an_orientation_without_meaning_turns_nothing(tmp_path, orientation):
    path = turned(tmp_path / "a.png", orientation)
    assert (read_image(path, (60, 40)) == noise(40, 60)).all()


def test_exif_behind_the_pixels_of_a_png_is_found(tmp_path):
    path = turned(tmp_path / "a.png", 6)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    with pytest.raises(DataError, match="EXIF orientation 6"):
        check_image(path)


def test_damaged_exif_turns_nothing(tmp_path):
    path = save(tmp_path / "a.jpg", noise(40, 60), exif=b"Exif\0\0nonsense")
    assert check_image(path).size == (60, 40)
    assert read_image(path, (60, 40)).shape == (40, 60, 3)


@pytest.mark.parametrize(("annotated", "advice"), [
    ((40, 60), 'the annotation gives the size that is shown: set data.exif = "apply"'),
    ((60, 40), "the annotation gives the size that is stored: "),
    ((50, 50), 'shown 40 x 60: set data.exif = "apply" if boxes were drawn'),
])
def test_the_message_about_exif_says_what_the_annotation_counts(tmp_path, annotated, advice):
    with pytest.raises(DataError, match=advice):
        read_image(turned(tmp_path / "a.jpg", 8), annotated)


def test_a_swapped_size_names_exif(tmp_path):
    path = turned(tmp_path / "a.jpg", 6)
    for look in (lambda: read_image(path, (40, 60), "ignore"), lambda: read_image(path, (60, 40), "apply")):
        with pytest.raises(DataError, match=r"width and height swapped, as EXIF orientation 6 does \(data.exif\)"):
            look()


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "tiff"])
def test_other_formats_are_read_and_checked(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", noise(50, 70), **options)
    assert (read_image(path, (70, 50)) == noise(50, 70)).all()
    assert check_image(path) == ((70, 50), 1)
    path.write_bytes(path.read_bytes()[:-200])
    for look in (lambda: read_image(path, (70, 50)), lambda: check_image(path)):
        with pytest.raises(DataError, match=rf"a\.{suffix} (cannot be read|is not a)"):
            look()


@pytest.mark.parametrize("suffix", ["webp", "png", "tiff"])
def test_of_several_images_in_a_file_the_first_is_taken(tmp_path, suffix):
    first, second = (Image.fromarray(np.full((30, 40, 3), value, np.uint8)) for value in (10, 200))
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second], lossless=True)  # for WebP; others pass it over
    assert check_image(path) == ((40, 30), 2)
    assert (read_image(path, (40, 30)) == 10).all()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_windows_are_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("größe\nb", encoding)
    assert read_text(tmp_path / "a.txt") == "größe\nb"


@pytest.mark.parametrize("content", ["größe".encode("latin-1"), "ab".encode("utf-16-le"), b"\xff\xfea"])
def test_other_texts_are_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt is not a text in UTF-8"):
        read_text(tmp_path / "a.txt")


def test_values_are_shown_short_and_in_a_line():
    assert short("a\n\x1b[31m\ud800b") == r"a\n\x1b[31m\ud800b"
    assert len(short(10**400)) == 60
    assert short(None) == "None"
