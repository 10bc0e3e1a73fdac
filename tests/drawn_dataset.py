"""A data set for tests that draw their images and objects themselves."""

from pathlib import Path
from typing import Any

import numpy as np

from altopt.datasets.checking import Look
from altopt.datasets.dataset import Dataset, Objects


class DrawnDataset(Dataset):
    """Has no files and no ids; a test defines ``image`` and ``objects``."""

    name = "drawn"
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()

    def coco_image_id(self, image_id: str) -> int | str:
        return image_id

    def size(self, image_id: str) -> tuple[int, int]:
        height, width = self.image(image_id).shape[:2]
        return width, height

    def image(self, image_id: str) -> np.ndarray:
        raise NotImplementedError

    def objects(self, image_id: str) -> Objects:
        raise NotImplementedError

    def files(self) -> list[Path]:
        return []

    def description(self) -> dict[str, Any]:
        return {}

    def look(self) -> Look:
        return Look(self.name)

    def check(self) -> list[str]:
        return []
