"""What a trained stage makes sure of before it writes."""

import pytest
import torch
from tiny_runs import config_as, hashes, open_tiny

from stages.pipeline.run import find_step
from stages.shared.stage_config import Trains
from stages.shared.training import Training


@pytest.mark.parametrize("name", ["conv.conv1.0.weight", "conv.conv1.0.bias"])
def test_a_frozen_layer_that_changed_is_noticed(finished, tmp_path, name):
    """Also a bias, whose memory the network shares with the tensors it was filled from."""
    run = open_tiny(finished)
    config = config_as(Trains, run.recipe, find_step(run.recipe.steps, "M3"))
    training = Training("train_rpn_frozen_conv", finished / "M2.safetensors", tmp_path / "M3.safetensors", config,
                        run.runtime)
    network = training.network(("conv", "rpn"))
    training.freeze(network)
    with torch.no_grad():
        network.get_parameter(name).add_(1)
    with pytest.raises(AssertionError, match=r"train_rpn_frozen_conv changed conv.conv1.0, which is frozen"):
        training.save(network, ["conv", "rpn"])
    assert not list(tmp_path.iterdir())


def test_visits_train_as_long_as_the_iterations_that_they_come_to(tmp_path):
    tensors = []
    for name, sets in (("visits", "train_rpn.visits=1.0"), ("iterations", "train_rpn.iterations=3")):
        run = open_tiny(tmp_path / name, sets, 'train_rpn.schedule="one-cycle"')
        for step in run.recipe.steps[:2]:
            run.make(step)
        record = run.record("M1")
        assert record is not None
        assert record.metrics["iterations"] == 3  # six images, two in a batch
        tensors.append(hashes(run.folder, "M1"))
    assert tensors[0] == tensors[1]
