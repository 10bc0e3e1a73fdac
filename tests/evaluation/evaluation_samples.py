"""Small ground truths and detections, and slow scorers that read like the rules: the tests' oracles."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from altopt.datasets.dataset import Objects
from altopt.evaluation.detections import Detections

Box = Sequence[float]
Boxes = Sequence[Box] | np.ndarray


def objects(
    boxes: Boxes,
    labels: Sequence[int] | None = None,
    difficult: Sequence[int] = (),
    crowd: Sequence[int] = (),
    areas: Sequence[float] | None = None,
) -> Objects:
    """Objects of label 0 unless told; ``difficult`` and ``crowd`` list the indices of such objects."""
    indices = np.arange(len(boxes))
    return Objects(
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.array([0] * len(boxes) if labels is None else labels, np.int64),
        difficult=np.isin(indices, difficult),
        crowd=np.isin(indices, crowd),
        areas=None if areas is None else np.array(areas, np.float64),
    )


def detections(boxes: Boxes, scores: Sequence[float] | np.ndarray, labels: Sequence[int] | None = None) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array([0] * len(boxes) if labels is None else labels, np.int64),
    )


def random_boxes(random: np.random.Generator, count: int, side: int = 12) -> list[list[int]]:
    """Boxes with whole corners on a small field, so that equal IoUs, exact halves and duplicates are common."""
    corners = random.integers(0, side, (count, 2))
    return np.hstack([corners, corners + random.integers(1, side, (count, 2))]).tolist()


def random_samples(seed: int, images: int, classes: int) -> tuple[dict[str, Objects], dict[str, Detections]]:
    """Images with 0 to 4 objects and 0 to 8 detections, coarse scores, some objects difficult."""
    random = np.random.default_rng(seed)
    truth, found = {}, {}
    for image in range(images):
        count, guesses = int(random.integers(0, 5)), int(random.integers(0, 9))
        boxes = random_boxes(random, count)
        difficult = np.flatnonzero(random.random(count) < 0.25).tolist()
        truth[str(image)] = objects(boxes, random.integers(0, classes, count).tolist(), difficult)
        near = [boxes[index] for index in random.integers(0, count, guesses // 2)] if count else []
        guessed = near + random_boxes(random, guesses - len(near))
        scores = (random.integers(1, 10, guesses) / 10).tolist()
        found[str(image)] = detections(guessed, scores, random.integers(0, classes, guesses).tolist())
    return truth, found


def slow_iou(first: Box | np.ndarray, second: Box | np.ndarray, extent: float = 0.0) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0]) + extent
    height = min(first[3], second[3]) - max(first[1], second[1]) + extent
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + extent) * (box[3] - box[1] + extent) for box in (first, second)]
    return float(width * height / (sum(areas) - width * height))


def write_json(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path
