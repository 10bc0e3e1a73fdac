"""Open the data set that a recipe names. Nothing is parsed before it is asked for, and no other format is imported."""

from functools import lru_cache
from pathlib import Path
from typing import Literal

from altopt.datasets.dataset import DataConfig, Dataset
from altopt.errors import DataError, UsageError


def open_dataset(config: DataConfig, split: Literal["train", "test"], root: Path | None) -> Dataset:
    """Return the data set of one split; both splits have the same classes. ``root`` may be None for "shapes" only.

    UsageError when the config does not say enough, DataError when there is no such root.
    """
    _check_names(config, split)
    splits = config.train if split == "train" else config.test
    if config.format == "shapes":
        return _shapes(splits, config.width, config.height, config.seed)
    folder = _existing(root, config.format)
    if config.format == "voc":
        from altopt.datasets.voc import VocDataset

        voc = VocDataset(folder, config.train, classes=config.classes, invalid=config.invalid)
        if split == "train":
            return voc
        return VocDataset(folder, splits, classes=config.classes, invalid=config.invalid, train=voc)
    from altopt.datasets.coco import CocoDataset

    coco = CocoDataset(folder, config.train, classes=config.classes, invalid=config.invalid)
    if split == "train":
        return coco
    return CocoDataset(folder, splits, classes=config.classes, invalid=config.invalid, train=coco)


@lru_cache(maxsize=4)
def _shapes(splits: tuple[str, ...], width: int, height: int, seed: int) -> Dataset:
    """Return the same data set for the same images, so that the stages of a run draw them once, not once each."""
    from altopt.datasets.shapes import ShapesDataset

    return ShapesDataset(splits, width=width, height=height, seed=seed)


def _check_names(config: DataConfig, split: str) -> None:
    for kind in ("train", split):
        if not getattr(config, kind):
            raise UsageError(f"the data set has no {kind} split: name at least one")
    if len(set(config.classes)) != len(config.classes):
        raise UsageError(f"the classes {', '.join(config.classes)} name one twice: name each once")
    if config.classes and config.format == "shapes":
        raise UsageError("the classes of shapes are given by what it draws: leave the list of classes empty")


def _existing(root: Path | None, data_format: str) -> Path:
    if root is None:
        raise UsageError(f'a data set of format "{data_format}" lies in a folder: give it with --data-root')
    if not root.is_dir():
        raise DataError(f"the data root {root} is not a folder: give the data set's with --data-root")
    return root
