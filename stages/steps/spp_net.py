"""SPP-net: conv feature maps computed once, the layers above them fine-tuned, SVMs and box regressors on top."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from altopt.config import NetworkConfig, RegionDetectionSettings, TrainingConfig, sourced
from stages.shared.split_config import OnTestSplit, OnTrainSplit
from stages.shared.step import Runtime

SCRIPT = "SPP_net Script_spp_voc"
SCALES = "SPP-net, section 4.2: one scale; five (480, 576, 688, 874, 1200) are a little better and five times the disk"
AREA = "SPP-net, section 4.1: 224 x 224, where the scale is chosen by region"
METHOD = "spp_net"


@dataclass(frozen=True, kw_only=True)
class CacheConvFeatures(OnTrainSplit):
    """Feature maps of the last conv layer for every training image, its mirror image, and every scale."""

    version: ClassVar[int] = 2
    scales: tuple[int, ...] = sourced((688,), SCALES)
    max_side: int = sourced(2000, "Fast R-CNN's config for five scales")
    flips: bool = sourced(True, SCRIPT)
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes; stored as it is computed")


@dataclass(frozen=True, kw_only=True)
class TrainFCLayers(TrainingConfig, OnTrainSplit):
    """Fine-tuning of fc6, fc7 and a softmax on stored maps; each image at a scale drawn at random."""

    version: ClassVar[int] = 2  # halves of a batch by themselves
    iterations: int = sourced(90_000, f"{SCRIPT}: rates 1e-3, 1e-4, 1e-5 for 30,000 each (its limit is 200,000)")
    lr_steps: tuple[int, ...] = sourced((30_000, 60_000), SCRIPT)
    images_per_batch: int = sourced(4, "chosen: SPP-net draws each region from any image, at a reading for each")
    levels: tuple[int, ...] = sourced((6, 3, 2, 1), "SPP-net, section 4.1: 50 bins")
    rois_per_batch: int = sourced(128, SCRIPT)
    fg_fraction: float = sourced(0.25, SCRIPT)
    fg_iou: float = sourced(0.5, SCRIPT)
    bg_iou_high: float = sourced(0.5, SCRIPT)
    bg_iou_low: float = sourced(0.1, SCRIPT)
    proposals: int = sourced(2000, "SPP-net, section 4.1: around 2000 regions an image")
    dropout: float = sourced(0.5, "as AlexNet has it after fc6 and fc7")


@dataclass(frozen=True, kw_only=True)
class CacheRegionFeatures(OnTrainSplit):
    """Features of every region of the training split, from stored maps."""

    version: ClassVar[int] = 1
    region_area: int = sourced(224 * 224, AREA)
    proposals: int = sourced(2000, "SPP-net, section 4.1: around 2000 regions an image")
    regressor_iou: float = sourced(0.5, f"{SCRIPT}: proposals above it train box regressors")
    stored: Literal["float32", "float16"] = sourced("float32", "as they are computed")
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes")
    rois_at_once: int = sourced(512, "chosen: bounds the memory")


@dataclass(frozen=True, kw_only=True)
class DetectSPPNet(RegionDetectionSettings, OnTestSplit):
    """How images of the test split are detected on."""

    version: ClassVar[int] = 1
    scales: tuple[int, ...] = sourced((688,), SCALES)
    max_side: int = sourced(2000, "Fast R-CNN's config for five scales")
    region_area: int = sourced(224 * 224, AREA)
    rois_at_once: int = sourced(512, "chosen: bounds the memory")


def cache_conv_features(init: Path, *, out: Path, config: CacheConvFeatures, runtime: Runtime) -> dict[str, Any]:
    """Cache the conv layers' map of every training image, upright and mirrored, at every scale."""
    from altopt.batches.samples import Sample, read_sample
    from cache.checkpoints import digest
    from cache.features import FeatureMapWriter, MapKey
    from stages.shared.feature_maps import map_shapes, write_maps
    from stages.shared.inference import Inference, written_by_first

    inference = Inference([(init, ("conv",))], config, runtime, split="train")
    network, dataset = inference.networks[0], inference.dataset
    settings = {"network": config.network.name, "scales": list(config.scales), "max_side": config.max_side}
    attributes = {"conv": digest(network.tensors(["conv"])), "dataset": runtime.data_digest, "settings": settings}
    frames = config.network.at_scales(config.scales, config.max_side)
    shapes = map_shapes(dataset, frames, config.flips)

    def read(key: MapKey) -> Sample:
        return read_sample(dataset, key.image_id, frames[key.scale], flipped=key.mirrored)

    with written_by_first(
            runtime.ranks, lambda: FeatureMapWriter(out, attributes, shapes, config.precision)) as writer:
        found = write_maps(writer, shapes, network.conv, read, precision=config.precision, device=inference.device,
                           runtime=runtime)
    if not runtime.ranks.first:
        return {}
    return {"maps": len(shapes), "maps_found": found, "bytes": out.stat().st_size}


