"""Dropout whose masks belong to images: what it drops of a RoI does not depend on the images that share a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.batches.samples import Sample
from altopt.machine.randomness import seed_of
from altopt.ops.targets import RoISample


class PerImageDropout(nn.Dropout):
    """Dropout that draws a mask for the rows of each image by itself, from the keys that ``seed_dropout`` gave it.

    Without keys it is torch's own. A mask is drawn on the device, by torch's own generator.
    """

    rows: Sequence[tuple[int, int]] = ()  # for each image: how many rows, and the seed of their mask

    def forward(self, input: Tensor) -> Tensor:
        """Return ``Tensor[R, D]`` with some values dropped and the others scaled up; in evaluation as it is."""
        if not self.training or self.p == 0 or not self.rows:
            return super().forward(input)
        masks = []
        for count, seed in self.rows:
            torch.manual_seed(seed)
            masks.append(F.dropout(input.new_ones(count, *input.shape[1:]), self.p))
        return input * torch.cat(masks)


def seed_dropout(layers: nn.Module, rois: Sequence[RoISample], images: Sequence[Sample], *key: object) -> None:
    """Tell the layers' dropout how many of the rows to come are each image's, and what its masks are drawn from."""
    for number, layer in enumerate(layers.modules()):
        if isinstance(layer, PerImageDropout):
            layer.rows = [(len(own.labels), seed_of(*key, image.id, image.flipped, "dropout", number))
                          for own, image in zip(rois, images, strict=True)]
