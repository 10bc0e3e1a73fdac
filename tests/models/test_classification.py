"""Crops to pre-train on, and batch normalisations folded away."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from drawn_dataset import DrawnDataset
from loss_values import losses_of
from torch import nn

from altopt.batches.samples import Batch, make_batch
from altopt.datasets.dataset import Objects
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.classification import CropClassifier, draw_crop

CPU = torch.device("cpu")


@dataclass
class Ruler(DrawnDataset):
    """A data set of one image whose colours say where a pixel lies: red is 4 x, green 4 y, blue 255."""

    boxes: list[list[float]]
    width: int = 60
    height: int = 48
    labels: list[int] = field(default_factory=list)
    difficult: bool = False

    def image(self, image_id: str) -> np.ndarray:
        rows, columns = np.mgrid[: self.height, : self.width]
        return np.stack([4 * columns, 4 * rows, np.full_like(rows, 255)], axis=2).astype(np.uint8)

    def objects(self, image_id: str) -> Objects:
        count = len(self.boxes)
        labels = np.array(self.labels or range(count), dtype=np.int64)
        flags = np.full(count, self.difficult), np.zeros(count, dtype=bool)
        return Objects(np.array(self.boxes, dtype=np.float32).reshape(-1, 4), labels, *flags)


def shown(pixels: torch.Tensor) -> tuple[float, float, float, float]:
    """Return the part xyxy of a ruler that a crop shows, to about a pixel."""
    red, green = pixels[0].float() / 4, pixels[1].float() / 4
    return red.min().item(), green.min().item(), red.max().item() + 1, green.max().item() + 1


BOXES: list[list[float]] = [[4, 5, 24, 18], [30, 20, 59, 47], [2, 40, 6, 44]]


def test_crops_show_their_object_and_stay_inside():
    labels = set()
    for k in range(200):
        sample = draw_crop(Ruler(BOXES), "one", 32, 0.0, 3, k)
        assert sample.pixels.shape == (3, 32, 32)
        assert sample.pixels.dtype == torch.uint8
        assert sample.pixels[2].eq(255).all()  # nothing of the outside, which were black
        label = int(sample.gt_labels.item())
        labels.add(label)
        x1, y1, x2, y2 = BOXES[label - 1]
        left, top, right, bottom = shown(sample.pixels)
        assert left - 1 <= (x1 + x2) / 2 <= right + 1
        assert top - 1 <= (y1 + y2) / 2 <= bottom + 1
    assert labels == {1, 2, 3}


def test_an_object_fills_a_third_to_all_of_its_crop():
    """An object of 12 px in the middle of the image, whose crops are never cut."""
    sides = []
    for k in range(200):
        left, _, right, _ = shown(draw_crop(Ruler([[24.0, 18, 36, 30]]), "one", 64, 0.0, 3, k).pixels)
        sides.append(right - left)
    assert 10 < min(sides) < 15
    assert 30 < max(sides) <= 38


def test_background_holds_no_objects_centre_and_comes_as_often_as_asked():
    dataset = Ruler(BOXES)
    samples = [draw_crop(dataset, "one", 32, 0.4, 3, k) for k in range(300)]
    background = [sample for sample in samples if sample.gt_labels.item() == 0]
    assert 40 < len(background) < 150  # a square on an object is not taken, so fewer than 120 on average
    for sample in background:
        left, top, right, bottom = shown(sample.pixels)
        for x1, y1, x2, y2 in BOXES:
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            assert not (left + 1 < x < right - 1 and top + 1 < y < bottom - 1)


@pytest.mark.parametrize("dataset", [Ruler([]), Ruler(BOXES, difficult=True)])
def test_images_without_usable_objects_are_background(dataset):
    assert {draw_crop(dataset, "one", 32, 0.0, 3, k).gt_labels.item() for k in range(20)} == {0}


@pytest.mark.parametrize("boxes", [
    [[0.0, 0, 60, 48]], [[0, 0, 1, 1]], [[59, 47, 60, 48]], [[0, 0, 60, 1]], [[59.5, 0, 60, 48]]])
def test_one_pixel_objects_and_objects_as_large_as_the_image(boxes):
    for k in range(30):
        sample = draw_crop(Ruler(boxes), "one", 16, 0.0, 3, k)
        assert sample.pixels[2].eq(255).all()
        assert sample.gt_labels.tolist() == [1]


def test_crops_of_other_images_than_the_ruler_fit_too():
    for width, height in ((63, 9), (9, 63), (1, 1), (33, 33)):
        for k in range(30):
            sample = draw_crop(Ruler([[0.0, 0, width, height]], width, height), "one", 16, 0.5, 3, k)
            assert sample.pixels[2].eq(255).all()


def test_crops_depend_on_key_and_image_alone():
    dataset = Ruler(BOXES)
    one, again = (draw_crop(dataset, "one", 32, 0.3, 3, "crops", 7) for _ in range(2))
    assert torch.equal(one.pixels, again.pixels)
    assert torch.equal(one.gt_labels, again.gt_labels)
    others = [draw_crop(dataset, "two", 32, 0.3, 3, "crops", 7), draw_crop(dataset, "one", 32, 0.3, 3, "crops", 8)]
    assert not any(torch.equal(one.pixels, other.pixels) for other in others)


def test_half_of_the_crops_are_mirrored():
    mirrored = 0
    for k in range(200):
        red = draw_crop(Ruler(BOXES), "one", 32, 0.0, 3, k).pixels[0].float()
        mirrored += int(red[:, 0].mean() > red[:, -1].mean())
    assert 70 < mirrored < 130


def classifier(name: str = "small") -> CropClassifier:
    """Return a classifier whose normalisations have seen something."""
    module = CropClassifier(backbones.build(name), 5)
    random = generator("classifier")
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                layer.weight.uniform_(0.5, 2, generator=random)
                layer.bias.normal_(generator=random)
                layer.running_mean.normal_(std=0.2, generator=random)
                layer.running_var.uniform_(0.2, 2, generator=random)
    return module


def test_every_convolution_is_normalised():
    module = classifier()
    normalisations = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.num_features for layer in normalisations] == [layer.out_channels for layer in convolutions]
    assert len(convolutions) == 9


def test_folded_layers_compute_the_same_under_the_backbones_names():
    module = classifier().eval()
    image = torch.randn(2, 3, 45, 64, generator=generator("image"))
    with torch.no_grad():
        expected = module.conv(image)
    plain = backbones.small().conv
    tensors = module.tensors()
    plain.load_state_dict({name.removeprefix("conv."): tensor for name, tensor in tensors.items()})
    with torch.no_grad():
        found = plain(image)
        assert not torch.allclose(found, backbones.small().conv(image), atol=1e-2)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert all(name.startswith("conv.") for name in tensors)
    assert all(not tensor.requires_grad and tensor.is_contiguous() for tensor in tensors.values())


def test_folding_leaves_the_classifier_as_it_was():
    module = classifier().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.tensors()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(layer.training for layer in module.modules())


def test_loss_is_the_softmax_over_the_crops_labels():
    module = classifier().eval()
    samples = [draw_crop(Ruler(BOXES), "one", 32, 0.3, 3, k) for k in range(6)]
    batch = make_batch(samples, CPU)
    with torch.no_grad():
        loss = losses_of(module, batch)["cls"].item()
        odds = torch.exp(module.score(module.conv(batch.images).mean(dim=(2, 3))).double())
    labels = [int(sample.gt_labels.item()) for sample in samples]
    expected = -sum(torch.log(odds[k, label] / odds[k].sum()).item() for k, label in enumerate(labels)) / 6
    assert loss == pytest.approx(expected, rel=1e-4)
    assert module.score.out_features == 6  # background and five classes


def test_a_batch_of_one_crop_trains():
    module = classifier().train()
    batch: Batch = make_batch([draw_crop(Ruler(BOXES), "one", 64, 0.3, 3)], CPU)
    losses_of(module, batch)["cls"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
