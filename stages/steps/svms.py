"""Linear SVMs and linear box regressors on cached region features, for SPP-net and slow R-CNN alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from altopt.config import SVMSettings, sourced
from stages.shared.step import Runtime

PENALTY = {"rcnn": 1000.0, "spp_net": 4000.0}


@dataclass(frozen=True, kw_only=True)
class TrainSVMs(SVMSettings):
    """One SVM for each class, in one pass of hard negative mining over the images."""

    version: ClassVar[int] = 1
    norm_target: float = sourced(20.0, "R-CNN rcnn_scale_features: mean norm of features")
    norm_images: int = sourced(100, "py-faster-rcnn train_svms: images that the mean is measured on")
    seed: int = sourced(3, "pfr RNG_SEED")


@dataclass(frozen=True, kw_only=True)
class TrainRegressors:
    """One ridge regression for each class, on whitened box deltas."""

    version: ClassVar[int] = 1
    ridge: float = sourced(0.0, "0 is the scheme's own: 1000 on R-CNN's features (appendix C), 4000 on SPP-net's")
    whitening_floor: float = sourced(0.001, "R-CNN rcnn_train_bbox_regressor: added to the eigenvalues")
    norm_target: float = sourced(20.0, "R-CNN rcnn_scale_features: mean norm of features")
    norm_regions: int = sourced(1000, "chosen: regions that the mean is measured on")
    seed: int = sourced(3, "pfr RNG_SEED")


def train_svms(features: Path, *, out: Path, config: TrainSVMs, runtime: Runtime) -> dict[str, Any]:
    """Train a linear SVM for each class, mining hard negatives image by image."""
    import numpy as np
    import torch

    from altopt.machine.randomness import seed_of
    from altopt.training.svm import MinedSVM, mine, require_solver
    from cache.checkpoints import save_checkpoint
    from cache.region_features import RegionFeatureFile
    from stages.shared.regions import describe_features

    require_solver()
    with RegionFeatureFile(features) as file:
        scale = _svm_scale(file, config)
        svms = [MinedSVM(rows * scale, config, seed_of(config.seed, "svm", name) % 2**31)
                for name, rows in zip(file.classes, _positives(file), strict=True)]
        for image in range(len(file)):
            mine(svms, file.features(image) * scale, file.rows("overlaps", image))
            runtime.report({"event": "images", "done": image + 1, "total": len(file)})
        for svm in svms:
            svm.train()
        zeros = np.zeros(file.width("features"), np.float32)
        weights = [zeros if svm.weights is None else svm.weights * scale for svm in svms]
        biases = [-np.inf if svm.weights is None else svm.bias for svm in svms]  # a class never seen is never found
        tensors = {"weights": torch.from_numpy(np.stack(weights).astype(np.float32)),
                   "biases": torch.tensor(biases, dtype=torch.float32)}
        save_checkpoint(out, tensors, describe_features(file.description))
    return {"positives": sum(len(svm.positives) for svm in svms), "trainings": sum(svm.trainings for svm in svms),
            "trainings_not_converged": sum(svm.unconverged for svm in svms),
            "negatives_kept": sum(len(svm.negatives) for svm in svms), "feature_scale": scale,
            "classes_without_svm": sum(svm.weights is None for svm in svms), "bytes": out.stat().st_size}


def train_regressors(features: Path, *, out: Path, config: TrainRegressors, runtime: Runtime) -> dict[str, Any]:
    """Train a linear regression for each class, from pooled features to the deltas of its boxes."""
    import numpy as np
    import torch

    from altopt.training.ridge import fit_box_ridge
    from cache.checkpoints import save_checkpoint
    from cache.region_features import RegionFeatureFile
    from stages.shared.regions import describe_features

    with RegionFeatureFile(features) as file:
        labels = file.pooled_labels()
        scale = _ridge_scale(file, config)
        penalty = config.ridge or PENALTY[str(file.description["method"])]
        weights = torch.zeros(len(file.classes), 4, file.width("pooled"))
        biases = torch.zeros(len(file.classes), 4)
        for label in range(len(file.classes)):
            own = np.flatnonzero(labels == label)
            if len(own):  # a class without regions leaves its boxes as they are
                def blocks(own: Any = own) -> Any:
                    return (torch.from_numpy(rows) * scale for rows in file.pooled(own))

                targets = torch.from_numpy(file.pooled_targets(own))
                weights[label], biases[label] = fit_box_ridge(blocks, targets, penalty, config.whitening_floor)
            runtime.report({"event": "images", "done": label + 1, "total": len(file.classes), "what": "classes"})
        save_checkpoint(out, {"weights": weights * scale, "biases": biases}, describe_features(file.description))
        unseen = len(file.classes) - len(np.unique(labels))
    return {"regions": len(labels), "ridge": penalty, "feature_scale": scale, "classes_without_regions": unseen,
            "bytes": out.stat().st_size}


def _positives(file: Any) -> list[Any]:
    """Return the features of every class's objects, float32 [P, D] for each class."""
    import numpy as np

    found = [file.objects(image) for image in range(len(file))]
    width = file.width("features")
    return [np.concatenate([np.empty((0, width), np.float32)] + [rows[labels == label] for labels, rows in found])
            for label in range(len(file.classes))]


def _svm_scale(file: Any, config: TrainSVMs) -> float:
    """Return the factor that brings the mean norm of fc7, over some images' regions, to the target."""
    import numpy as np

    from altopt.training.svm import feature_scale

    norms = [np.linalg.norm(file.features(image), axis=1)
             for image in _some(len(file), config.norm_images, config.seed)]
    return feature_scale(np.concatenate([np.empty(0, np.float32), *norms]), config.norm_target)


def _ridge_scale(file: Any, config: TrainRegressors) -> float:
    """Return the factor that brings the mean norm of some pooled regions to the target."""
    import numpy as np

    from altopt.training.svm import feature_scale

    some = np.array(_some(len(file.pooled_labels()), config.norm_regions, config.seed), np.int64)
    norms = [np.linalg.norm(rows, axis=1) for rows in file.pooled(some)]
    return feature_scale(np.concatenate([np.empty(0, np.float32), *norms]), config.norm_target)


def _some(total: int, count: int, seed: int) -> list[int]:
    """Return up to ``count`` of the numbers below ``total``, drawn at random, in order."""
    import torch

    from altopt.machine.randomness import generator

    order = torch.randperm(total, generator=generator(seed, "norms"))[:count]
    return sorted(order.tolist())
