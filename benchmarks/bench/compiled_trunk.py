"""Conv layers by way of torch.compile, to see what that would bring."""

import copy

import torch
from torch import Tensor, nn

from altopt.errors import UsageError


class CompiledTrunk(nn.Module):
    """Conv layers by way of torch.compile, which says in one line why it cannot."""

    def __init__(self, conv: nn.Sequential) -> None:
        super().__init__()
        conv = copy.deepcopy(conv)
        for layer in conv.modules():  # without hooks, which would break the graph
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
        self.compiled = torch.compile(conv)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature maps; UsageError where there is no compiler."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            features: Tensor = self.compiled(images)
        except (TorchDynamoException, RuntimeError, OSError) as error:
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"--compile: torch.compile does not work here ({cause}): install a C++ compiler such as "
                             "g++ with Python's headers, or leave --compile out") from None
        return features
