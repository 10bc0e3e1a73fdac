"""What the configs of stages that run a network over one split of the data set begin with."""

from dataclasses import dataclass
from typing import ClassVar

from altopt.config import NetworkConfig
from altopt.datasets.dataset import DataConfig


@dataclass(frozen=True, kw_only=True)
class OnTrainSplit:
    """A stage that reads the training split, and whose images several processes divide."""

    split: ClassVar[str] = "train"
    divided: ClassVar[bool] = True
    network: NetworkConfig
    data: DataConfig


@dataclass(frozen=True, kw_only=True)
class OnTestSplit(OnTrainSplit):
    """The same on the test split."""

    split: ClassVar[str] = "test"
