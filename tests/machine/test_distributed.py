"""How several processes agree, divide work and end; each test is as many processes as it says."""

import pytest
import torch
from rank_runs import in_ranks
from torch import nn

from altopt.batches.local_batches import LocalBatches
from altopt.errors import DataError
from altopt.machine.distributed import OtherRankError, SingleProcess
from altopt.machine.joining import join_processes


def exchanged(ranks):
    module = nn.Linear(2, 1)
    module(torch.full((1, 2), 10.0 ** ranks.rank)).sum().backward()
    if ranks.rank == 2:
        module.bias.grad = None
    ranks.sum_gradients(module.parameters())
    return {"same": ranks.broadcast(("rank", ranks.rank)), "gathered": ranks.all_gather(ranks.rank),
            "total": ranks.all_reduce_sum(torch.tensor([1.0, ranks.rank])).tolist(),
            "greatest": ranks.all_reduce_max(ranks.rank % 2),
            "weight": module.weight.grad.tolist(), "bias": module.bias.grad.tolist(),
            "spread": [list(ranks.map_images(list(range(count)), squares)) for count in (0, 1, 3, 7)],
            "left early": left_early(ranks), "still together": ranks.all_gather(ranks.rank),
            "slices": slices(ranks)}


def squares(items):
    for item in items:
        yield item**2


def left_early(ranks):
    made = ranks.map_images(list(range(10)), squares)
    found = [next(made, None)]
    made.close()
    return found


def slices(ranks):
    """What a rank works on, and whether it counts nothing, for batches of 1 to 5 entries."""
    divided = LocalBatches(ranks, [list("abcde"[:count]) for count in range(1, 6)])
    return [("".join(divided[iteration]), divided.idle(iteration)) for iteration in range(5)]


def fails(ranks):
    if ranks.rank == 1:
        raise DataError("a.jpg: cannot be read")
    ranks.all_gather(None)


@pytest.fixture(scope="module")
def three():
    return in_ranks(3, exchanged)


def test_ranks_agree(three):
    for each in three:
        assert each["same"] == ("rank", 0)
        assert each["gathered"] == each["still together"] == [0, 1, 2]
        assert each["total"] == [3, 3]
        assert each["greatest"] == 1


def test_gradients_add_up_and_are_not_divided(three):
    for each in three:
        assert each["weight"] == [[111, 111]]
        assert each["bias"] == [2]  # one of three has no gradient


def test_rank_0_gets_what_all_make_in_order(three):
    assert three[0]["spread"] == [[], [0], [0, 1, 4], [0, 1, 4, 9, 16, 25, 36]]
    assert three[1]["spread"] == three[2]["spread"] == [[], [], [], []]
    assert three[0]["left early"] == [0]


def test_batches_are_cut_evenly_and_a_rank_without_entries_counts_nothing(three):
    assert [each["slices"] for each in three] == [
        [("a", True), ("a", True), ("a", False), ("a", False), ("a", False)],
        [("a", True), ("a", False), ("b", False), ("b", False), ("bc", False)],
        [("a", False), ("b", False), ("c", False), ("cd", False), ("de", False)],
    ]


def test_the_reason_of_one_is_the_end_of_all():
    with pytest.raises((DataError, OtherRankError)) as caught:
        in_ranks(2, fails)
    assert isinstance(caught.value, DataError | OtherRankError)
    assert caught.value.exit_code == 3


def test_a_process_by_itself_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes() as ranks:
        assert type(ranks) is SingleProcess
        assert (ranks.first, ranks.count, ranks.all_gather(4), ranks.broadcast(5)) == (True, 1, [4], 5)
        assert list(ranks.map_images([1, 2], squares)) == [1, 4]
