"""Linear SVMs and linear box regressors on cached region features, for SPP-net and slow R-CNN alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.config import SVMSettings, setting
from stages.shared.events import ImagesDone
from stages.shared.stage_config import StageConfig
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import torch
    from numpy.typing import NDArray

PENALTY = {"rcnn": 1000.0, "spp_net": 4000.0}


@dataclass(frozen=True, kw_only=True)
class TrainSVMs(SVMSettings, StageConfig):
    """One SVM for each class, in one pass of hard negative mining over the images."""

    norm_target: float = setting(20.0, "R-CNN rcnn_scale_features: mean norm of features", above=0)
    norm_images: int = setting(100, "py-faster-rcnn train_svms: images that the mean is measured on", at_least=1)
    seed: int = setting(3, "py-faster-rcnn RNG_SEED", at_least=0)

    def require_packages(self) -> None:
        """The solver is scikit-learn's."""
        from altopt.training.svm import require_solver

        require_solver()


@dataclass(frozen=True, kw_only=True)
class TrainRegressors(StageConfig):
    """One ridge regression for each class, on whitened box deltas."""

    ridge: float = setting(0.0, "0 is the scheme's own: 1000 on R-CNN's features (appendix C), 4000 on SPP-net's",
                           at_least=0)
    whitening_floor: float = setting(0.001, "R-CNN rcnn_train_bbox_regressor: added to the eigenvalues", at_least=0)
    norm_target: float = setting(20.0, "R-CNN rcnn_scale_features: mean norm of features", above=0)
    norm_regions: int = setting(1000, "chosen: regions that the mean is measured on", at_least=1)
    seed: int = setting(3, "py-faster-rcnn RNG_SEED", at_least=0)


def train_svms(features: Path, *, out: Path, config: TrainSVMs, runtime: Runtime) -> Facts:
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
        scale = _scale(len(file), config.norm_images, config.seed,
                       lambda image: file.rows("features", image), config.norm_target)
        found = [file.objects(image) for image in range(len(file))]  # (labels, features) of annotated objects
        none = np.empty((0, file.width("features")), np.float32)
        svms = []
        for label, name in enumerate(file.classes):
            positives = np.concatenate([none, *(rows[labels == label] for labels, rows in found)])  # (P, D)
            svms.append(MinedSVM(positives * scale, config, seed_of(config.seed, "svm", name) % 2**31))
        for image in range(len(file)):
            mine(svms, file.rows("features", image) * scale, file.rows("overlaps", image))
            runtime.report(ImagesDone(image + 1, len(file)))
        for svm in svms:
            svm.train()
        zeros = np.zeros(file.width("features"), np.float32)  # (D,)
        weights = [zeros if svm.weights is None else svm.weights * scale for svm in svms]
        biases = [-np.inf if svm.weights is None else svm.bias for svm in svms]  # a class never seen is never found
        tensors = {"weights": torch.from_numpy(np.stack(weights).astype(np.float32)),
                   "biases": torch.tensor(biases, dtype=torch.float32)}
        save_checkpoint(out, tensors, describe_features(file.description))
    return {"positives": sum(len(svm.positives) for svm in svms), "trainings": sum(svm.trainings for svm in svms),
            "trainings_not_converged": sum(svm.unconverged for svm in svms),
            "negatives_kept": sum(len(svm.negatives) for svm in svms), "feature_scale": scale,
            "classes_without_svm": sum(svm.weights is None for svm in svms), "bytes": out.stat().st_size}


def train_regressors(features: Path, *, out: Path, config: TrainRegressors, runtime: Runtime) -> Facts:
    """Train a linear regression for each class, from pooled features to the deltas of its boxes."""
    import numpy as np
    import torch

    from altopt.training.ridge import fit_box_ridge
    from cache.checkpoints import save_checkpoint
    from cache.region_features import RegionFeatureFile
    from stages.shared.regions import describe_features

    with RegionFeatureFile(features) as file:
        labels = file.pooled_labels()  # (sum of Q,)
        scale = _scale(len(labels), config.norm_regions, config.seed,
                       lambda region: next(file.pooled(np.array([region]))), config.norm_target)
        penalty = config.ridge or PENALTY[str(file.description["method"])]
        weights = torch.zeros(len(file.classes), 4, file.width("pooled"))  # (K, 4, E)
        biases = torch.zeros(len(file.classes), 4)  # (K, 4)
        for label in range(len(file.classes)):
            own = np.flatnonzero(labels == label)
            if len(own):  # a class without regions leaves its boxes as they are
                def blocks(own: "NDArray[np.int64]" = own) -> "Iterator[torch.Tensor]":
                    return (torch.from_numpy(rows) * scale for rows in file.pooled(own))

                targets = torch.from_numpy(file.pooled_targets(own))  # (n, 4)
                weights[label], biases[label] = fit_box_ridge(blocks, targets, penalty, config.whitening_floor)
            runtime.report(ImagesDone(label + 1, len(file.classes), "classes"))
        save_checkpoint(out, {"weights": weights * scale, "biases": biases}, describe_features(file.description))
        unseen = len(file.classes) - len(np.unique(labels))
    return {"regions": len(labels), "ridge": penalty, "feature_scale": scale, "classes_without_regions": unseen,
            "bytes": out.stat().st_size}


def _scale(count: int, drawn: int, seed: int, rows: "Callable[[int], NDArray[np.float32]]", target: float) -> float:
    """Return the factor that brings the mean norm of features to the target.

    It is taken over ``rows(n)``, float32 [., D], of up to ``drawn`` of the numbers n below ``count``.
    """
    import numpy as np
    import torch

    from altopt.machine.randomness import generator
    from altopt.training.svm import feature_scale

    some = torch.randperm(count, generator=generator(seed, "norms"))[:drawn].sort().values.tolist()
    norms = [np.linalg.norm(rows(n), axis=1) for n in some]
    return feature_scale(np.concatenate([np.empty(0, np.float32), *norms]), target)
