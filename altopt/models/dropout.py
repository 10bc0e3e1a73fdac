"""fc6 and fc7, with dropout whose masks belong to images.

What is dropped of a RoI does not depend on the images that share its batch, so any number of processes that divide a
batch train the same network.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altopt.machine.randomness import seed_of
from altopt.ops.targets import RoISample


class FullyConnected(nn.Sequential):
    """fc6 and fc7, each with a ReLU and dropout, from pooled RoIs to vectors of ``hidden_size``."""

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__(OrderedDict([
            ("fc6", nn.Linear(inputs, hidden_size)), ("relu6", nn.ReLU(inplace=True)), ("drop6", nn.Dropout(0.5)),
            ("fc7", nn.Linear(hidden_size, hidden_size)), ("relu7", nn.ReLU(inplace=True)), ("drop7", nn.Dropout(0.5)),
        ]))

    def forward(self, input: Tensor, rois: Sequence[RoISample] = ()) -> Tensor:
        """Return ``Tensor[R, D]`` for pooled RoIs ``Tensor[R, E]``.

        Training says which rows are which image's RoIs; without them dropout is torch's own.
        """
        for number, layer in enumerate(self):
            if isinstance(layer, nn.Dropout) and self.training and rois:
                input = input * _mask(input, layer.p, rois, number) if layer.p else input
            else:
                input = layer(input)
        return input


def _mask(hidden: Tensor, probability: float, rois: Sequence[RoISample], layer: int) -> Tensor:
    """Return what to multiply ``Tensor[R, D]`` by: 0 where it is dropped, 1 / (1 - probability) elsewhere."""
    masks = []
    for each in rois:
        # A generator of its own: torch's would make a mask depend on what was drawn before.
        random = torch.Generator(hidden.device).manual_seed(seed_of(each.dropout_seed, layer))
        mask = hidden.new_empty(len(each.labels), hidden.shape[1])  # (R_b, D)
        masks.append(mask.bernoulli_(1 - probability, generator=random))
    return torch.cat(masks) / (1 - probability)
