"""SPP-net: conv feature maps computed once, the layers above them fine-tuned, SVMs and box regressors on top."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from altopt.config import SHARE, Bounds, NetworkConfig, RoITraining, setting
from cache.records import JSON
from stages.shared.stage_config import CachesRegions, DetectsRegions, Freeze, OnTrainSplit, Trains, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.batches.reading import Entry
    from altopt.batches.samples import Sample

SCRIPT = "SPP_net Script_spp_voc"
SCALES = "SPP-net, section 4.2: one scale; five (480, 576, 688, 874, 1200) are a little better and five times the disk"
AREA = "SPP-net, section 4.1: 224 x 224, where the scale is chosen by region"
LENGTHS = Bounds(at_least=16, at_most="max_side", non_empty=True, distinct=True)
METHOD = "spp_net"


@dataclass(frozen=True, kw_only=True)
class CacheConvFeatures(OnTrainSplit):
    """Feature maps of the last conv layer for every training image, its mirror image, and every scale."""

    version: ClassVar[int] = 2
    scales: tuple[int, ...] = setting((688,), SCALES, **LENGTHS)
    max_side: int = setting(2000, "Fast R-CNN's config for five scales", at_least=16)
    flips: bool = setting(True, SCRIPT)

    @property
    def work(self) -> Work:
        """An image through the conv layers."""
        return Work(("conv",), 1)


@dataclass(frozen=True, kw_only=True)
class TrainFCLayers(RoITraining, Trains):
    """Fine-tuning of fc6, fc7 and a softmax on stored maps; each image at a scale drawn at random."""

    version: ClassVar[int] = 3  # a batch goes through fc6 and fc7 once
    freeze: ClassVar[Freeze] = "all"
    iterations: int = setting(90_000, f"{SCRIPT}: rates 1e-3, 1e-4, 1e-5 for 30,000 each (its limit is 200,000)")
    lr_steps: tuple[int, ...] = setting((30_000, 60_000), SCRIPT)
    images_per_batch: int = setting(4, "chosen: SPP-net draws each region from any image, at a reading for each")
    levels: tuple[int, ...] = setting((6, 3, 2, 1), "SPP-net, section 4.1: 50 bins", at_least=1, non_empty=True,
                                      distinct=True)
    bg_iou_low: float = setting(0.1, SCRIPT)
    proposals: int = setting(2000, "SPP-net, section 4.1: around 2000 regions an image", at_least=1)

    @property
    def work(self) -> Work:
        """RoIs of stored maps through the fully connected layers."""
        return Work(("conv", "fc", "head"), 0, self.rois_per_batch, levels=self.levels)


@dataclass(frozen=True, kw_only=True)
class CacheRegionFeatures(CachesRegions):
    """Features of every region of the training split, from stored maps."""

    region_area: int = setting(224 * 224, AREA, at_least=1)
    regressor_iou: float = setting(0.5, f"{SCRIPT}: proposals above it train box regressors", **SHARE)


@dataclass(frozen=True, kw_only=True)
class DetectSPPNet(DetectsRegions):
    """How images of the test split are detected on."""

    scales: tuple[int, ...] = setting((688,), SCALES, **LENGTHS)
    max_side: int = setting(2000, "Fast R-CNN's config for five scales", at_least=16)
    region_area: int = setting(224 * 224, AREA, at_least=1)


def cache_conv_features(init: Path, *, out: Path, config: CacheConvFeatures, runtime: Runtime) -> Facts:
    """Cache the conv layers' map of every training image, upright and mirrored, at every scale."""
    from altopt.batches.samples import Sample, read_sample
    from cache.checkpoints import digest
    from cache.features import FeatureMapWriter, MapKey
    from stages.shared.feature_store import map_shapes, write_maps
    from stages.shared.inference import Inference, written_by_first

    inference = Inference([(init, ("conv",))], config, runtime)
    network, dataset = inference.networks[0], inference.dataset
    settings = {"network": config.network.name, "scales": list(config.scales), "max_side": config.max_side,
                "pixels": asdict(network.pixels)}
    attributes = {"conv": digest(network.tensors(["conv"])), "dataset": runtime.data_digest, "settings": settings}
    frames = config.network.at_scales(config.scales, config.max_side)
    shapes = map_shapes(dataset, frames, config.flips)

    def read(key: MapKey) -> Sample:
        return read_sample(dataset, key.image_id, frames[key.scale], flipped=key.mirrored)

    with written_by_first(runtime.ranks, lambda: FeatureMapWriter(out, attributes, shapes, config.precision)) as writer:
        found = write_maps(writer, shapes, network.conv, network.pixels, read, precision=config.precision,
                           device=inference.device, runtime=runtime)
    if not runtime.ranks.first:
        return {}
    return {"maps": len(shapes), "maps_found": found, "bytes": out.stat().st_size}


