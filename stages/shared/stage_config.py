"""What the config of every stage is: its fields are the staleness key, its class says how the stage is run. No torch.

A stage's own config stands beside the stage; here is what several of them have in common.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from altopt.config import NetworkConfig, Precision, RegionDetectionSettings, TrainingConfig, setting
from altopt.datasets.dataset import DataConfig

Split = Literal["train", "test"]
Freeze = tuple[str, ...] | Literal["all"]
PARTS = ("conv", "rpn", "fc", "head")


@dataclass(frozen=True)
class Work:
    """What a stage runs at once, from which its memory is estimated before anything runs.

    ``parts`` of the network on so many images and RoIs; images are squares of ``side`` pixels where that is not 0, and
    RoIs have the bins of a pyramid of these ``levels`` where there are any.
    """

    parts: tuple[str, ...]
    images: int
    rois: int = 0
    side: int = 0
    levels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The config of any stage, with what is so unless its class says otherwise."""

    version: ClassVar[int] = 1  # to be raised when the stage computes something else: what older ones made is stale
    table: ClassVar[str] = ""  # of a recipe; empty: the one with the stage's own name
    split: ClassVar[Split | None] = None  # of the data set, that the stage reads
    divided: ClassVar[bool] = False  # whether several processes work on it together; if not, rank 0 does it alone
    stores_maps: ClassVar[bool] = False  # whether it keeps on disk what frozen conv layers make of the images
    keeps_parts: ClassVar[bool] = False  # whether all parts of its input networks are in its output, beside its own

    # Properties, because a field of a subclass may take the place of one, as it may not of a class variable.
    @property
    def init(self) -> str:
        """The network that the stage starts from in place of the list's; empty: the list's."""
        return ""

    @property
    def freeze(self) -> Freeze:
        """Which conv layers stay as they are, by pattern."""
        return ()

    @property
    def scales(self) -> tuple[int, ...]:
        """The lengths of an image's shorter side, where they are not the network's alone."""
        return ()

    @property
    def max_side(self) -> int:
        """How long the longer side may become at those scales; without scales nobody asks."""
        return 0

    @property
    def work(self) -> Work | None:
        """What it runs of a network; None: nothing that is worth an estimate."""
        return None

    def require_packages(self) -> None:
        """Raise ``UsageError`` unless the packages are there that the stage needs beside altopt's own."""


@dataclass(frozen=True, kw_only=True)
class ReadsData(StageConfig):
    """A stage that reads a split of the data set."""

    split: ClassVar[Split] = "train"
    data: DataConfig


@dataclass(frozen=True, kw_only=True)
class OnTrainSplit(Precision, ReadsData):
    """A stage that runs a network over the training split, whose images several processes divide."""

    divided: ClassVar[bool] = True
    network: NetworkConfig


@dataclass(frozen=True, kw_only=True)
class OnTestSplit(OnTrainSplit):
    """The same on the test split."""

    split: ClassVar[Split] = "test"


@dataclass(frozen=True, kw_only=True)
class TrainsOnData(TrainingConfig, ReadsData):
    """A stage that trains something on the training split."""


@dataclass(frozen=True, kw_only=True)
class Trains(TrainsOnData, OnTrainSplit):
    """A stage that trains a network of the run."""


@dataclass(frozen=True, kw_only=True)
class TrainsOnImages(Trains):
    """The same on whole images, from the list's network or from another one."""

    stores_maps: ClassVar[bool] = True
    init: str = setting("", "the list's own")


@dataclass(frozen=True, kw_only=True)
class OnRegions(OnTrainSplit):
    """A stage that runs a network over the proposals of a split."""

    proposals: int = setting(2000, "R-CNN, section 2.1; SPP-net, 4.1; Fast R-CNN, 2: about 2000 an image", at_least=1)
    rois_at_once: int = setting(512, "chosen: bounds the memory", at_least=1)

    @property
    def work(self) -> Work:
        """A few regions of an image at a time."""
        return Work(("conv", "fc", "head"), 1, self.rois_at_once)

    @property
    def region_area(self) -> int:
        """The pixels that a region is to have at the scale it is pooled at: any number where there is one scale."""
        return 1


@dataclass(frozen=True, kw_only=True)
class CachesRegions(OnRegions):
    """A stage that caches the features of every region of the training split."""

    stored: Literal["float32", "float16"] = setting("float32", "as they are computed")

    @property
    def regressor_iou(self) -> float:
        """The IoU above which a proposal trains box regressors: none does."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class DetectsRegions(RegionDetectionSettings, OnRegions):
    """A stage that detects among the proposals of the test split by SVMs."""

    split: ClassVar[Split] = "test"
