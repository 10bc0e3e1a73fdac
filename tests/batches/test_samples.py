"""From data sets to network input: scale, mirror image, padding, and the way back."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torchvision
from drawn_dataset import DrawnDataset

from altopt.batches.samples import Sample, make_batch, read_sample, resized, to_original
from altopt.config import TORCHVISION_PIXELS, NetworkConfig, Pixels
from altopt.datasets.dataset import Objects
from altopt.extents import scale_of
from altopt.ops.targets import AnchorSample, RoISample

CPU = torch.device("cpu")


@dataclass
class OneImage(DrawnDataset):
    """A data set of one image, black with its objects painted white."""

    width: int
    height: int
    boxes: list[list[float]]
    difficult: list[int] = field(default_factory=list)

    def image(self, image_id: str) -> np.ndarray:
        image = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        for x1, y1, x2, y2 in np.array(self.boxes, dtype=int).reshape(-1, 4):
            image[y1:y2, x1:x2] = 255
        return image

    def objects(self, image_id: str) -> Objects:
        count = len(self.boxes)
        difficult = np.isin(np.arange(count), self.difficult)
        boxes = np.array(self.boxes, dtype=np.float32).reshape(-1, 4)
        return Objects(boxes, np.arange(count), difficult, np.zeros(count, dtype=bool))


def frame(short_side: int, max_side: int = 10_000) -> NetworkConfig:
    return NetworkConfig(short_side=short_side, max_side=max_side)


def sample_of(height: int, width: int, value: int, scale: float = 1.0, **boxes: torch.Tensor) -> Sample:
    pixels = torch.full((3, height, width), value, dtype=torch.uint8)
    return Sample("one", False, pixels, scale, boxes.get("objects", torch.zeros(0, 4)),
                  torch.zeros(0, dtype=torch.int64), boxes.get("proposals"))


@pytest.mark.parametrize(("size", "expected"), [
    ((500, 375), (800, 600)), ((375, 500), (600, 800)), ((500, 333), (901, 600)), ((500, 200), (1000, 400)),
    ((1000, 600), (1000, 600)), ((3000, 1200), (1000, 400)), ((1, 1), (600, 600)), ((5000, 1), (1000, 1)),
])
def test_short_side_600_unless_the_long_one_passes_1000(size, expected):
    scale = scale_of(size, 600, 1000)
    image = resized(np.zeros((size[1], size[0], 3), dtype=np.uint8), scale)
    assert image.shape == (expected[1], expected[0], 3)
    assert min(size) * scale <= 600 + 1e-9
    assert max(size) * scale <= 1000 + 1e-9
    assert min(size) * scale == pytest.approx(600) or max(size) * scale == pytest.approx(1000)


def test_a_image_of_the_right_size_stays_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert resized(image, 1.0) is image


def test_enlarging_is_bilinear_about_pixel_centres():
    """The edge between columns 1 and 2 moves to 4 at twice the size, not to 3 or 5."""
    image = np.zeros((1, 4, 3), dtype=np.uint8)
    image[:, 2:] = 200
    row = resized(image, 2.0)[0, :, 0].astype(int)
    assert row.tolist() == [0, 0, 0, 50, 150, 200, 200, 200]


BOX = [12.0, 6.0, 20.0, 16.0]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("short_side", [40, 80, 60])
def test_boxes_cover_the_painted_pixels(flipped, short_side):
    sample = read_sample(OneImage(64, 40, [BOX]), "one", frame(short_side), flipped=flipped,
                         proposals=np.array([BOX], dtype=np.float32))
    assert sample.scale == short_side / 40
    bright = (sample.pixels[0] > 127)
    rows, columns = torch.nonzero(bright, as_tuple=True)
    painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert sample.gt_boxes.tolist() == [[float(edge) for edge in painted]]
    assert torch.equal(sample.proposals, sample.gt_boxes)
    assert sample.flipped == flipped
    assert sample.size == (64 * short_side // 40, short_side)


def test_the_mirror_image_is_the_image_mirrored():
    dataset = OneImage(63, 40, [BOX, [0, 0, 1, 1]])
    one, other = (read_sample(dataset, "one", frame(47), flipped=flipped) for flipped in (False, True))
    assert torch.equal(other.pixels, one.pixels.flip(2))
    assert not torch.equal(other.pixels, one.pixels)
    assert torch.equal(other.gt_labels, one.gt_labels)


def test_difficult_objects_are_left_out_and_classes_follow_their_boxes():
    sample = read_sample(OneImage(64, 40, [BOX, [0, 0, 5, 5], [30, 20, 40, 30]], difficult=[1]), "one", frame(40))
    assert sample.gt_labels.tolist() == [0, 2]
    assert sample.gt_boxes.tolist() == [BOX, [30, 20, 40, 30]]


def test_a_image_without_objects_and_proposals():
    sample = read_sample(OneImage(64, 40, []), "one", frame(80), flipped=True,
                         proposals=np.zeros((0, 4), dtype=np.float32))
    assert sample.gt_boxes.shape == sample.proposals.shape == (0, 4)
    assert sample.gt_labels.shape == (0,)
    assert read_sample(OneImage(64, 40, []), "one", frame(80)).proposals is None


def test_a_one_pixel_object_keeps_its_pixel():
    sample = read_sample(OneImage(64, 40, [[63, 39, 64, 40]]), "one", frame(120))
    assert sample.gt_boxes.tolist() == [[189, 117, 192, 120]]


def test_reading_changes_nothing_of_the_data_sets(monkeypatch):
    objects, proposals = OneImage(64, 40, [BOX]).objects("one"), np.array([BOX], dtype=np.float32)
    dataset = OneImage(64, 40, [BOX])
    monkeypatch.setattr(dataset, "objects", lambda image_id: objects)
    sample = read_sample(dataset, "one", frame(40), proposals=proposals)
    sample.gt_boxes.add_(1)
    sample.proposals.add_(1)
    assert objects.boxes.tolist() == proposals.tolist() == [BOX]


def test_to_original_is_the_inverse():
    dataset = OneImage(500, 333, [[0, 0, 500, 333], [17, 5, 18, 6], [100, 50, 333, 332]])
    sample = read_sample(dataset, "one", frame(600, 1000))
    back = to_original(sample.gt_boxes, sample, (500, 333))
    torch.testing.assert_close(back, torch.tensor(dataset.boxes, dtype=torch.float32))


def test_to_original_cuts_at_the_images_edge():
    sample = sample_of(600, 901, 0, scale=600 / 333)
    back = to_original(torch.tensor([[-3.0, 0, 901, 600]]), sample, (500, 333))
    torch.testing.assert_close(back, torch.tensor([[0.0, 0, 500, 333]]))
    assert back[0, 2] <= 500
    assert to_original(torch.zeros(0, 4), sample, (500, 333)).shape == (0, 4)


def test_pixels_are_normalised_as_torchvisions_weights_expect():
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = Sample("one", False, pixels, 1.0, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    usual = TORCHVISION_PIXELS
    expected = torchvision.transforms.functional.normalize(pixels / 255, usual.mean, usual.std)
    batch = make_batch([sample], CPU)
    torch.testing.assert_close(batch.images[0], expected)
    assert batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images[0, 1, 4, 7].item(), (pixels[1, 4, 7].item() / 255 - 0.456) / 0.224)


def test_smaller_images_are_padded_right_and_below_with_the_mean_colour():
    batch = make_batch([sample_of(20, 40, 200), sample_of(30, 25, 90), sample_of(1, 1, 0)], CPU)
    assert batch.images.shape == (3, 3, 30, 40)
    for image, (height, width) in zip(batch.images, [(20, 40), (30, 25), (1, 1)], strict=True):
        covered = torch.zeros(3, 30, 40, dtype=torch.bool)
        covered[:, :height, :width] = True
        assert image[~covered].eq(0).all()
        assert image[covered].ne(0).all()


def test_a_image_is_the_same_alone_and_in_a_batch():
    small, large = sample_of(20, 30, 77), sample_of(40, 50, 200)
    alone, together = make_batch([small], CPU), make_batch([large, small], CPU)
    assert torch.equal(together.images[1, :, :20, :30], alone.images[0])
    assert together.samples[1].size == alone.samples[0].size == (30, 20)


def test_a_batch_keeps_what_its_samples_say():
    objects, proposals = torch.rand(2, 4), torch.rand(5, 4)
    given = sample_of(20, 30, 77, 1.5, objects=objects, proposals=proposals)
    moved = make_batch([given, sample_of(9, 9, 1)], CPU).samples
    assert (moved[0].id, moved[0].flipped, moved[0].scale) == ("one", False, 1.5)
    assert torch.equal(moved[0].gt_boxes, objects)
    assert torch.equal(moved[0].proposals, proposals)
    assert moved[1].proposals is None


def test_a_batch_of_stored_maps_brings_those_and_blank_images():
    maps = [torch.rand(5, 2, 3), torch.rand(5, 1, 2)]
    samples = [replace(sample_of(32 - 16 * k, 48, 0), features=features) for k, features in enumerate(maps)]
    batch = make_batch(samples, CPU, 7)
    assert all(torch.equal(one, other) for one, other in zip(batch.maps, maps, strict=True))
    assert batch.images.shape == (2, 3, 1, 1)
    assert [each.size for each in batch.samples] == [(48, 32), (48, 16)]
    assert batch.iteration == 7
    assert make_batch([sample_of(20, 30, 77)], CPU, 3).maps is None


def test_everything_of_a_sample_is_pinned_or_moved(monkeypatch):
    """No GPU here: what is asked of the tensors is counted."""
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    used, labels, positive = (torch.zeros(n, dtype=torch.int64) for n in (11, 11, 12))
    anchors = AnchorSample(used, labels, positive, torch.zeros(12, 4))
    rois = RoISample(torch.zeros(13, 4), torch.zeros(13, dtype=torch.int64), torch.zeros(13, 4), 2, 99)
    sample = Sample("one", False, torch.zeros(3, 8, 6, dtype=torch.uint8), 1.0, torch.zeros(2, 4),
                    torch.zeros(2, dtype=torch.int64), torch.zeros(14, 4), anchors=anchors, rois=rois)
    sample.pinned()
    expected = [(2, 4), (2,), (14, 4), (11,), (11,), (12,), (12, 4), (13, 4), (13,), (13, 4), (3, 8, 6)]
    assert sorted(pinned) == sorted(map(torch.Size, expected))
    pinned.clear()
    replace(sample, features=torch.zeros(5, 2, 2)).pinned()
    assert sorted(pinned) == sorted(map(torch.Size, [*expected[:-1], (5, 2, 2)]))  # the image is a single zero
    moved = sample.moved(sample.pixels, torch.device("meta"))
    tensors = [moved.gt_boxes, moved.gt_labels, moved.proposals, moved.anchors.deltas, moved.rois.rois]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.id, moved.scale, moved.rois.foreground, moved.rois.dropout_seed) == ("one", 1.0, 2, 99)


def test_pixels_are_what_the_weights_want():
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = Sample("one", False, pixels, 1.0, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    caffe = make_batch([sample], CPU, pixels=Pixels("BGR", 1.0, (103.0, 116.0, 123.0), (1.0, 1.0, 1.0))).images[0]
    assert caffe[:, 4, 7].tolist() == [int(pixels[2, 4, 7]) - 103, int(pixels[1, 4, 7]) - 116,
                                         int(pixels[0, 4, 7]) - 123]
    google = make_batch([sample], CPU, pixels=Pixels("RGB", 1.0, (127.0,) * 3, (128.0,) * 3)).images[0]
    assert torch.equal(google, (pixels.float() - 127) / 128)
