"""voc07-mini: its lists, and making it from an archive."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from altopt.datasets import voc07_mini
from altopt.datasets.voc07_mini import ids, lists
from altopt.datasets.voc_archives import VOC07, VOC07_MINI, Archive, is_extracted, obtain
from altopt.errors import DataError

FOLDER = "VOCdevkit/VOC2007"
ANNOTATION = """<annotation>
\t<filename>000001.jpg</filename>
\t<owner>
\t\t<name>R&amp;D</name>
\t</owner>
\t<size>
\t\t<width>335</width>
\t\t<height>500</height>
\t\t<depth>3</depth>
\t</size>
\t<object>
\t\t<name>train</name>
\t\t<bndbox>
\t\t\t<xmin>{}</xmin>
\t\t\t<ymin>{}</ymin>
\t\t\t<xmax>{}</xmax>
\t\t\t<ymax>{}</ymax>
\t\t</bndbox>
\t\t<part>
\t\t\t<name>head</name>
\t\t\t<bndbox>
\t\t\t\t<xmin>{}</xmin>
\t\t\t\t<ymin>{}</ymin>
\t\t\t\t<xmax>{}</xmax>
\t\t\t\t<ymax>{}</ymax>
\t\t\t</bndbox>
\t\t</part>
\t</object>
</annotation>"""
WHOLE = (1, 1, 335, 500)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (335, 500)) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"train": ["000001"], "val": ["000002"], "test": ["000003"], "trainval": ["000001", "000002"]}
    monkeypatch.setattr(voc07_mini, "lists", lambda: found)


def archive(folder: Path, files: dict[str, bytes]) -> Archive:
    """Write a tar file; return it as the archive that voc07-mini is made of."""
    path = folder / "VOCtest.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = path.read_bytes()
    return replace(VOC07_MINI[0], name=path.name, size=len(content),
                   checksum=f"sha256:{hashlib.sha256(content).hexdigest()}")


def make(folder: Path, made_of: Archive) -> Path:
    return obtain(folder, archives=[made_of], archive_files=[folder.parent / made_of.name])


def official() -> dict[str, bytes]:
    """Return what an archive holds: three images of the lists, one of them grey, one that is of none, and lists."""
    files = {"ImageSets/Main/test.txt": b"000001\n000002\n", "ImageSets/Main/train_test.txt": b"000001 1\n"}
    for number in range(1, 5):
        files[f"JPEGImages/00000{number}.jpg"] = jpeg("L" if number == 2 else "RGB")
        # The box of image 000002 in the real archive: 139, 200, 207, 301.
        files[f"Annotations/00000{number}.xml"] = ANNOTATION.format(139, 200, 207, 301, *WHOLE).encode()
    return files


def test_makes_images_boxes_and_lists(tmp_path: Path, small_lists: None) -> None:
    small = archive(tmp_path, official())
    folder = make(tmp_path / "data", small)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if not path.name.startswith(".")}
    assert found == {*(f"ImageSets/Main/{name}.txt" for name in ("train", "val", "trainval", "test")),
                     *(f"{kind}/00000{n}.{suffix}" for n in (1, 2, 3)
                       for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")))}
    assert (folder / "ImageSets/Main/trainval.txt").read_text() == "000001\n000002\n"
    expected = ANNOTATION.format(125, 179, 185, 270, 1, 1, 300, 448).replace(">335<", ">300<").replace(">500<", ">448<")
    for number in (1, 2, 3):
        assert (folder / f"Annotations/00000{number}.xml").read_text() == expected
        with Image.open(folder / f"JPEGImages/00000{number}.jpg") as image:
            assert (image.size, image.mode) == ((300, 448), "RGB")
    with Image.open(io.BytesIO(jpeg())) as image:
        expected_image = io.BytesIO()
        image.resize((300, 448), Image.Resampling.BICUBIC).save(expected_image, "JPEG", quality=85, optimize=True)
    assert (folder / "JPEGImages/000001.jpg").read_bytes() == expected_image.getvalue()


def test_a_second_call_does_nothing_and_damage_is_repaired(tmp_path: Path, small_lists: None) -> None:
    small = archive(tmp_path, official())
    folder = make(tmp_path / "data", small)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make(tmp_path / "data", small)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    content = (folder / "JPEGImages/000003.jpg").read_bytes()
    (folder / "JPEGImages/000003.jpg").unlink()
    make(tmp_path / "data", small)
    assert (folder / "JPEGImages/000003.jpg").read_bytes() == content


def test_the_whole_archive_is_another_data_set(tmp_path: Path, small_lists: None) -> None:
    """Neither is taken for the other, and neither goes over the other."""
    small = archive(tmp_path, official())
    whole = replace(small, mini=False)
    for name, first, second, words in (("a", whole, small, "VOC2007 made small"), ("b", small, whole, "VOC2007:")):
        folder = make(tmp_path / name, first)
        before = {path: path.read_bytes() for path in folder.rglob("*.*")}
        with pytest.raises(DataError, match=f"differ from the official {words}"):
            make(tmp_path / name, second)
        assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
        assert not is_extracted(second, tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [
    ("JPEGImages/000002.jpg", None), ("JPEGImages/000002.jpg", b"no image"), ("Annotations/000002.xml", b"<annotation"),
    ("Annotations/000002.xml", b"<annotation></annotation>"),
    ("Annotations/000002.xml", ANNOTATION.format(*WHOLE, "", 1, 2, 3).encode()),
])  # fmt: skip
def test_an_archive_that_it_cannot_be_made_from(
    tmp_path: Path, small_lists: None, name: str, content: bytes | None
) -> None:
    files = official()
    files.pop(name)
    small = archive(tmp_path, files if content is None else files | {name: content})
    with pytest.raises(DataError, match="image 000002 of voc07-mini cannot be made from the archive") as caught:
        make(tmp_path / "data", small)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / FOLDER).exists()
    assert not list((tmp_path / "data").glob("*.extracting"))


def test_lists() -> None:
    found = lists()
    assert {name: len(members) for name, members in found.items()} == {
        "train": 827, "val": 273, "test": 500, "trainval": 1100}
    assert all(members == sorted(set(members)) for members in found.values())
    assert len(ids()) == 1600
    assert found["test"][:3] == ["000002", "000018", "000029"]
    assert VOC07_MINI[0].checksum == VOC07[1].checksum
