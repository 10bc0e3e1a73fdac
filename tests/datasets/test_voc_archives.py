import dataclasses
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from altopt.datasets import download, voc_archives
from altopt.datasets.download import exclusive
from altopt.datasets.voc_archives import VOC07, VOC12, Archive, is_extracted, obtain, read_manifest
from altopt.errors import BusyError, DataError, DownloadError, ResourceError, UsageError

FOLDER = "VOCdevkit/VOC2007"
TRAINVAL_FILES = {
    f"{FOLDER}/Annotations/000005.xml": b"<annotation>5</annotation>",
    f"{FOLDER}/Annotations/000007.xml": b"<annotation>7</annotation>",
    f"{FOLDER}/ImageSets/Main/trainval.txt": b"000005\n000007\n",
    f"{FOLDER}/ImageSets/Main/aeroplane_trainval.txt": b"000005 -1\n000007 -1\n",
    f"{FOLDER}/JPEGImages/000005.jpg": b"\xff\xd8five",
    f"{FOLDER}/JPEGImages/000007.jpg": b"\xff\xd8seven",
}
TEST_FILES = {
    f"{FOLDER}/Annotations/000001.xml": b"<annotation>1</annotation>",
    f"{FOLDER}/ImageSets/Main/test.txt": b"000001\n",
    f"{FOLDER}/JPEGImages/000001.jpg": b"\xff\xd8one",
}
UNWANTED = {
    f"{FOLDER}/ImageSets/Layout/trainval.txt": b"layout",
    f"{FOLDER}/ImageSets/Main/deeper/trainval.txt": b"deeper",
    f"{FOLDER}/SegmentationClass/000007.png": b"classes",
    f"{FOLDER}/Annotations/000009.xml.exe": b"program",
    f"{FOLDER}/JPEGImages/../../../escaped.jpg": b"escaped",
    f"{FOLDER}/JPEGImages/..jpg": b"dots",
    f"/{FOLDER}/JPEGImages/000010.jpg": b"absolute",
    f"elsewhere/{FOLDER}/JPEGImages/000011.jpg": b"elsewhere",
    "VOCdevkit/VOC2012/JPEGImages/000012.jpg": b"another year",
}


