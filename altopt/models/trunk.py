"""The conv layers as training sees them: from a batch to one feature map for each image, never padded.

Everything that has to do with sizes, stored maps and frozen layers is here, so that the networks' ``forward`` begins
with one line.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from altopt.batches.samples import Batch


class Trunk(nn.Module):
    """Conv layers that may learn, be frozen in part, or be frozen altogether.

    Where all are frozen, each image goes through them by itself, so that its map does not depend on the images that
    share its batch and can be stored: convolutions of several images sum in another order than those of one, which
    changes last bits. Where some learn, images of one size go through together.
    """

    def __init__(self, conv: nn.Sequential) -> None:
        super().__init__()
        self.conv: nn.Module = conv

    def forward(self, batch: Batch) -> list[Tensor]:
        """Return the feature map of each image, ``Tensor[C, h, w]`` in its own size."""
        if batch.maps is not None or not any(weight.requires_grad for weight in self.conv.parameters()):
            return image_maps(self.conv, batch)
        return [features for images in of_one_size(own_images(batch)) for features in self.conv(images)]


@torch.no_grad()
def image_maps(conv: nn.Module, batch: Batch) -> list[Tensor]:
    """Return what the conv layers make of each image by itself, ``Tensor[C, h, w]`` in its own size, without autograd.

    In the precision that it is computed in; stored maps are taken as they are, in float32.
    """
    if batch.maps is not None:
        return [features.float() for features in batch.maps]
    return [conv(together([image]))[0] for image in own_images(batch)]


def own_images(batch: Batch) -> list[Tensor]:
    """Return each image of the batch, normalised, without its padding: ``Tensor[3, H, W]``."""
    return [image[:, : sample.size[1], : sample.size[0]]
            for image, sample in zip(batch.images, batch.samples, strict=True)]


def of_one_size(images: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield neighbours of one size together, as ``Tensor[B, C, h, w]``: none is padded, and the order stays."""
    for _, group in groupby(images, key=lambda image: image.shape):
        yield together(list(group))


def together(images: Sequence[Tensor]) -> Tensor:
    """Return images or maps of one size, ``Tensor[C, h, w]`` each, as ``Tensor[B, C, h, w]`` in channels_last layout.

    Down to the stride of a batch of one: by that too oneDNN decides how it computes, and with it the last bits.
    """
    rows = [image.permute(1, 2, 0) for image in images]  # (h, w, C)
    stacked = rows[0].contiguous()[None] if len(rows) == 1 else torch.stack(rows)
    return stacked.permute(0, 3, 1, 2)  # (B, C, h, w)
