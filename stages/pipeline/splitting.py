"""Lists for a data set that has none: which images train a network and which test it, drawn class by class."""
# An image's place in the draw depends on the seed and its id alone, so that a new image moves few others.

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from altopt.datasets.finding import FoundData, look_for_data
from altopt.datasets.on_disk import OnDiskDataset, is_text
from altopt.datasets.yolo import YAMLS
from altopt.errors import DataError, UsageError
from cache.files import sha256_file, write_text_atomic

NO_OBJECTS = ""  # what stands for a class where an image has none


class Part(TypedDict):
    """A list that was written; images and objects by class."""

    file: str
    images: int
    objects: int
    classes: dict[str, dict[str, int]]


class Splitting(TypedDict):
    """What was written, and the command to go on with, where the lists lie where the format has them."""

    data: str
    files: list[str]
    lists: dict[str, Part]
    go_on: str | None


@dataclass(frozen=True)
class _Image:
    """An image, the classes of its objects, and its place in the draw."""

    ids: tuple[str, ...]  # several where they have equal bytes, which are not to be parted
    classes: frozenset[str]
    place: str


def split_data(root: Path, *, test: float, val: float, seed: int, out: Path | None = None) -> Splitting:
    """Write lists of the images in a folder that nobody has split yet, by default where its format has them.

    ``test`` and ``val`` are shares of the images. Raises ``UsageError`` for shares that leave none to train on, for a
    data set that is split already, and where a file is in the way; then nothing is written.
    """
    if not (0 < test < 1 and 0 <= val < 1 and test + val < 1):
        raise UsageError(f"--test {test:g} and --val {val:g} must be shares that leave some images to train on: give a "
                         "test share above 0, and both below 1 together")
    found = look_for_data(root)
    if found.whole is None:
        raise UsageError(f"{root} is split already ({found.words}): take its lists away first, or name other splits in "
                         "data.train and data.test")
    dataset = found.open_whole()
    paths = {image_id: _path(dataset, image_id) for image_id in dataset.ids}
    shares = {"test": test} | ({"val": val} if val else {})
    lists = draw(_images(dataset, paths, seed), shares)
    if empty := [name for name, ids in lists.items() if not ids]:
        raise DataError(f"the list {empty[0]} would be empty, of {len(paths)} image{'s'[: len(paths) != 1]} in {root}, "
                        "those of equal bytes taken together: add images, or raise its share")
    files = _files(found, dataset, paths, lists, out)
    for path in files:
        if path.exists():
            raise UsageError(f"{path} is there already, and no file is written over: take it away, or write the lists "
                             "elsewhere with --out")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    return {"data": f"{root}: {found.words}", "files": [str(path) for path in files],
            "lists": {name: _part(dataset, ids, path) for (name, ids), path in zip(lists.items(), files, strict=False)},
            "go_on": f"altopt run-all --recipe photos --data-root {root}" if out is None else None}