class Requests(SimpleHTTPRequestHandler):
    """A plain file server (without byte ranges) that notes what it is asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def asked() -> Iterator[list[str]]:
    Requests.asked = []
    yield Requests.asked
    del Requests.asked


@pytest.fixture
def server(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the folder ``tmp_path/server``; yield its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "server").mkdir()
    handler = partial(Requests, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    tar.addfile(member, io.BytesIO(content))


def make(path: Path, files: Mapping[str, bytes], base: str = "http://127.0.0.1:9/") -> Archive:
    """Write a tar file as the official ones are: folders first, and much that detection does not need."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "VOCdevkit", type=tarfile.DIRTYPE, mode=0o755)
        add(tar, f"{FOLDER}/JPEGImages", type=tarfile.DIRTYPE, mode=0o000)
        for name, content in {**UNWANTED, **files}.items():
            add(tar, name, content, mode=0o444)
        add(tar, f"{FOLDER}/JPEGImages/000020.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, f"{FOLDER}/JPEGImages/000021.jpg", type=tarfile.LNKTYPE, linkname="VOCdevkit")
        add(tar, f"{FOLDER}/JPEGImages/000022.jpg", type=tarfile.FIFOTYPE)
        add(tar, f"{FOLDER}/JPEGImages/000023.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
    content = path.read_bytes()
    return Archive(path.name, len(content), sha256(content), (base + path.name,))


def make_both(folder: Path, base: str = "http://127.0.0.1:9/") -> tuple[Archive, Archive]:
    folder.mkdir(exist_ok=True)
    trainval = make(folder / "VOCtrainval.tar", TRAINVAL_FILES, base)
    return trainval, make(folder / "VOCtest.tar", TEST_FILES, base)


def content_of(root: Path) -> dict[str, bytes]:
    """Return every visible file below the devkit."""
    paths = (path for path in (root / "VOCdevkit").rglob("*") if not path.is_dir() and not path.name.startswith("."))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def changes(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_fetches_extracts_and_then_does_nothing(server: str, asked: list[str], tmp_path: Path) -> None:
    archives = make_both(tmp_path / "server", server)
    root, seen = tmp_path / "data", []
    for archive in archives:
        assert not is_extracted(archive, root)
    assert obtain(root, archives=archives, progress=lambda *step: seen.append(step)) == root / FOLDER
    assert content_of(root) == {**TRAINVAL_FILES, **TEST_FILES}
    assert sorted(path.name for path in root.iterdir()) == [
        ".voc2007.lock", "VOCdevkit", "VOCtest.tar", "VOCtrainval.tar",
    ]  # fmt: skip
    assert asked == ["/VOCtrainval.tar", "/VOCtest.tar"]
    total = archives[0].size + archives[1].size
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)

    before = changes(root)
    assert obtain(root, archives=archives) == root / FOLDER
    assert changes(root) == before
    assert len(asked) == 2


def test_mirrors_are_tried_first_with_or_without_a_slash(server: str, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "server").joinpath("voc").mkdir()
    archives = make_both(tmp_path / "server" / "voc", f"{server}official/")
    obtain(tmp_path / "data", archives=archives, mirrors=[f"{server}empty", f"{server}voc"])
    assert asked == [f"/{folder}/{name}.tar" for name in ("VOCtrainval", "VOCtest") for folder in ("empty", "voc")]
    assert content_of(tmp_path / "data") == {**TRAINVAL_FILES, **TEST_FILES}


def test_mirror_on_a_stick(tmp_path: Path) -> None:
    archives = make_both(tmp_path / "my stick")
    obtain(tmp_path / "data", archives=archives, mirrors=[(tmp_path / "my stick").as_uri()])
    assert content_of(tmp_path / "data") == {**TRAINVAL_FILES, **TEST_FILES}


def test_local_archives_under_any_name_and_in_any_order(tmp_path: Path) -> None:
    archives = make_both(tmp_path / "brought")
    files = [tmp_path / "brought" / "VOCtest.tar", tmp_path / "first.bin"]
    (tmp_path / "brought" / "VOCtrainval.tar").rename(files[1])
    obtain(tmp_path / "data", archives=archives, archive_files=files)
    assert content_of(tmp_path / "data") == {**TRAINVAL_FILES, **TEST_FILES}
    assert files[0].exists()
    assert files[1].exists()
    assert not list((tmp_path / "data").glob("*.tar"))


def test_archive_that_lies_in_the_folder_is_used(server: str, asked: list[str], tmp_path: Path) -> None:
    archives = make_both(tmp_path / "server", server)
    root = tmp_path / "data"
    root.mkdir()
    (root / "VOCtrainval.tar").write_bytes((tmp_path / "server" / "VOCtrainval.tar").read_bytes())
    (root / "VOCtest.tar").write_bytes(b"begun by another program")
    obtain(root, archives=archives)
    assert asked == ["/VOCtest.tar"]
    assert content_of(root) == {**TRAINVAL_FILES, **TEST_FILES}


def test_only_what_is_missing_is_fetched(server: str, asked: list[str], tmp_path: Path) -> None:
    archives = make_both(tmp_path / "server", server)
    obtain(tmp_path / "data", archives=archives[:1])
    obtain(tmp_path / "data", archives=archives)
    assert asked == ["/VOCtrainval.tar", "/VOCtest.tar"]


def test_wrong_local_archive_is_refused_before_anything_happens(tmp_path: Path) -> None:
    archives = make_both(tmp_path / "brought")
    wrong = tmp_path / "wrong.tar"
    wrong.write_bytes(b"x" * archives[0].size)
    for path, words in ((wrong, "is not an archive of"), (tmp_path / "none.tar", "cannot be read: No such file")):
        with pytest.raises(DataError) as caught:
            obtain(tmp_path / "data", archives=archives, archive_files=[tmp_path / "brought" / "VOCtest.tar", path])
        assert f"{path} {words}" in str(caught.value)
        assert not (tmp_path / "data" / "VOCdevkit").exists()
    with pytest.raises(DataError) as caught:
        obtain(tmp_path / "data", archives=archives, archive_files=[wrong])
    assert str(caught.value).endswith(f": bring {archives[0]} or {archives[1]}")


def test_offline_says_everything_that_is_to_be_brought(server: str, tmp_path: Path) -> None:
    trainval, test = make_both(tmp_path / "brought", f"{server}gone/")
    with pytest.raises(DownloadError) as caught:
        obtain(tmp_path / "data", archives=(trainval, test), mirrors=[f"{server}mine"])
    message = str(caught.value)
    assert "\n" not in message
    assert f"{server}mine/VOCtrainval.tar: HTTP 404" in message
    assert f"{server}gone/VOCtrainval.tar: HTTP 404" in message
    assert f"bring {trainval} and {test} with --archive FILE" in message
    assert trainval.checksum.removeprefix("sha256:") in message
    with pytest.raises(DownloadError, match=r"bring VOCtest\.tar") as caught:
        obtain(tmp_path / "data", archives=(trainval, test), archive_files=[tmp_path / "brought" / "VOCtrainval.tar"])
    assert "bring VOCtrainval" not in str(caught.value)
    (tmp_path / "server" / "gone").mkdir()
    (tmp_path / "brought" / "VOCtrainval.tar").rename(tmp_path / "server" / "gone" / "VOCtrainval.tar")
    with pytest.raises(DownloadError, match=r"bring VOCtest\.tar"):
        obtain(tmp_path / "data", archives=(trainval, test))


def test_half_done_extraction_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = make_both(tmp_path / "brought")
    options: dict[str, Any] = {"archives": archives, "archive_files": sorted((tmp_path / "brought").iterdir())}
    root = tmp_path / "data"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(voc_archives.json, "dumps", killed)  # what the marker is made with, last of all
        with pytest.raises(KeyboardInterrupt):
            obtain(root, **options)
    assert content_of(root) == TRAINVAL_FILES
    assert not is_extracted(archives[0], root)
    # What a power cut may leave behind: a file without its content, and the folder of an unfinished extraction.
    (root / FOLDER / "Annotations/000005.xml").write_bytes(b"")
    leftover = root / ".VOCtrainval.tar.extracting" / FOLDER / "JPEGImages"
    leftover.mkdir(parents=True)
    (leftover / "000007.jpg").write_bytes(b"torn")
    obtain(root, **options)
    assert content_of(root) == {**TRAINVAL_FILES, **TEST_FILES}
    assert not list(root.glob("*.extracting"))


@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_damage_after_extraction_is_repaired(tmp_path: Path, damage: str) -> None:
    archives = make_both(tmp_path / "brought")
    options: dict[str, Any] = {"archives": archives, "archive_files": sorted((tmp_path / "brought").iterdir())}
    obtain(tmp_path / "data", **options)
    before = changes(tmp_path / "data" / FOLDER / "Annotations")
    image = tmp_path / "data" / FOLDER / "JPEGImages/000001.jpg"
    if damage == "removed":
        image.unlink()
    else:
        image.write_bytes(b"")
    obtain(tmp_path / "data", **options)
    assert content_of(tmp_path / "data") == {**TRAINVAL_FILES, **TEST_FILES}
    assert changes(tmp_path / "data" / FOLDER / "Annotations") == before


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"sha256": 1}', '{"files": {"VOCdevkit": "x"}}'])
def test_unreadable_marker_counts_for_nothing(tmp_path: Path, content: str) -> None:
    archives = make_both(tmp_path / "brought")
    obtain(tmp_path / "data", archives=archives, archive_files=sorted((tmp_path / "brought").iterdir()))
    (tmp_path / "data" / FOLDER / ".VOCtest.tar.json").write_text(content)
    assert [is_extracted(archive, tmp_path / "data") for archive in archives] == [True, False]


@pytest.mark.parametrize("key", ["sha256", "members"])
def test_marker_of_another_archive_or_rule_counts_for_nothing(tmp_path: Path, key: str) -> None:
    archives = make_both(tmp_path / "brought")
    obtain(tmp_path / "data", archives=archives, archive_files=sorted((tmp_path / "brought").iterdir()))
    path = tmp_path / "data" / FOLDER / ".VOCtest.tar.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "another"}))
    assert [is_extracted(archive, tmp_path / "data") for archive in archives] == [True, False]


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    archives = make_both(tmp_path / "brought")
    mine = tmp_path / "data" / FOLDER / "Annotations/000007.xml"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"<annotation>mine</annotation>")
    with pytest.raises(DataError, match=r"000007\.xml and 0 other files differ from the official VOC2007: move"):
        obtain(tmp_path / "data", archives=archives, archive_files=sorted((tmp_path / "brought").iterdir()))
    assert content_of(tmp_path / "data") == {f"{FOLDER}/Annotations/000007.xml": b"<annotation>mine</annotation>"}
    assert not list((tmp_path / "data").glob("*.extracting"))


