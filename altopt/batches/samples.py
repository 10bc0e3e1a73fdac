"""From data sets to network input: resizing, flipping, and batches.

Two frames: an image's *original* pixels, in which data sets, proposal files and detections keep their boxes, and the
*input* frame, the resized image that the network sees. ``Sample.scale`` leads from the first to the second, and this
module is the only place that multiplies by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from altopt.config import TORCHVISION_PIXELS, NetworkConfig, Pixels
from altopt.datasets.dataset import Dataset
from altopt.extents import input_size, scale_of
from altopt.ops import boxes as bx
from altopt.ops.targets import AnchorSample, RoISample


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as the network sees it, boxes in the input frame.

    ``pixels`` is uint8 ``Tensor[3, H, W]``; ``gt_boxes`` ``Tensor[G, 4]``; ``gt_labels`` int64 ``Tensor[G]`` from 0;
    ``proposals`` ``Tensor[K, 4]`` or None; ``scale`` is input pixels for one original pixel.
    A sample with ``features``, the stored map ``Tensor[C, h, w]`` behind all conv layers, has no image: its pixels are
    one zero, repeated without memory, and only their size means something.
    ``anchors`` and ``rois`` are what the losses are taken on, once a module has prepared the sample.
    """

    id: str
    flipped: bool
    pixels: Tensor
    scale: float
    gt_boxes: Tensor
    gt_labels: Tensor
    proposals: Tensor | None = None
    features: Tensor | None = None
    anchors: AnchorSample | None = None
    rois: RoISample | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in the input frame."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def pinned(self) -> "Sample":
        """Return the sample in memory that a GPU copies from while the processor goes on."""
        pinned = self._mapped(Tensor.pin_memory)
        if self.features is None:
            return replace(pinned, pixels=self.pixels.pin_memory())
        return replace(pinned, features=self.features.pin_memory())

    def moved(self, pixels: Tensor, device: torch.device) -> "Sample":
        """Return the sample on a device, with these pixels and without stored map."""
        return replace(self._mapped(lambda tensor: tensor.to(device, non_blocking=True)), pixels=pixels, features=None)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        """Return the sample with everything changed that is not an image."""
        return replace(
            self, gt_boxes=change(self.gt_boxes), gt_labels=change(self.gt_labels),
            proposals=None if self.proposals is None else change(self.proposals),
            anchors=None if self.anchors is None else self.anchors.mapped(change),
            rois=None if self.rois is None else self.rois.mapped(change),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples on a device, and their pixels as one ``Tensor[B, 3, H, W]``, normalised, zero-padded at the end.

    Where the samples carry stored maps, ``maps`` are these, ``Tensor[C, h, w]`` each, and ``images`` are blank.
    ``iteration`` is the step of training that the batch is for, counted from 0.
    """

    samples: list[Sample]
    images: Tensor
    maps: Sequence[Tensor] | None = None
    iteration: int = 0


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """Return the image, uint8 [H, W, 3], scaled bilinearly (with antialiasing where it shrinks)."""
    height, width = image.shape[:2]
    size = input_size((width, height), scale)
    if size == (width, height):
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def read_sample(dataset: Dataset, id: str, network: NetworkConfig, *, flipped: bool = False,
                proposals: np.ndarray | None = None) -> Sample:
    """Read one image with its usable objects, and proposals given in the original frame (float32 [K, 4])."""
    image = dataset.image(id)
    pixels, scale = _in_input_frame(image, network, flipped=flipped)
    return _sample(dataset, id, flipped, pixels, scale, image.shape[1], proposals)


def image_sample(id: str, image: np.ndarray, network: NetworkConfig) -> Sample:
    """Return an image of any origin, uint8 RGB [H, W, 3], as the network sees it; it has no objects."""
    pixels, scale = _in_input_frame(image, network)
    return Sample(id, False, pixels, scale, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))


def _in_input_frame(image: np.ndarray, network: NetworkConfig, *, flipped: bool = False) -> tuple[Tensor, float]:
    """Return an image's pixels in the input frame, uint8 ``Tensor[3, H, W]``, and its scale."""
    height, width = image.shape[:2]
    scale = scale_of((width, height), network.short_side, network.max_side)
    pixels = resized(image, scale)
    # Mirrored after it was resized: then the mirror image is the image mirrored, to the last bit.
    if flipped:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), scale  # (3, H, W)


