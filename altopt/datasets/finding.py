"""What data set lies in a folder: its format and its splits, found by looking."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from altopt.datasets.checking import some
from altopt.datasets.coco import ROBOFLOW
from altopt.datasets.dataset import IMAGE_SUFFIXES, DataConfig, Format
from altopt.datasets.on_disk import OnDiskDataset
from altopt.datasets.opening import open_dataset
from altopt.datasets.voc import LISTS, VOC_CLASSES, layout, parse_annotation
from altopt.datasets.yolo import IMAGES, find_yaml, image_names, images_of, labels_of, locate, read_yaml
from altopt.errors import DataError

# What splits are called, in other people's folders too.
TRAIN, VAL, TEST = ("trainval", "train", "training"), ("val", "valid", "validation"), ("test", "testing")
LOOKED_FOR = (
    "lists of VOC (ImageSets/Main/train.txt, also in VOCdevkit/VOC2007), images with xml files beside them or in "
    "Annotations, YOLO's labels (data.yaml, or images and labels), COCO's json files (annotations/*.json, or "
    f"{ROBOFLOW} in train, valid and test)")
_PEEKED, _SEARCHED = 2**16, 2**22  # bytes of a json file: at each end, and in which the first image is named


@dataclass(frozen=True)
class FoundData:
    """A data set that was found in a folder, and ``words`` on what it is.

    ``data`` is how a recipe spells it; None where nothing says which images are for testing. ``validation`` is the
    split for validation where there is one for testing besides.

    ``whole`` is the split of all images where they are one set that is not split yet. Lists that split it go to the
    folder ``lists``, from the root; ``spelled`` is what stands before and behind the name of such a list in a recipe.
    """

    root: Path
    format: Format
    words: str
    data: DataConfig | None = None
    validation: tuple[str, ...] = ()
    whole: str | None = None
    lists: Path = Path()
    spelled: tuple[str, str] = ("", "")

    def config(self, train: str, test: str, classes: tuple[str, ...] = ()) -> DataConfig:
        """Return how a recipe spells two splits of it."""
        return DataConfig(format=self.format, train=(train,), test=(test,), classes=classes)

    def split_called(self, name: str) -> str:
        """Return how a recipe spells the split of the list NAME.txt (of "coco" NAME.json) in ``lists``."""
        return name.join(self.spelled)

    def open_whole(self) -> OnDiskDataset:
        """Return the data set of all images that are not split yet: their ids, files and objects."""
        assert self.whole is not None
        dataset = open_dataset(self.config(self.whole, self.whole), "train", self.root)
        assert isinstance(dataset, OnDiskDataset)
        return dataset


def find_data(root: Path) -> FoundData:
    """Return the data set that a folder holds, with a training and a test split.

    DataError for a folder without data, which says what was looked for, and for data without splits, which names the
    command that makes them.
    """
    found = look_for_data(root)
    if found.data is None:
        raise DataError(f"{root} holds {found.words}, and nothing says which images are for testing: make lists with "
                        f"altopt split --data-root {root}, or name the splits in data.train and data.test")
    return found


def look_for_data(root: Path) -> FoundData:
    """Return the data set that a folder holds, be it split or not; DataError for a folder without one."""
    if not root.is_dir():
        raise DataError(f"the data root {root} is not a folder: give the data set's with --data-root")
    unsplit: FoundData | None = None
    for look in (_voc_years, _voc_lists, _coco, _yolo, _voc_folders):
        found = look(root)
        if found is not None and found.data is not None:
            return found
        unsplit = unsplit or found
    if unsplit is not None:
        return unsplit
    names = sorted(path.name for path in root.iterdir())
    raise DataError(f"{root} holds no data set that altopt knows: looked for were {LOOKED_FOR}; there are "
                    f"{some(names, 8) or 'no files'}: give the data set's own folder with --data-root")


def _paired(names: Iterable[str]) -> tuple[str | None, str | None, str | None]:
    """Return which of the names are for training, testing, and for validation besides."""
    by_name = {name.casefold(): name for name in names}

    def first(words: tuple[str, ...]) -> str | None:
        return next((by_name[word] for word in words if word in by_name), None)

    val, test = first(VAL), first(TEST)
    # trainval holds val, which then is not for testing.
    train = first(TRAIN if test or not val else TRAIN[1:]) or first(TRAIN)
    return train, test or val, val if test and val and train != TRAIN[0] else None


def _with_splits(found: FoundData, names: Iterable[str], spell: Callable[[str], str]) -> FoundData | None:
    """Return what was found with those of the splits that are called so; None if none is for training."""
    train, test, val = _paired(names)
    if train is None:
        return None
    if test is None:
        return replace(found, words=f"{found.words}, with {train} alone")
    besides = f", {val} besides" if val else ""
    return replace(found, data=found.config(spell(train), spell(test)), validation=(spell(val),) if val else (),
                   words=f"{found.words}: {train} to train, {test} to test{besides}", whole=None)


def _voc_years(root: Path) -> FoundData | None:
    years: dict[str, Path] = {}
    for base in (root / "VOCdevkit", root):
        for folder in sorted(base.glob("VOC[0-9][0-9][0-9][0-9]")):
            years.setdefault(folder.name.removeprefix("VOC"), folder)
    if not years and re.fullmatch(r"VOC\d{4}", root.resolve().name):
        years[root.resolve().name.removeprefix("VOC")] = root
    lists = {year: _list_names(folder) for year, folder in years.items()}
    train = tuple(f"{year}_{name}" for year, names in lists.items() if (name := _paired(names)[0]))
    # A year without a test list (2012) is all trained on where another one has it; its val is in its trainval.
    tests = (tuple(f"{year}_test" for year, names in lists.items() if "test" in names)
             or tuple(f"{year}_{name}" for year, names in lists.items() if (name := _paired(names)[1])))
    folders = {year: folder.relative_to(root).as_posix() for year, folder in years.items()}
    words = f"VOC in {' and '.join(folders.values())}"
    if train and tests:
        data = DataConfig(format="voc", train=train, test=tests)
        return FoundData(root, "voc", f"{words}: {', '.join(train)} to train, {', '.join(tests)} to test",
                         replace(data, classes=_own_classes(root, data)))
    if len(years) == 1 and _has_xml(root, next(iter(years.values()))):
        inner = next(iter(folders.values()))
        return FoundData(root, "voc", words, whole=f"{inner}/", lists=Path(inner) / LISTS, spelled=(f"{inner}/", ""))
    return None


def _own_classes(root: Path, data: DataConfig) -> tuple[str, ...]:
    """Return the classes of a data set that lies in the place of a VOC year, if none of them is VOC's."""
    names: set[str] = set()
    try:
        for path in (path for path in open_dataset(data, "train", root).files() if path.suffix.lower() == ".xml"):
            names.update(obj.name for obj in parse_annotation(path).objects)
            if names & set(VOC_CLASSES):
                return ()
    except DataError:
        return ()  # the check will say what is wrong
    return tuple(sorted(names - {""}))


