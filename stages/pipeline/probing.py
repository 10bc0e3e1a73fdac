"""What ``altopt probe`` shows: how far apart approximate and exact joint training are for a network of the run."""

from dataclasses import asdict
from typing import Any, TypedDict

from altopt.errors import ArtifactError, UsageError
from stages.pipeline.run import Run, find_step
from stages.shared.stage_config import PARTS
from stages.shared.step import Kind, Step
from stages.steps.joint import TrainExactJoint, joint_training, train_exact_joint


class Probe(TypedDict):
    """Gradients with and without the coordinate path: a row for each group of losses and each block of layers."""

    network: str
    images: list[str]
    rows: list[dict[str, Any]]


def probe(run: Run, word: str | None, images: int) -> Probe:
    """Return the gradients of a network's conv layers with the coordinate path beside those without.

    ``word`` names a network with all four parts (by default the last one of the run), ``images`` is how many of the
    training split they are taken on. RoIs, losses and weights are those of the recipe's ``train_exact_joint``.
    """
    import torch

    from altopt.batches.samples import make_batch, read_sample
    from altopt.batches.sampling import choose
    from altopt.machine.randomness import generator
    from altopt.models.joint import CoordinatePath
    from altopt.training.probe import compare_gradients
    from stages.shared.inference import Inference

    networks = [step.output for step in run.recipe.steps if step.kind is Kind.NETWORK]
    artifact = find_step(run.recipe.steps, word).output if word else networks[-1]
    if artifact not in networks:
        raise UsageError(f"{artifact} is not a network: choose among {', '.join(networks)}")
    path = run.path(artifact)
    if not path.is_file():
        raise ArtifactError(f"{artifact} is not in {run.folder}: make it with altopt stage {artifact}, or run-all")
    run.check_data(Step(artifact, train_exact_joint))
    config = run.recipe.build(TrainExactJoint, "train_exact_joint")
    inference = Inference([(path, PARTS)], config, run.runtime)
    network = inference.networks[0]
    network.samples_per_bin = config.samples_per_bin
    module = joint_training(network, config, CoordinatePath(warmup=0, clip=0.0), (config.seed, "probe")).eval()
    every = inference.dataset.ids
    chosen = choose(torch.arange(len(every)), images, generator(config.seed, "probe"))
    ids = [every[k] for k in sorted(chosen.tolist())]
    samples = (module.prepare(read_sample(inference.dataset, id, config.network), k) for k, id in enumerate(ids))
    batches = (make_batch([sample], inference.device, k, pixels=network.pixels) for k, sample in enumerate(samples))
    with inference.autocast():
        rows = compare_gradients(module, batches)
    return {"network": artifact, "images": ids, "rows": [asdict(row) for row in rows]}
