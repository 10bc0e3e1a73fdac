"""Stages 2 and 5: what the RPN proposes on every training image, cached on disk."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from altopt.config import ProposalSettings, setting
from altopt.datasets.dataset import Dataset
from stages.shared.stage_config import OnTrainSplit, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from altopt.batches.samples import Batch
    from altopt.models.detector import FasterRCNN

    Proposed = tuple[str, NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class GenerateProposals(ProposalSettings, OnTrainSplit):
    """How the RPN's boxes are made into proposals."""

    version: ClassVar[int] = 2
    images_per_batch: int = setting(1, "py-faster-rcnn rpn_generate: one image at a time", at_least=1)

    @property
    def work(self) -> Work:
        """A batch of images through conv layers and RPN."""
        return Work(("conv", "rpn"), self.images_per_batch)


def generate_proposals(rpn: Path, *, out: Path, config: GenerateProposals, runtime: Runtime) -> Facts:
    """Cache the RPN's proposals for every training image, upright only."""
    # Training on frozen conv layers has left a store of what they make of the images, unless it did without.
    from altopt.batches.samples import Sample, make_batch
    from cache.files import sha256_file
    from cache.proposals import ProposalWriter
    from stages.shared.feature_store import FeatureStore
    from stages.shared.inference import Inference, written_by_first

    inference = Inference([(rpn, ("conv", "rpn"))], config, runtime)
    network, dataset = inference.networks[0], inference.dataset
    settings = {field.name: asdict(config)[field.name] for field in fields(ProposalSettings)}
    settings |= {"network": asdict(config.network), "precision": config.precision}
    attributes = {"dataset": runtime.data_digest, "model": sha256_file(rpn), "settings": settings}
    store = FeatureStore(out, network.conv, network.pixels, config.network, dataset, runtime,
                         precision=config.precision, device=inference.device)

    def read(ids: list[str]) -> list[Sample]:
        return [store.sample(id) for id in ids]

    def compute(_: list[str], samples: list[Sample]) -> "list[Proposed]":
        with inference.autocast():
            return proposed(network, make_batch(samples, inference.device, pixels=network.pixels), dataset, config)

    count = 0
    with store, written_by_first(runtime.ranks, lambda: ProposalWriter(out, attributes)) as writer:
        store.find(flips=(True, False))
        for found in inference.results(inference.groups(config.images_per_batch), read, compute):
            assert writer is not None  # results come to rank 0 alone
            for id, boxes, scores in found:
                writer.append(id, boxes, scores)
                count += len(scores)
    images = len(dataset.ids)
    return {"images": images, "proposals": count, "per_image": round(count / max(images, 1), 1), **store.facts}


def proposed(network: "FasterRCNN", batch: "Batch", dataset: Dataset, settings: ProposalSettings) -> "list[Proposed]":
    """Return each image's id, proposals float32 [K, 4] in the original frame, and scores float32 [K]."""
    from altopt.batches.samples import to_original
    from altopt.models.detector import propose
    from altopt.models.trunk import image_maps

    proposals = propose(network, image_maps(network.conv, batch), batch, settings)
    return [
        (sample.id, to_original(boxes, sample, dataset.size(sample.id)).cpu().numpy(), scores.cpu().numpy())
        for sample, (boxes, scores) in zip(batch.samples, proposals, strict=True)
    ]