def stored_sample(dataset: Dataset, id: str, network: NetworkConfig, features: Tensor, *, flipped: bool = False,
                  proposals: np.ndarray | None = None) -> Sample:
    """Return one image as ``read_sample`` does, with its stored map ``Tensor[C, h, w]`` in place of its pixels."""
    extent = dataset.size(id)
    scale = scale_of(extent, network.short_side, network.max_side)
    width, height = input_size(extent, scale)
    blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, height, width)  # a size without memory
    return _sample(dataset, id, flipped, blank, scale, extent[0], proposals, features)


def _sample(dataset: Dataset, id: str, flipped: bool, pixels: Tensor, scale: float, width: int,
            proposals: np.ndarray | None, features: Tensor | None = None) -> Sample:
    objects = dataset.objects(id).usable()  # difficult ones are not trained on, as py-faster-rcnn has it

    def framed(boxes: np.ndarray) -> Tensor:
        # A copy: what a data set or a file keeps must not change with a tensor that is made of it.
        original = torch.from_numpy(np.array(boxes, dtype=np.float32)).reshape(-1, 4)  # (K, 4)
        return (bx.flip(original, width) if flipped else original) * scale

    return Sample(
        id, flipped, pixels, scale, framed(objects.boxes), torch.from_numpy(np.array(objects.labels, dtype=np.int64)),
        None if proposals is None else framed(proposals), features,
    )


def boxes_in_input(boxes: np.ndarray, sample: Sample) -> Tensor:
    """Return boxes of the original frame, float32 [K, 4], in the input frame; not for flipped samples."""
    return torch.from_numpy(np.array(boxes, dtype=np.float32)).reshape(-1, 4) * sample.scale


def to_original(boxes: Tensor, sample: Sample, size: tuple[int, int]) -> Tensor:
    """Return boxes of the input frame in the original one, cut off at its edges; not for flipped samples."""
    return bx.clip(boxes / sample.scale, size)


def make_batch(samples: list[Sample], device: torch.device, iteration: int = 0, *,
               pixels: Pixels = TORCHVISION_PIXELS) -> Batch:
    """Move the samples to the device and stack their pixels, smaller images padded with the mean colour.

    ``pixels`` is the convention of the weights that are to see the batch.
    Samples with stored maps bring those instead.
    """
    if samples[0].features is not None:
        maps = [sample.features.to(device, non_blocking=True) for sample in samples if sample.features is not None]
        blank = torch.zeros(1, 1, 1, 1, device=device).expand(len(samples), 3, 1, 1)
        return Batch([sample.moved(sample.pixels, device) for sample in samples], blank, maps, iteration)
    height = max(sample.pixels.shape[1] for sample in samples)
    width = max(sample.pixels.shape[2] for sample in samples)
    images = torch.zeros(len(samples), 3, height, width, device=device).to(memory_format=torch.channels_last)
    mean, std = _pixel_statistics(pixels, device)
    moved = []
    for image, sample in zip(images, samples, strict=True):
        values = sample.pixels.to(device, non_blocking=True)
        ordered = values if pixels.order == "RGB" else values.flip(0)
        # Normalised on the device, to which a quarter of the bytes then travel; zero is the mean colour.
        image[:, : values.shape[1], : values.shape[2]] = (ordered - mean) / std
        moved.append(sample.moved(values, device))
    return Batch(moved, images, iteration=iteration)


@cache
def _pixel_statistics(pixels: Pixels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of pixels in 0..255, ``Tensor[3, 1, 1]`` each; made once, as copies to a GPU wait."""
    # Made in inference mode first, they could not be used in training afterwards.
    with torch.inference_mode(False):
        mean, std = (torch.tensor(each).mul(pixels.scale)[:, None, None].to(device)
                     for each in (pixels.mean, pixels.std))
    return mean, std
