"""Conv layers that do not learn: their map of an image is the same whenever it is made, so it can be stored.

For that it must not depend on the images that share a batch. It does where they go through the layers together:
smaller ones are padded, and near the padding other values arise; and convolutions of several images sum in another
order than those of one, which changes last bits. So each image goes through frozen layers by itself, in its own size.

What is frozen may be all of a network's layers, or the first ones where the others learn. Layers are counted as the
blocks hold them, those without weights too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altopt.batches.samples import Batch, stacked_maps
from altopt.layers import leading


def layers_of(conv: nn.Module) -> list[nn.Module]:
    """Return the layers of all blocks, in order; a module that is not made of blocks is a layer of its own."""
    blocks = list(conv) if isinstance(conv, nn.Sequential) else [conv]
    return [layer for block in blocks for layer in (block if isinstance(block, nn.Sequential) else [block])]


def frozen_depth(conv: nn.Module) -> int:
    """Return how many layers stand before the first that learns."""
    return leading([not any(each.requires_grad for each in layer.parameters()) for layer in layers_of(conv)])


def conv_features(conv: nn.Module, batch: Batch) -> list[tuple[range, Tensor]]:
    """Return the batch's groups, each with its maps, ``Tensor[B, C, h, w]``: ``Batch.groups`` says what they are.

    With autograd from the first layer that learns.
    """
    depth = frozen_depth(conv)
    learning = layers_of(conv)[depth:]
    maps = image_maps(conv, batch, depth)
    return [(group, _through(learning, _together([maps[b] for b in group]))) for group in batch.groups()]


def frozen_features(conv: nn.Module, batch: Batch) -> Tensor:
    """Return what all layers make of each image by itself, as one ``Tensor[B, C, h, w]``, zero-padded at the end.

    The layers above see of the padding what they see beyond the edge of one map: the RPN's convolution pads with zeros,
    anchors outside of an image are not trained on, and no maximum of RoI pooling changes by a zero, as maps end with a
    ReLU.
    """
    return stacked_maps(image_maps(conv, batch))


def image_maps(conv: nn.Module, batch: Batch, depth: int | None = None) -> list[Tensor]:
    """Return each image's map behind so many layers, or all, in its own size: ``Tensor[C, h, w]`` each.

    Without autograd, in the precision that it is computed in. What is stored of it is not made again.
    """
    if batch.maps is None:
        images = [image[:, : sample.size[1], : sample.size[0]]
                  for image, sample in zip(batch.images, batch.samples, strict=True)]
        return [image_map(conv, image, 0, depth) for image in images]
    count = len(layers_of(conv))
    begin, end = (count if each is None else each for each in (batch.layers, depth))
    assert begin <= end, "the stored maps went through layers that learn"
    return list(batch.maps) if begin == end else [image_map(conv, each, begin, end) for each in batch.maps]


@torch.no_grad()
def image_map(conv: nn.Module, image: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    """Return what the layers ``begin`` to ``end`` make of one image, without autograd: ``Tensor[C, h, w]``.

    ``image`` is the normalised image ``Tensor[3, H, W]``, or its map behind the layers before.
    """
    return _through(layers_of(conv)[begin:end], _together([image]))[0]


def _together(images: Sequence[Tensor]) -> Tensor:
    """Return images or maps of one size, ``Tensor[C, h, w]`` each, as ``Tensor[B, C, h, w]`` in channels_last layout.

    Down to the stride of a batch of one: by that too oneDNN decides how it computes.
    """
    rows = [image.permute(1, 2, 0) for image in images]
    stacked = rows[0].contiguous()[None] if len(rows) == 1 else torch.stack(rows)
    return stacked.permute(0, 3, 1, 2)  # (B, C, h, w)


def _through(layers: list[nn.Module], features: Tensor) -> Tensor:
    for layer in layers:
        features = layer(features)
    return features