@pytest.mark.parametrize("content", [b"no tar at all", b""])
def test_archive_that_is_no_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.tar"
    path.write_bytes(content)
    archive = Archive("odd.tar", len(content), sha256(content), ())
    with pytest.raises(DataError, match=r"odd\.tar is not a whole tar archive"):
        obtain(tmp_path / "data", archives=[archive], archive_files=[path])


def test_archive_that_is_cut_or_holds_nothing_expected(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    make(path, {f"{FOLDER}/JPEGImages/1.jpg": bytes(90_000)})
    content = path.read_bytes()[:50_000]
    path.write_bytes(content)
    cut = Archive("cut.tar", len(content), sha256(content), ())
    with pytest.raises(DataError, match=r"cut\.tar is not a whole tar archive"):
        obtain(tmp_path / "data", archives=[cut], archive_files=[path])
    nothing = make(tmp_path / "nothing.tar", {})
    with pytest.raises(DataError, match=r"nothing\.tar holds no file that looks like VOCdevkit"):
        obtain(tmp_path / "data", archives=[nothing], archive_files=[tmp_path / "nothing.tar"])


def test_space_for_download_and_extraction_is_checked_first(
    server: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = make_both(tmp_path / "server", server)
    root = tmp_path / "data"
    root.mkdir()
    (root / "VOCtest.tar.part").write_bytes((tmp_path / "server" / "VOCtest.tar").read_bytes()[:1000])
    needed = 2 * (archives[0].size + archives[1].size) - 1000
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    with pytest.raises(ResourceError, match=f"VOC2007 needs .* MB in {root}, which has .* MB free: make room"):
        obtain(root, archives=archives)
    assert asked == []
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    obtain(root, archives=archives)
    assert content_of(root) == {**TRAINVAL_FILES, **TEST_FILES}


def test_archives_that_lie_in_the_folder_need_space_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = make_both(tmp_path / "data")
    usage = download.shutil.disk_usage(tmp_path)._replace(free=archives[0].size + archives[1].size)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    obtain(tmp_path / "data", archives=archives)
    assert content_of(tmp_path / "data") == {**TRAINVAL_FILES, **TEST_FILES}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    archives = make_both(tmp_path / "brought")
    (tmp_path / "data").mkdir()
    with exclusive(tmp_path / "data" / ".voc2007.lock"), pytest.raises(BusyError, match="is in use by another process"):
        obtain(tmp_path / "data", archives=archives)


def test_official_archives() -> None:
    assert [(archive.name, archive.size, archive.checksum) for archive in VOC07] == [
        (
            "VOCtrainval_06-Nov-2007.tar",
            460_032_000,
            "sha256:7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
        ),
        (
            "VOCtest_06-Nov-2007.tar",
            451_020_800,
            "sha256:6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
        ),
    ]
    for archive in VOC07:
        assert len(set(archive.urls)) == len(archive.urls) >= 3
        assert all(url.startswith(("https://", "http://")) and url.endswith("/" + archive.name) for url in archive.urls)


def test_voc_2012_is_known_by_torchvisions_md5() -> None:
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    archive, = VOC12
    theirs = DATASET_YEAR_DICT["2012"]
    assert (archive.name, archive.checksum) == (theirs["filename"], f"md5:{theirs['md5']}")
    assert archive.size == 1_999_639_040
    assert (archive.urls[0], archive.folder) == (theirs["url"], theirs["base_dir"])


def test_voc_2012_comes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "VOC2012.tar"
    files = {name.replace("VOC2007", "VOC2012"): content for name, content in TRAINVAL_FILES.items()}
    content = make(path, files).checksum  # of SHA-256; below it is known by MD5, as the official one is
    archive = dataclasses.replace(VOC12[0], size=path.stat().st_size,
                                  checksum=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")
    wrong = dataclasses.replace(archive, checksum=f"md5:{content[7:39]}")
    with pytest.raises(DataError, match=r"is not an archive of VOC2012 \(it has [0-9]+ bytes, MD5 [0-9a-f]{32}\)"):
        obtain(tmp_path / "data", archives=[wrong], archive_files=[path])
    assert obtain(tmp_path / "data", archives=[archive], archive_files=[path]) == tmp_path / "data/VOCdevkit/VOC2012"
    assert content_of(tmp_path / "data").keys() == {*files, "VOCdevkit/VOC2012/JPEGImages/000012.jpg"}
    assert is_extracted(archive, tmp_path / "data")


def entry(name: str = "a.tar", size: object = 5, sha256: str = "0" * 64, rest: str = "") -> str:
    return f'[[archive]]\nname = "{name}"\nsize = {size}\nsha256 = "{sha256}"\n{rest}'


def test_manifest_names_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(entry() + entry("b.tar", 7, "f" * 64))
    assert read_manifest(path) == (Archive("a.tar", 5, "sha256:" + "0" * 64, ()),
                                   Archive("b.tar", 7, "sha256:" + "f" * 64, ()))


@pytest.mark.parametrize(("text", "words"), [
    ("", "names no archive"),
    (entry() + entry(), "one twice"),
    ("archive = 3", "is not a manifest"),
    (entry("../a.tar"), "is not a manifest"),
    (entry("..", rest="urls = []"), "is not a manifest"),
    (entry(size=0), "is not a manifest"),
    (entry(size="true"), "is not a manifest"),
    (entry(size='"5"'), "is not a manifest"),
    (entry(sha256="f" * 63), "is not a manifest"),
    (entry(rest="members = 'x'"), "is not a manifest"),
    ('[[archive]]\nname = "a.tar"\n', "is not a manifest"),
    ("[[archive", "cannot be read"),
])  # fmt: skip
def test_manifest_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