def _voc_lists(root: Path) -> FoundData | None:
    found = FoundData(root, "voc", "VOC with lists", whole="./", lists=LISTS)
    return _with_splits(found, _list_names(root), str)


def _list_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / LISTS).glob("*.txt"))


def _coco(root: Path) -> FoundData | None:
    exported = {folder.name: f"{folder.name}/{ROBOFLOW}:{folder.name}" for folder in _folders(root)
                if (folder / ROBOFLOW).is_file()}
    # One folder alone may have been split by lists since.
    splits = exported if len(exported) > 1 else _coco_files(root) or exported
    if not splits:
        return None
    # train2017 and custom_train are called train.
    named = {re.sub(r"[_-]?\d{4}$", "", name).rpartition("_")[2]: name for name in splits}
    found = FoundData(root, "coco", f"COCO in {some([split.partition(':')[0] for split in splits.values()])}")
    if len(splits) == 1:
        file, _, folder = (whole := next(iter(splits.values()))).partition(":")
        lists = Path(file).parent
        start = "" if lists == Path() else f"{lists.as_posix()}/"
        found = replace(found, whole=whole, lists=lists, spelled=(start, f".json:{folder}"))
    return _with_splits(found, named, lambda name: splits[named[name]]) or found


def _coco_files(root: Path) -> dict[str, str]:
    """Return the splits of COCO's json files in annotations and in the root, by what they are called."""
    files = [path for base in (root / "annotations", root) for path in sorted(base.glob("*.json")) if _is_coco(path)]
    files = [path for path in files if path.stem.startswith("instances")] or files  # not captions, not keypoints
    names = {path.stem.removeprefix("instances_"): path for path in files}
    return {name: f"{path.relative_to(root).as_posix()}{_coco_images(root, path, name)}"
            for name, path in names.items()}


def _is_coco(path: Path) -> bool:
    """Return whether a json file may be one of instances, by what stands at its ends."""
    with path.open("rb") as file:
        text = file.read(_PEEKED)
        file.seek(max(0, file.seek(0, 2) - _PEEKED))
        text += file.read()
    return b'"images"' in text and (b'"annotations"' in text or b'"categories"' in text)


