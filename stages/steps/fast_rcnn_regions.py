"""Fast R-CNN on proposals of other origin: detection, at one scale or several, and SVMs in place of its softmax."""
# SVMs: Fast R-CNN, section 5.4. Several scales: section 5.2; each region is pooled at the one that suits it.

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from altopt.config import setting
from stages.shared.detection import Detect, detect_split
from stages.shared.stage_config import CachesRegions, DetectsRegions, OnRegions
from stages.shared.step import Facts, Runtime


@dataclass(frozen=True, kw_only=True)
class DetectOnProposals(Detect, OnRegions):
    """The same, with proposals from a file in place of an RPN's."""

    table: ClassVar[str] = "detect_on_proposals"
    proposals: int = setting(2000, "Fast R-CNN, section 2: about 2000 of selective search")
    scales: tuple[int, ...] = setting(
        (), "the network's short_side alone; five: 480, 576, 688, 864, 1200", at_least=16, at_most="max_side",
        distinct=True)
    max_side: int = setting(2000, "Fast R-CNN's config for five scales; one scale has the network's", at_least=16)
    region_area: int = setting(224 * 224, "SPP-net, section 4.1: where the scale is chosen by region", at_least=1)
    rois_at_once: int = setting(512, "chosen: bounds the memory where there are several scales", at_least=1)


def detect_on_proposals(detector: Path, proposals: Path, *, out: Path, config: DetectOnProposals,
                        runtime: Runtime) -> Facts:
    """Detect on the test split with a Fast R-CNN on proposals of other origin, the best of each image."""
    if not config.scales:
        return detect_split([(detector, ("conv", "fc", "head"))], out, config, runtime, proposals)
    from stages.shared.regions import FAST_RCNN, PyramidRegions, RegionNetwork, detect_regions, softmax_and_boxes

    network = RegionNetwork(detector, FAST_RCNN, config, runtime)
    frames = config.network.at_scales(config.scales, config.max_side)
    regions = PyramidRegions(network, frames, config.region_area)
    return detect_regions(network, regions, softmax_and_boxes(network), proposals, out, config)


@dataclass(frozen=True, kw_only=True)
class CachePooledFeatures(CachesRegions):
    """Features of every region of the training split; none for box regressors, since the network has its own."""


@dataclass(frozen=True, kw_only=True)
class DetectWithSVMs(DetectsRegions):
    """How images of the test split are detected on."""


def cache_pooled_features(network: Path, proposals: Path, *, out: Path, config: CachePooledFeatures,
                          runtime: Runtime) -> Facts:
    """Cache fc7 of every region of the training split, pooled from the map of its whole image."""
    from stages.shared.regions import FAST_RCNN, PyramidRegions, RegionNetwork, cache_regions

    trained = RegionNetwork(network, FAST_RCNN, config, runtime)
    regions = PyramidRegions(trained, [config.network], config.region_area)
    return cache_regions(trained, regions, proposals, out, config, {"scales": [config.network.short_side]})


def detect_with_svms(network: Path, svms: Path, proposals: Path, *, out: Path, config: DetectWithSVMs,
                     runtime: Runtime) -> Facts:
    """Detect on the test split with a Fast R-CNN whose regions are scored by SVMs."""
    from stages.shared.regions import FAST_RCNN, PyramidRegions, RegionNetwork, detect_regions, svms_and_boxes

    trained = RegionNetwork(network, FAST_RCNN, config, runtime)
    regions = PyramidRegions(trained, [config.network], config.region_area)
    return detect_regions(trained, regions, svms_and_boxes(svms, trained), proposals, out, config)