def train_fc_layers(init: Path, maps: Path, proposals: Path, *, out: Path, config: TrainFCLayers,
                    runtime: Runtime) -> dict[str, Any]:
    """Fine-tune fc6, fc7 and a softmax on pyramids pooled from stored maps; the conv layers do not change."""
    from altopt.batches.samples import stored_sample
    from altopt.models.region_classifier import PyramidTraining
    from cache.features import FeatureMapFile, MapKey
    from stages.shared.training import CachedProposals, Training, roi_sampling, trainable_entries

    training = Training("train_fc_layers", init, out, config, runtime)
    dataset = training.dataset
    cached = CachedProposals(proposals, dataset, config.proposals)
    sampling = roi_sampling(config)
    entries, unusable = trainable_entries(training, cached, sampling.rule)
    classifier = training.classifier(config.levels)
    training.freeze(classifier, None)
    classifier.set_dropout(config.dropout)
    module = PyramidTraining(classifier, config.levels, sampling, training.key)
    with FeatureMapFile(maps) as stored:
        frames = _stored_frames(stored, maps, training.tensors, config.network)

        def read(entry: Any, iteration: int) -> Any:
            scale = training.scale(len(frames), entry, iteration)
            features = stored.get(MapKey(entry.id, entry.flipped, scale))
            return stored_sample(dataset, entry.id, frames[scale], features, flipped=entry.flipped,
                                 proposals=cached.get(entry.id))

        facts = training.run_on(module, entries, read)
    training.save(classifier, ["conv", "fc", "head"], method=METHOD, levels=list(config.levels))
    return facts | {"images_without_rois": unusable}


def cache_region_features(network: Path, maps: Path, proposals: Path, *, out: Path, config: CacheRegionFeatures,
                          runtime: Runtime) -> dict[str, Any]:
    """Cache fc7 of every region of the training split, and what the box regressors train on."""
    from cache.features import FeatureMapFile
    from stages.shared.region_views import StoredPyramids
    from stages.shared.regions import RegionNetwork, cache_regions

    fine_tuned = RegionNetwork(network, METHOD, config, runtime, "train")
    with FeatureMapFile(maps) as stored:
        frames = _stored_frames(stored, maps, fine_tuned.classifier.tensors(["conv"]), config.network)
        settings = {"region_area": config.region_area, "scales": [frame.short_side for frame in frames]}
        return cache_regions(fine_tuned, StoredPyramids(fine_tuned, frames, stored), proposals, out, METHOD, settings)


def detect_spp_net(network: Path, svms: Path, regressors: Path, proposals: Path, *, out: Path, config: DetectSPPNet,
                   runtime: Runtime) -> dict[str, Any]:
    """Detect on the test split with SPP-net: one pass of the conv layers for each scale, then SVMs and regressors."""
    from stages.shared.region_views import FreshPyramids
    from stages.shared.regions import LinearLayers, RegionNetwork, detect_regions

    fine_tuned = RegionNetwork(network, METHOD, config, runtime, "test")
    frames = config.network.at_scales(config.scales, config.max_side)
    linear = LinearLayers(svms, regressors, fine_tuned)
    return detect_regions(fine_tuned, FreshPyramids(fine_tuned, frames), linear, proposals, out)


def _stored_frames(stored: Any, path: Path, tensors: Any, network: NetworkConfig) -> list[NetworkConfig]:
    """Return the frames of stored maps, after making sure that these conv layers made them."""
    from altopt.errors import ArtifactError
    from cache.checkpoints import digest

    conv = digest({name: tensor for name, tensor in tensors.items() if name.startswith("conv.")})
    if stored.description.get("conv") != conv:
        raise ArtifactError(f"{path.name} was made by other conv layers than the network's: make it again from the "
                            "same pre-trained network")
    return network.at_scales(stored.settings["scales"], stored.settings["max_side"])