def train_fc_layers(init: Path, maps: Path, proposals: Path, *, out: Path, config: TrainFCLayers,
                    runtime: Runtime) -> Facts:
    """Fine-tune fc6, fc7 and a softmax on pyramids pooled from stored maps; the conv layers do not change."""
    from altopt.batches.samples import stored_sample
    from altopt.models.region_classifier import PyramidTraining
    from cache.features import FeatureMapFile, MapKey
    from stages.shared.training import CachedProposals, Training, roi_sampling, trainable_entries

    training = Training("train_fc_layers", init, out, config, runtime)
    dataset = training.dataset
    cached = CachedProposals(proposals, dataset, config.proposals)
    sampling = roi_sampling(config)
    entries, unusable = trainable_entries(training, cached, sampling.thresholds)
    classifier = training.classifier(config.levels)
    training.freeze(classifier)
    classifier.set_dropout(config.dropout)
    module = PyramidTraining(classifier, config.levels, sampling, training.seed)
    with FeatureMapFile(maps) as stored:
        frames = _stored_frames(stored, maps, training.tensors, config.network)

        def read(entry: "Entry", iteration: int) -> "Sample":
            scale = training.scale(len(frames), entry, iteration)
            features = stored.get(MapKey(entry.id, entry.flipped, scale))  # (C, h, w)
            return stored_sample(dataset, entry.id, frames[scale], features, flipped=entry.flipped,
                                 proposals=cached.get(entry.id))

        facts = training.run(module, entries, read)
    training.save(classifier, ["conv", "fc", "head"], method=METHOD, levels=list(config.levels))
    return facts | {"images_without_rois": unusable}


def cache_region_features(network: Path, maps: Path, proposals: Path, *, out: Path, config: CacheRegionFeatures,
                          runtime: Runtime) -> Facts:
    """Cache fc7 of every region of the training split, and what the box regressors train on."""
    from cache.features import FeatureMapFile
    from stages.shared.regions import PyramidRegions, RegionNetwork, cache_regions

    fine_tuned = RegionNetwork(network, METHOD, config, runtime)
    with FeatureMapFile(maps) as stored:
        frames = _stored_frames(stored, maps, fine_tuned.classifier.tensors(["conv"]), config.network)
        settings: dict[str, JSON] = {"region_area": config.region_area,
                                     "scales": [frame.short_side for frame in frames]}
        regions = PyramidRegions(fine_tuned, frames, config.region_area, stored)
        return cache_regions(fine_tuned, regions, proposals, out, config, settings)


def detect_spp_net(network: Path, svms: Path, regressors: Path, proposals: Path, *, out: Path, config: DetectSPPNet,
                   runtime: Runtime) -> Facts:
    """Detect on the test split with SPP-net: one pass of the conv layers for each scale, then SVMs and regressors."""
    from stages.shared.regions import PyramidRegions, RegionNetwork, detect_regions, linear_layers

    fine_tuned = RegionNetwork(network, METHOD, config, runtime)
    frames = config.network.at_scales(config.scales, config.max_side)
    outputs = linear_layers(svms, regressors, fine_tuned)
    regions = PyramidRegions(fine_tuned, frames, config.region_area)
    return detect_regions(fine_tuned, regions, outputs, proposals, out, config)


def _stored_frames(stored: Any, path: Path, tensors: Any, network: NetworkConfig) -> list[NetworkConfig]:
    """Return the frames of stored maps, after making sure that these conv layers made them."""
    from altopt.errors import ArtifactError
    from cache.checkpoints import digest

    conv = digest({name: tensor for name, tensor in tensors.items() if name.startswith("conv.")})
    if stored.description.get("conv") != conv:
        raise ArtifactError(f"{path.name} was made by other conv layers than the network's: make it again from the "
                            "same pre-trained network")
    return network.at_scales(stored.settings["scales"], stored.settings["max_side"])