def _coco_images(root: Path, path: Path, name: str) -> str:
    """Return, as it stands in a split, the folder that a json file's first image lies in; nothing for the root."""
    with path.open("rb") as file:
        first = re.search(rb'"file_name"\s*:\s*"([^"\\]+)"', file.read(_SEARCHED))
    image = first[1].decode("utf-8", "replace") if first else ""
    likely = [name, f"images/{name}", "images"]
    bases = [*likely, "", *(folder.name for folder in _folders(root)),
             *(f"images/{folder.name}" for folder in _folders(root / "images"))]
    chosen = next((base for base in bases if image and (root / base / image).is_file()), None)
    if chosen is None:
        chosen = next((base for base in likely if (root / base).is_dir()), "")
    return f":{chosen}" if chosen else ""


def _yolo(root: Path) -> FoundData | None:
    found = FoundData(root, "yolo", "images with YOLO's labels", spelled=("", ".txt"))
    listed = _with_splits(found, [path.stem for path in sorted(root.glob("*.txt"))], "{}.txt".format)
    listed = listed if listed is not None and listed.data is not None and _has_labels(root, root) else None
    unsplit: FoundData | None = None
    if (file := find_yaml(root)) is not None:
        places = {key: place for key, paths in read_yaml(file).splits.items() if (place := _located(root, file, paths))}
        train, test, _ = _paired(places)
        if train and test and places[train] == places[test]:  # so examples have it that are made to be learnt by heart
            places = {train: places[train]}
        of_yaml = replace(found, words=f"YOLO as {file.name} has it", whole=f"{file.name}:{train}")
        unsplit = _with_splits(of_yaml, places, lambda key: f"{file.name}:{key}")
        if unsplit is not None and unsplit.data is not None:
            return unsplit
        if named := read_yaml(file).splits.keys() - places.keys() - set(TEST):
            found = replace(found, words=f"{found.words} (the {' and '.join(sorted(named))} that {file.name} names is "
                            "not there)")
    for before, behind, base in (("images/", "", root / IMAGES), ("", f"/{IMAGES}", root), ("", "", root)):
        names = [folder.name for folder in _folders(base) if _has_labels(root, root / f"{before}{folder.name}{behind}")]
        whole = f"{before}{names[0]}{behind}" if len(names) == 1 else None
        split = _with_splits(replace(found, whole=whole), names, f"{before}{{}}{behind}".format)
        if split is not None and split.data is not None:
            return split
        unsplit = unsplit or split
    if listed is not None:
        return replace(listed, whole=None)
    if unsplit is not None:
        return unsplit
    return replace(found, whole="./") if _has_labels(root, root) else None


def _located(root: Path, file: Path, paths: list[str]) -> list[Path]:
    try:
        return [locate(root, file, path) for path in paths]
    except DataError:
        return []  # Roboflow names a test split whether or not there is one


def _has_labels(root: Path, folder: Path) -> bool:
    """Return whether a folder of images has a label file of YOLO's."""
    images = images_of(folder)
    if not images.is_dir():
        return False
    labels = labels_of(images, root)
    return any((labels / Path(name).with_suffix(".txt")).is_file() for name in image_names(images))


def _voc_folders(root: Path) -> FoundData | None:
    found = FoundData(root, "voc", "images with xml files")
    unsplit = replace(found, whole="./", lists=LISTS) if _has_xml(root, root) else None
    for before, base in (("", root), ("images/", root / "images"), ("JPEGImages/", root / "JPEGImages")):
        names = [folder.name for folder in _folders(base) if _has_xml(root, base / folder.name)]
        split = _with_splits(found, names, f"{before}{{}}/".format)
        if split is not None and split.data is not None:
            return split
        if len(names) == 1 and unsplit is None:
            whole = f"{before}{names[0]}/"
            unsplit = replace(found, words=f"images with xml files in {whole}", whole=whole, lists=Path(whole) / LISTS,
                              spelled=(whole, ""))
            listed = _with_splits(unsplit, _list_names(root / whole), unsplit.split_called)
            if listed is not None and listed.data is not None:
                return listed
    return unsplit


def _has_xml(root: Path, folder: Path) -> bool:
    """Return whether a folder holds an image with an XML file, as the format "voc" looks for them."""
    images, xml = layout(root, folder)
    stems = {path.stem for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    return any(path.stem in stems for path in xml.iterdir() if path.suffix.lower() == ".xml")


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
