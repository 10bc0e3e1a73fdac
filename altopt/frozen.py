"""Conv layers that do not learn: their map of a picture is the same whenever it is made, so it can be stored.

For that it must not depend on the pictures that share a batch. It does where they go through the layers together:
smaller ones are padded, and near the padding other values arise; and convolutions of several pictures sum in another
order than those of one, which changes last bits. So each picture goes through frozen layers by itself, in its own size.
"""

import torch
from torch import Tensor, nn

from altopt.pictures import Batch, stacked_maps


def conv_features(conv: nn.Sequential, batch: Batch) -> Tensor:
    """Return the maps of a batch, ``Tensor[B, C, h, w]``: of all pictures at once if any of the layers learns.

    If none does: as ``frozen_features``.
    """
    if any(parameter.requires_grad for parameter in conv.parameters()):
        features: Tensor = conv(batch.images)
        return features
    return frozen_features(conv, batch)


def frozen_features(conv: nn.Sequential, batch: Batch) -> Tensor:
    """Return each picture's map, stored or made now, as one ``Tensor[B, C, h, w]`` in float32, zero-padded at the end.

    The layers above see of the padding what they see beyond the edge of one map: the RPN's convolution pads with zeros,
    anchors outside of a picture are not trained on, and no maximum of RoI pooling changes by a zero.
    """
    if batch.features is not None:
        return batch.features
    maps = [
        picture_map(conv, image[:, : sample.size[1], : sample.size[0]])
        for image, sample in zip(batch.images, batch.samples, strict=True)
    ]
    return stacked_maps(maps, batch.images.device)


@torch.no_grad()
def picture_map(conv: nn.Sequential, image: Tensor) -> Tensor:
    """Return what the layers make of one normalised picture ``Tensor[3, H, W]``, without autograd: ``[C, h, w]``."""
    features: Tensor = conv(image[None].contiguous(memory_format=torch.channels_last))
    return features[0]
