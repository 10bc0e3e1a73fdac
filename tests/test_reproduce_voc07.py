"""``make reproduce-voc07`` itself, on a small VOC 2007 of the same structure, from a server on this machine."""

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from loopback import Handler, Server, serving
from PIL import Image, ImageDraw

from altopt.datasets.voc import VOC_CLASSES

ROOT = Path(__file__).parents[1]
FOLDER = "VOCdevkit/VOC2007"
WIDTH, HEIGHT = 96, 80
IMAGES = 10  # of each split, with two objects each: every class is in both

# The small network of the tests, a handful of iterations; everything else is as the recipe has it.
SMALL = {
    "network.name": "small", "network.short_side": 80, "network.max_side": 96, "network.anchor_scales": [1.5, 3],
    "network.rpn_channels": 8, "all.iterations": 4, "all.lr_steps": [3], "all.min_side": 4, "all.post_nms": 40,
    "all.proposals": 40,
}  # fmt: skip


def draw(number: int) -> tuple[bytes, str]:
    """Return an image with two objects as JPEG, and its annotation."""
    dice = random.Random(number)
    image = Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90))
    objects = ""
    for label in (2 * number % 20, (2 * number + 1) % 20):
        x, y, side = dice.randrange(1, 50), dice.randrange(1, 40), dice.randrange(24, 40)
        ImageDraw.Draw(image).rectangle((x - 1, y - 1, x + side - 1, y + side - 1), (12 * label, 250 - 12 * label, 0))
        objects += (f"<object><name>{VOC_CLASSES[label]}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin>"
                    f"<ymin>{y}</ymin><xmax>{x + side}</xmax><ymax>{y + side}</ymax></bndbox></object>")
    file = io.BytesIO()
    image.save(file, "JPEG")
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return file.getvalue(), f"<annotation>{size}{objects}</annotation>"


def archive(split: str, first: int) -> bytes:
    """Return a split as the tar file of its own that the official one is."""
    ids = [f"{number:06}" for number in range(first, first + IMAGES)]
    files = {f"{FOLDER}/ImageSets/Main/{split}.txt": "".join(f"{id}\n" for id in ids).encode(),
             f"{FOLDER}/ImageSets/Layout/{split}.txt": b"not for detection"}
    for id in ids:
        image, annotation = draw(int(id))
        files |= {f"{FOLDER}/JPEGImages/{id}.jpg": image, f"{FOLDER}/Annotations/{id}.xml": annotation.encode()}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


ARCHIVES = {"VOCtrainval.tar": archive("trainval", 0), "VOCtest.tar": archive("test", IMAGES)}


class Checkout:
    """A folder with the project's Makefile, whose .venv is this interpreter and this source tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "setup.cfg", "constraints.txt"):
            (folder / name).symlink_to(ROOT / name)
        altopt = folder / ".venv" / "bin" / "altopt"
        altopt.parent.mkdir(parents=True)
        altopt.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli "$@"\n')
        altopt.chmod(0o755)
        (folder / ".venv" / "installed").touch()

    def reproduce(self, fetching: str, running: str = "") -> subprocess.CompletedProcess[str]:
        outer = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # of ``make test``
        environment = outer | {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "LC_ALL": "C"}
        command = ["make", "reproduce-voc07", f"ARGS={fetching}", f"RUN_ARGS={running}"]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    manifest = "".join(f'[[archive]]\nname = "{name}"\nsize = {len(content)}\n'
                       f'sha256 = "{hashlib.sha256(content).hexdigest()}"\n' for name, content in ARCHIVES.items())
    (tmp_path / "small.toml").write_text(manifest)
    return Checkout(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def serve(server: Server, archives: dict[str, bytes]) -> str:
    """Serve the archives with byte ranges; return the options of fetch."""
    for name, content in archives.items():
        server.url(f"/{name}", partial(Handler.ranged, content=content))
    return f"--manifest small.toml --mirror {server.url('/')}"


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of altopt's with which a failed target ends, before make's own."""
    *_, line, last = done.stderr.splitlines()
    assert last.startswith("make: *** ")
    assert line.startswith("altopt: ")
    assert done.stderr.count("altopt: ") == 1
    assert "Traceback" not in done.stderr
    return f"{line} {last}"


def test_from_archives_to_the_table_beside_the_papers(checkout: Checkout, server: Server, finished: Path) -> None:
    content = ARCHIVES["VOCtrainval.tar"]
    half = len(content) // 2

    def break_off(handler: Handler) -> None:
        server.url("/VOCtrainval.tar", lambda handler: handler.answer(410, b""))
        handler.ranged(content, sent=half)

    options = serve(server, ARCHIVES)
    server.url("/VOCtrainval.tar", break_off)
    done = checkout.reproduce(options)
    assert done.returncode == 2
    line = complaint(done)
    assert "VOCtrainval.tar could not be fetched" in line
    assert "with --archive FILE, or name a server that has them with --mirror URL" in line
    assert "Error 7" in line
    assert (checkout.folder / "data" / "VOCtrainval.tar.part").stat().st_size == half
    assert not (checkout.folder / "runs").exists()

    serve(server, ARCHIVES)
    server.requests.clear()
    settings = " ".join(f"--set '{key}={value}'" for key, value in SMALL.items())
    running = f"--from M0={finished / 'M0.safetensors'} --device cpu {settings}"
    done = checkout.reproduce(options, running)
    assert done.returncode == 0, done.stderr
    assert server.requests == [("/VOCtrainval.tar", f"bytes={half}-"), ("/VOCtest.tar", None)]
    assert "accepted by small.toml, not by the official sizes and hashes" in done.stderr
    assert {path.name for path in (checkout.folder / "runs" / "voc07-vgg16").glob("[MPD]?.*")} >= {
        "M5.safetensors", "P2.h5", "D2.detections.json", "D5.detections.json"}
    table = [line.split() for line in done.stdout[done.stdout.rindex("class "):].splitlines()]
    assert [row[0] for row in table[1:]] == [*VOC_CLASSES, "mAP"]
    assert "paper, shared" in done.stdout
    own, published = table[-1][1:3], table[-1][3:]
    assert all(0 <= float(value) <= 100 for value in own)
    assert {"69.9", "68.5"} <= set(published)

    again = checkout.reproduce(options, running)
    assert again.returncode == 0
    assert "up to date: nothing to do" in again.stderr
    assert again.stdout[again.stdout.rindex("class "):] == done.stdout[done.stdout.rindex("class "):]
    assert len(server.requests) == 2


def test_another_archive_than_the_one_stated_ends_with_one_line(checkout: Checkout, server: Server) -> None:
    wrong = ARCHIVES["VOCtest.tar"]
    done = checkout.reproduce(serve(server, ARCHIVES | {"VOCtest.tar": wrong[:-1] + bytes([wrong[-1] ^ 1])}))
    assert done.returncode == 2
    line = complaint(done)
    assert "serves a file of the right size with another SHA-256" in line
    assert hashlib.sha256(wrong).hexdigest() in line
    assert "Error 7" in line
    assert not (checkout.folder / "data" / FOLDER).exists()


def test_without_a_manifest_only_the_official_archives_count(checkout: Checkout) -> None:
    (checkout.folder / "mine.tar").write_bytes(ARCHIVES["VOCtest.tar"])
    done = checkout.reproduce("--archive mine.tar --archive mine.tar")
    assert done.returncode == 2
    assert "mine.tar is not an archive of VOC2007" in complaint(done)
    assert "Error 3" in complaint(done)