def draw(images: Sequence[_Image], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Return {list: ids}, "train" and those of ``shares``: of each class, the rarest first, its share goes to each.

    A class with two images or more has one in each list, as far as they go.
    """
    lists: dict[str, list[_Image]] = {name: [] for name in ("train", *shares)}
    by_class: dict[str, list[_Image]] = defaultdict(list)
    for image in images:
        for name in image.classes or {NO_OBJECTS}:
            by_class[name].append(image)
    given: set[str] = set()  # places
    for name, members in sorted(by_class.items(), key=lambda item: (item[0] == NO_OBJECTS, len(item[1]), item[0])):
        left = sorted((image for image in members if image.place not in given), key=lambda image: image.place)
        total = sum(len(image.ids) for image in members)
        for target, share in shares.items():
            has = sum(len(image.ids) for image in lists[target] if name in (image.classes or {NO_OBJECTS}))
            wanted = max(round(share * total), 1) if name != NO_OBJECTS else round(share * total)
            trained = any(name in image.classes for image in lists["train"])
            while left and has < wanted and (len(left) > 1 or trained or name == NO_OBJECTS):
                image = left.pop(0)
                lists[target].append(image)
                has += len(image.ids)
        lists["train"] += left
        given |= {image.place for image in members}
    return {name: sorted(id for image in chosen for id in image.ids) for name, chosen in lists.items()}


def _path(dataset: OnDiskDataset, image_id: str) -> Path:
    """Return where an image lies; DataError when it is missing, or its name cannot stand in a list."""
    path = dataset.path(image_id)
    if not path.is_file():
        raise DataError(f"{path} is missing: bring the image")
    if dataset.kind != "coco" and not (image_id.strip() == image_id and len(image_id.splitlines()) == 1
                                       and is_text(image_id)):
        raise DataError(f"the name of the image {str(path)!r} cannot stand in a list: rename it")
    return path


def _images(dataset: OnDiskDataset, paths: Mapping[str, Path], seed: int) -> list[_Image]:
    """Return the images, those of equal bytes as one."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for image_id in dataset.ids:
        by_size[paths[image_id].stat().st_size].append(image_id)
    groups: list[list[str]] = []
    for ids in by_size.values():
        same: dict[str, list[str]] = defaultdict(list)
        for image_id in ids:  # what is alone of its length needs no hash
            same[sha256_file(paths[image_id]) if len(ids) > 1 else ""].append(image_id)
        groups += same.values()
    names = dataset.classes
    return [_Image(tuple(group), frozenset(names[label] for image_id in group for label in
                                           dataset.objects(image_id).labels.tolist()),
                   min(hashlib.sha256(f"{seed} {image_id}".encode()).hexdigest() for image_id in group))
            for group in groups]


def _files(found: FoundData, dataset: OnDiskDataset, paths: Mapping[str, Path], lists: Mapping[str, list[str]],
           out: Path | None) -> dict[Path, str]:
    """Return the text of each file to write: a list each, in their order, and what the format has beside them."""
    folder = found.root / found.lists if out is None else out
    if found.format == "coco":
        assert found.whole is not None
        if out is None and found.lists not in (Path(), Path("annotations")):  # a folder of images has no other file
            folder = found.root / "annotations"
        content = json.loads((found.root / found.whole.partition(":")[0]).read_bytes())
        return {folder / f"instances_{name}.json": _part_of_coco(content, set(ids))
                for name, ids in lists.items()}
    if found.format == "voc":
        return {folder / f"{name}.txt": _lines(ids) for name, ids in lists.items()}
    files = {folder / f"{name}.txt": _lines([paths[id].relative_to(found.root).as_posix() for id in ids])
             for name, ids in lists.items()}
    if out is None and not any((found.root / name).exists() for name in YAMLS):
        import yaml

        splits = {name: f"{name}.txt" for name in lists}
        files[found.root / YAMLS[0]] = yaml.safe_dump({
            **splits, "val": splits.get("val", splits["test"]), "names": list(dataset.classes)}, sort_keys=False,
            allow_unicode=True)
    return files


def _part_of_coco(content: dict[str, list[dict[str, object]]], ids: set[str]) -> str:
    images = [image for image in content["images"] if str(image["id"]) in ids]
    annotations = [each for each in content.get("annotations", []) if str(each.get("image_id")) in ids]
    return json.dumps(content | {"images": images, "annotations": annotations})


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _part(dataset: OnDiskDataset, ids: Sequence[str], path: Path) -> Part:
    objects: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for image_id in ids:
        names = [dataset.classes[label] for label in dataset.objects(image_id).labels.tolist()]
        objects.update(names)
        images.update(set(names))
    return {"file": str(path), "images": len(ids), "objects": objects.total(),
            "classes": {name: {"images": images[name], "objects": objects[name]} for name in dataset.classes}}


def split_lines(result: Splitting) -> str:
    """Return what was written as lines for a person."""
    lines = [result["data"]]
    for name, part in result["lists"].items():
        counts = ", ".join(f"{each} {count['objects']} on {count['images']}" for each, count in part["classes"].items())
        images, objects = part["images"], part["objects"]
        lines.append(f"{name}: {images} image{'s'[: images != 1]}, {objects} object{'s'[: objects != 1]} ({counts})")
    lines += [f"wrote {file}" for file in result["files"]]
    lines.append(f"Go on with: {result['go_on']}" if result["go_on"] else
                 "Go on by moving them to where the format has its lists, or name them in data.train and data.test")
    return "\n".join(lines)
