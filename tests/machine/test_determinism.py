"""The switch for deterministic algorithms: where it is on, what it refuses, and that it is put back."""

import pytest
import torch

from altopt.errors import UsageError
from altopt.machine.determinism import fixed_order


def put(index, value):
    """An op that has no deterministic form on any device."""
    return torch.zeros(3).put_(torch.tensor([index]), torch.tensor([value]))


def test_on_inside_the_block_and_off_behind_it():
    with fixed_order():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_off_again_after_an_error():
    with pytest.raises(KeyError), fixed_order():
        raise KeyError("x")
    assert not torch.are_deterministic_algorithms_enabled()


def test_not_wanted_leaves_the_switch_as_it_is():
    with fixed_order(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert put(1, 2.0).tolist() == [0, 2, 0]
    with fixed_order(), fixed_order(False):
        assert torch.are_deterministic_algorithms_enabled()


def test_an_op_without_a_deterministic_form_is_named_in_one_line():
    with pytest.raises(UsageError, match="no deterministic form of put_: use --device cpu, or leave") as caught, \
            fixed_order():
        put(1, 2.0)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), fixed_order():
        raise RuntimeError("something else")


def test_cublas_is_told_unless_the_user_has_told_it(monkeypatch):
    import os

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with fixed_order():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with fixed_order():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
