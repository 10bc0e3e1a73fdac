"""Open the data set that a recipe names. Nothing is parsed before it is asked for, and no other format is imported."""

from functools import lru_cache
from pathlib import Path
from typing import Literal

from altopt.datasets.dataset import DataConfig, Dataset
from altopt.errors import DataError, UsageError


def open_dataset(config: DataConfig, split: Literal["train", "test"], root: Path | None = None) -> Dataset:
    """Return the data set of one split; both splits have the same classes. ``root`` may be None for "shapes" only.

    UsageError when the config does not say enough, DataError when there is no such root.
    """
    splits = config.train if split == "train" else config.test
    for kind, names in (("train", config.train), (split, splits)):
        if not names:
            raise UsageError(f"the data set has no {kind} split: name at least one")
    if len(set(config.classes)) != len(config.classes):
        raise UsageError(f"the classes {', '.join(config.classes)} name one twice: name each once")
    if config.format == "shapes":
        if config.classes:
            raise UsageError("the classes of shapes are given by what it draws: leave the list of classes empty")
        return _shapes(splits, config.width, config.height, config.seed)
    if config.box_format != "inclusive-1" and config.format != "voc":
        raise UsageError(f'data.box_format is for format "voc", whose files count in several ways: leave it out for '
                         f'"{config.format}"')
    if config.format == "auto":
        raise UsageError('data.format is "auto", which is looked up in a data root: give it with --data-root')
    if root is None:
        raise UsageError(f'a data set of format "{config.format}" lies in a folder: give it with --data-root')
    if not root.is_dir():
        raise DataError(f"the data root {root} is not a folder: give the data set's with --data-root")
    if config.format == "voc":
        from altopt.datasets.voc import VocDataset

        return VocDataset.opened(config, split, root)
    if config.format == "yolo":
        from altopt.datasets.yolo import YoloDataset

        return YoloDataset.opened(config, split, root)
    from altopt.datasets.coco import CocoDataset

    return CocoDataset.opened(config, split, root)


@lru_cache(maxsize=4)  # the stages of a run ask again and again for the same images, which are drawn once
def _shapes(splits: tuple[str, ...], width: int, height: int, seed: int) -> Dataset:
    from altopt.datasets.shapes import ShapesDataset

    return ShapesDataset(splits, width=width, height=height, seed=seed)
