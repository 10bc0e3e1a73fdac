"""What all networks share: they are made of named parts, which go to checkpoints one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NetworkOfParts(nn.Module):
    """A network of parts such as ``conv``, ``fc`` (fc6, fc7) and ``head``, the names that checkpoints use."""

    fc: nn.Sequential

    def set_dropout(self, probability: float) -> None:
        """Set the share of features that training drops after fc6 and fc7."""
        for layer in self.fc.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = probability

    def round_fc(self) -> None:
        """Let fc6 and fc7 hold their weights in bfloat16, in which autocast would make them anew for every batch.

        For networks that only compute, under autocast: the results are the same.
        """
        self.fc.to(torch.bfloat16)

    def tensors(self, parts: Sequence[str]) -> dict[str, Tensor]:
        """Return the named parts' weights, as a checkpoint holds them."""
        return {
            f"{part}.{name}": tensor.detach().to("cpu", memory_format=torch.contiguous_format)
            for part in parts for name, tensor in getattr(self, part).state_dict().items()
        }
