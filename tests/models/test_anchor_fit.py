"""How anchors suit objects, against the IoU with every anchor of the map."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from drawn_dataset import DrawnDataset

from altopt.config import NetworkConfig
from altopt.datasets.dataset import Objects
from altopt.extents import shape_behind
from altopt.models.anchor_fit import AnchorFit, Framed, anchor_fit, best_overlaps
from altopt.models.rpn import all_anchors
from altopt.ops.boxes import iou

SMALL = NetworkConfig(name="small", short_side=240, max_side=320, anchor_scales=(2.0, 4.0, 8.0))


@dataclass
class Boxed(DrawnDataset):
    """Images of 320 x 240 with these objects each."""

    width: int
    height: int
    boxes: np.ndarray
    ids: tuple[str, ...] = ("one",)

    def size(self, image_id: str) -> tuple[int, int]:
        return self.width, self.height

    def objects(self, image_id: str) -> Objects:
        return Objects.of(self.boxes.tolist(), [0] * len(self.boxes))


@pytest.mark.parametrize("scales", [(2.0, 4.0, 8.0), (1.0,), (40.0,), (0.5, 30.0)])
@pytest.mark.parametrize("size", [(320, 240), (321, 239), (64, 300)])
def test_the_best_overlap_is_that_of_all_anchors_inside(size, scales):
    network = replace(SMALL, anchor_scales=scales)
    random = np.random.default_rng(3)
    corners = random.uniform(0, [size[0] - 6, size[1] - 6], (60, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, size, (60, 2))], axis=1).clip(0, [*size, *size])
    _, height, width = shape_behind("small", size)
    anchors = all_anchors(network, height, width, torch.device("cpu")).double()
    inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] <= torch.tensor(size)).all(dim=1)
    every = iou(torch.from_numpy(boxes), anchors) * inside
    assert best_overlaps(Framed(boxes, size), network) == pytest.approx(every.max(dim=1).values.numpy(), abs=1e-9)


def squares(side: float, count: int = 40) -> np.ndarray:
    corners = np.random.default_rng(1).uniform(0, [320 - side, 240 - side], (count, 2))
    return np.concatenate([corners, corners + side], axis=1)


def test_anchors_that_suit_are_not_worth_a_word():
    fit = anchor_fit(Boxed(320, 240, squares(60)), SMALL)
    assert (fit.objects, fit.share, fit.warning()) == (40, 0, None)
    assert anchor_fit(Boxed(320, 240, np.zeros((0, 4))), SMALL) == AnchorFit(0, 0.0)


def test_small_objects_get_small_anchors():
    fit = anchor_fit(Boxed(320, 240, squares(14)), SMALL)
    assert fit.share == 1
    assert fit.better is not None
    text = fit.warning()
    assert text is not None
    assert text.startswith("100% of 40 objects have no anchor with an IoU of 0.5, so the RPN learns them badly: with "
                           f"network.anchor_scales={list(fit.better.anchor_scales)} it would be ")
    again = anchor_fit(Boxed(320, 240, squares(14)), fit.better)
    assert again.share == pytest.approx(fit.share_with_better)
    assert again.share < 0.8


def test_long_objects_get_long_anchors():
    boxes = np.array([[x, y, x + 200, y + 40] for x in range(0, 120, 10) for y in range(0, 200, 10)], float)
    text = anchor_fit(Boxed(320, 240, boxes), SMALL).warning()
    assert text is not None
    assert "and network.anchor_ratios=[0.25, 0.5, 1.0, 2.0, 4.0] it would be 0%" in text


def test_specks_that_no_anchor_suits():
    text = anchor_fit(Boxed(320, 240, squares(1)), SMALL).warning()
    assert text is not None
    assert text.endswith("other scales or ratios would help little: try a larger network.short_side")
