"""Slow R-CNN: fine-tuning on warped regions, the features of every region, detection by SVMs and box regressors."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from altopt.config import SHARE, RoITraining, setting
from stages.shared.stage_config import CachesRegions, DetectsRegions, Trains, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.batches.reading import Entry
    from altopt.batches.samples import Sample

SOLVER = "R-CNN finetuning/pascal_finetune_solver"
SIDE = 227
METHOD = "rcnn"


@dataclass(frozen=True, kw_only=True)
class TrainOnWarpedRegions(RoITraining, Trains):
    """Fine-tuning by softmax on warped regions (R-CNN, section 2.3)."""

    version: ClassVar[int] = 3  # a batch goes through the network once
    iterations: int = setting(70_000, "R-CNN's own models; it saturates near 40,000")
    lr_steps: tuple[int, ...] = setting((20_000, 40_000, 60_000), SOLVER)
    images_per_batch: int = setting(16, "chosen: R-CNN draws each region from any image, at a reading for each")
    crop_side: int = setting(SIDE, "R-CNN, section 2.1", at_least=16)
    proposals: int = setting(2000, "R-CNN, section 2.1: around 2000 regions an image", at_least=1)
    freeze: tuple[str, ...] = setting((), "R-CNN fine-tunes all layers", distinct=True)

    @property
    def work(self) -> Work:
        """A batch of crops through all."""
        return Work(("conv", "fc", "head"), self.rois_per_batch, self.rois_per_batch, self.crop_side)


@dataclass(frozen=True, kw_only=True)
class CacheWarpedFeatures(CachesRegions):
    """Features of every region of the training split."""

    regressor_iou: float = setting(0.6, "R-CNN, appendix C: proposals above it train box regressors", **SHARE)
    rois_at_once: int = setting(128, "chosen: bounds the memory")

    @property
    def work(self) -> Work:
        """A few crops at a time; their side is the network's, and unknown here."""
        return Work(("conv", "fc", "head"), self.rois_at_once, self.rois_at_once, SIDE)


@dataclass(frozen=True, kw_only=True)
class DetectRCNN(DetectsRegions):
    """How images of the test split are detected on."""

    rois_at_once: int = setting(128, "chosen: bounds the memory")

    @property
    def work(self) -> Work:
        """A few crops at a time; their side is the network's, and unknown here."""
        return Work(("conv", "fc", "head"), self.rois_at_once, self.rois_at_once, SIDE)


def train_on_warped_regions(init: Path, proposals: Path, *, out: Path, config: TrainOnWarpedRegions,
                            runtime: Runtime) -> Facts:
    """Fine-tune the network as a classifier of warped regions."""
    from altopt.batches.samples import read_sample
    from altopt.extents import original_frame
    from altopt.models.region_classifier import WarpedTraining
    from stages.shared.training import CachedProposals, Training, roi_sampling, trainable_entries

    training = Training("train_on_warped_regions", init, out, config, runtime)
    dataset = training.dataset
    cached = CachedProposals(proposals, dataset, config.proposals)
    sampling = roi_sampling(config)
    entries, unusable = trainable_entries(training, cached, sampling.thresholds)
    classifier = training.classifier()
    training.freeze(classifier)
    classifier.set_dropout(config.dropout)
    module = WarpedTraining(classifier, config.crop_side, sampling, training.seed)

    def read(entry: "Entry", iteration: int) -> "Sample":
        frame = original_frame(config.network, dataset.size(entry.id))
        return read_sample(dataset, entry.id, frame, flipped=entry.flipped, proposals=cached.get(entry.id))

    facts = training.run(module, entries, read)
    training.save(classifier, ["conv", "fc", "head"], method=METHOD, crop_side=config.crop_side)
    return facts | {"images_without_rois": unusable}


def cache_warped_features(network: Path, proposals: Path, *, out: Path, config: CacheWarpedFeatures,
                          runtime: Runtime) -> Facts:
    """Cache fc7 of every warped region of the training split, and what the box regressors train on."""
    from stages.shared.regions import RegionNetwork, WarpedRegions, cache_regions

    fine_tuned = RegionNetwork(network, METHOD, config, runtime)
    regions = WarpedRegions(fine_tuned)
    return cache_regions(fine_tuned, regions, proposals, out, config, {"crop_side": regions.side})


def detect_rcnn(network: Path, svms: Path, regressors: Path, proposals: Path, *, out: Path, config: DetectRCNN,
                runtime: Runtime) -> Facts:
    """Detect on the test split with slow R-CNN: every proposal warped, scored by SVMs, its box regressed."""
    from stages.shared.regions import RegionNetwork, WarpedRegions, detect_regions, linear_layers

    fine_tuned = RegionNetwork(network, METHOD, config, runtime)
    outputs = linear_layers(svms, regressors, fine_tuned)
    return detect_regions(fine_tuned, WarpedRegions(fine_tuned), outputs, proposals, out, config)
