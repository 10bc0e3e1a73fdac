"""SVMs on a Fast R-CNN in place of its softmax (Fast R-CNN, section 5.4): features of its regions, and detection."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from altopt.config import RegionDetectionRule, sourced
from stages.split_config import OnTestSplit, OnTrainSplit
from stages.step import Runtime


@dataclass(frozen=True, kw_only=True)
class CachePooledFeatures(OnTrainSplit):
    """Features of every region of the training split; none for box regressors, since the network has its own."""

    version: ClassVar[int] = 1
    regressor_iou: ClassVar[float] = 1.0
    region_area: ClassVar[int] = 1  # the same at one scale, whatever it is
    proposals: int = sourced(2000, "Fast R-CNN, section 2: about 2000 of selective search")
    stored: Literal["float32", "float16"] = sourced("float32", "as they are computed")
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes")
    rois_at_once: int = sourced(512, "chosen: bounds the memory")


@dataclass(frozen=True, kw_only=True)
class DetectWithSVMs(RegionDetectionRule, OnTestSplit):
    """How pictures of the test split are detected on."""

    version: ClassVar[int] = 1
    region_area: ClassVar[int] = 1  # the same at one scale, whatever it is
    rois_at_once: int = sourced(512, "chosen: bounds the memory")


def cache_pooled_features(network: Path, proposals: Path, *, out: Path, config: CachePooledFeatures,
                          runtime: Runtime) -> dict[str, Any]:
    """Cache fc7 of every region of the training split, pooled from the map of its whole picture."""
    from stages.region_views import FreshPyramids
    from stages.regions import FAST_RCNN, RegionNetwork, cache_regions

    trained = RegionNetwork(network, FAST_RCNN, config, runtime, "train")
    regions = FreshPyramids(trained, [config.network])
    return cache_regions(trained, regions, proposals, out, FAST_RCNN, {"scales": [config.network.short_side]})


def detect_with_svms(network: Path, svms: Path, proposals: Path, *, out: Path, config: DetectWithSVMs,
                     runtime: Runtime) -> dict[str, Any]:
    """Detect on the test split with a Fast R-CNN whose regions are scored by SVMs."""
    from stages.fast_rcnn_regions import SVMsAndBoxes
    from stages.region_views import FreshPyramids
    from stages.regions import FAST_RCNN, RegionNetwork, detect_regions

    trained = RegionNetwork(network, FAST_RCNN, config, runtime, "test")
    regions = FreshPyramids(trained, [config.network])
    return detect_regions(trained, regions, SVMsAndBoxes(svms, trained), proposals, out)
