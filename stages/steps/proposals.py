"""Stages 2 and 5: what the RPN proposes on every training image, cached on disk."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from altopt.config import ProposalSettings, sourced
from altopt.datasets.dataset import Dataset
from stages.shared.split_config import OnTrainSplit
from stages.shared.step import Runtime

if TYPE_CHECKING:
    import numpy as np

    from altopt.batches.samples import Batch
    from altopt.models.detector import FasterRCNN


@dataclass(frozen=True, kw_only=True)
class GenerateProposals(ProposalSettings, OnTrainSplit):
    """How the RPN's boxes are made into proposals."""

    version: ClassVar[int] = 2
    images_per_batch: int = sourced(1, "pfr rpn_generate: one image at a time")
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes")


def generate_proposals(rpn: Path, *, out: Path, config: GenerateProposals, runtime: Runtime) -> dict[str, Any]:
    """Cache the RPN's proposals for every training image, upright only.

    Training on frozen conv layers has left a store of what they make of the images, unless it did without.
    """
    from cache.files import sha256_file
    from cache.proposals import ProposalWriter
    from stages.shared.feature_store import FeatureStore
    from stages.shared.inference import Inference, written_by_first

    inference = Inference([(rpn, ("conv", "rpn"))], config, runtime, split="train")
    network = inference.networks[0]
    count = 0
    settings = {field.name: getattr(config, field.name) for field in fields(ProposalSettings)}
    settings |= {"network": asdict(config.network), "precision": config.precision}
    attributes = {"dataset": runtime.data_digest, "model": sha256_file(rpn), "settings": settings}
    store = FeatureStore(out, network.conv, config.network, inference.dataset, runtime, precision=config.precision,
                         device=inference.device)

    def compute(batch: Any) -> list[Any]:
        with inference.autocast():
            return proposed(network, batch, inference.dataset, config)

    with store, written_by_first(runtime.ranks, lambda: ProposalWriter(out, attributes)) as writer:
        store.find(flips=(True, False))
        for found in inference.results(config.images_per_batch, compute, store):
            for id, boxes, scores in found:
                writer.append(id, boxes, scores)
                count += len(scores)
    images = len(inference.dataset.ids)
    return {"images": images, "proposals": count, "per_image": round(count / max(images, 1), 1),
            **store.facts}


def proposed(network: "FasterRCNN", batch: "Batch", dataset: Dataset,
             rule: ProposalSettings) -> "list[tuple[str, np.ndarray, np.ndarray]]":
    """Return each image's id, proposals float32 [K, 4] in the original frame, and scores float32 [K]."""
    from altopt.batches.samples import to_original
    from altopt.models.detector import propose_on
    from altopt.models.frozen import frozen_features

    proposals = propose_on(network, frozen_features(network.conv, batch), batch, rule)
    return [
        (sample.id, to_original(boxes, sample, dataset.size(sample.id)).cpu().numpy(), scores.cpu().numpy())
        for sample, (boxes, scores) in zip(batch.samples, proposals, strict=True)
    ]
