"""Means and deviations of box deltas against numpy."""

import numpy as np
import pytest
import torch

from altopt.ops import boxes as bx
from altopt.training.box_statistics import FIXED_STDS, BoxStatistics, fixed_statistics, measure

CLASSES = 3


def images(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Return images with one to three objects of classes 0 and 1, and 40 proposals around them."""
    random = torch.Generator().manual_seed(1)
    made = []
    for n in range(count):
        corners = torch.rand(1 + n % 3, 2, generator=random) * 200
        objects = torch.cat([corners, corners + 40 + 60 * torch.rand(1 + n % 3, 2, generator=random)], dim=1)
        around = objects[torch.randint(len(objects), (40,), generator=random)]
        proposals = around + torch.randn(40, 4, generator=random) * 8
        made.append((proposals, objects, torch.randint(2, (len(objects),), generator=random), 320.0 + n))
    return made


def numpy_deltas(proposals: np.ndarray, objects: np.ndarray, labels: np.ndarray) -> list[tuple[int, list[float]]]:
    """Return (class, deltas) of every pair that counts, objects paired with themselves included."""
    found = []
    for roi in np.concatenate([objects, proposals]):
        corner, end = np.maximum(objects[:, :2], roi[:2]), np.minimum(objects[:, 2:], roi[2:])
        shared = np.prod(np.maximum(end - corner, 0), axis=1)
        own, theirs = np.prod(roi[2:] - roi[:2]), np.prod(objects[:, 2:] - objects[:, :2], axis=1)
        overlap = shared / (own + theirs - shared)
        if overlap.max() >= 0.5:
            g = objects[overlap.argmax()]
            w, h = roi[2] - roi[0], roi[3] - roi[1]
            found.append((int(labels[overlap.argmax()]), [
                (g[0] + g[2] - roi[0] - roi[2]) / 2 / w, (g[1] + g[3] - roi[1] - roi[3]) / 2 / h,
                float(np.log((g[2] - g[0]) / w)), float(np.log((g[3] - g[1]) / h))]))
    return found


@pytest.mark.parametrize("flips", [False, True])
def test_measured_statistics_are_numpys(flips):
    pairs = []
    for image_proposals, image_objects, image_labels, width in images(12):
        proposals, objects = (each.double().numpy() for each in (image_proposals, image_objects))
        labels = image_labels.numpy()
        pairs += numpy_deltas(proposals, objects, labels)
        if flips:
            mirrored = [np.stack([width - b[:, 2], b[:, 1], width - b[:, 0], b[:, 3]], axis=1)
                        for b in (proposals, objects)]
            pairs += numpy_deltas(mirrored[0], mirrored[1], labels)
    means, stds = measure(images(12), CLASSES, 0.5, flips)
    assert means.shape == stds.shape == (CLASSES + 1, 4)
    assert means.dtype == stds.dtype == torch.float32
    for label in (0, 1):
        deltas = np.array([values for own, values in pairs if own == label])
        assert len(deltas) > 100
        np.testing.assert_allclose(means[label + 1], deltas.mean(axis=0), atol=2e-5)
        np.testing.assert_allclose(stds[label + 1], deltas.std(axis=0), rtol=2e-4)
    if flips:
        assert means[1:3, 0].abs().max() < 1e-6  # a mirrored image asks for the opposite shift


def test_background_and_a_class_never_seen_stay_in_plain_units():
    means, stds = measure(images(12), CLASSES, 0.5, True)
    for label in (0, CLASSES):
        assert means[label].eq(0).all()
        assert stds[label].eq(1).all()


def test_without_images_or_without_objects_units_are_plain():
    nothing = (torch.rand(5, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 100.0)
    for given in ([], [nothing]):
        means, stds = measure(given, CLASSES, 0.5, True)
        assert means.eq(0).all()
        assert stds.eq(1).all()


def test_a_class_without_spread_gets_the_fixed_units():
    """An object without a proposal is paired with itself alone."""
    objects = torch.tensor([[10.0, 10, 50, 50]])
    means, stds = measure([(torch.zeros(0, 4), objects, torch.tensor([1]), 100.0)], CLASSES, 0.5, True)
    assert means[2].eq(0).all()
    torch.testing.assert_close(stds[2], torch.tensor(FIXED_STDS))


def test_proposals_below_the_overlap_do_not_count():
    objects, labels = torch.tensor([[0.0, 0, 100, 10]]), torch.tensor([0])
    proposals = torch.tensor([[0.0, 0, 50, 10], [0, 0, 49, 10]])  # IoU 0.5 and 0.49
    statistics = BoxStatistics(1, 0.5)
    statistics.add(proposals, objects, labels)
    assert statistics.count.tolist() == [0, 2]
    means, _ = statistics.result()
    torch.testing.assert_close(means[1], bx.encode(objects, proposals[:1])[0] / 2)


def test_images_can_come_in_any_order():
    forth, back = measure(images(9), CLASSES, 0.5, True), measure(images(9)[::-1], CLASSES, 0.5, True)
    for one, other in zip(forth, back, strict=True):
        torch.testing.assert_close(one, other)


def test_fixed_statistics_are_py_faster_rcnns():
    means, stds = fixed_statistics(2)
    assert means.tolist() == [[0] * 4] * 3
    torch.testing.assert_close(stds, torch.tensor([[0.1, 0.1, 0.2, 0.2]] * 3))
    stds[0] = 7  # rows are not views of each other
    assert stds[1, 0] == pytest.approx(0.1)
