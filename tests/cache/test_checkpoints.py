import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from altopt.errors import ArtifactError, ResourceError
from cache.checkpoints import (
    digest,
    first_difference,
    load_checkpoint,
    load_state_dict,
    read_description,
    save_checkpoint,
)
from cache.files import sha256_file

ROOT = Path(__file__).parents[2]


def tensors():
    return {
        "conv.weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "conv.bias": torch.nn.Parameter(torch.tensor([0.0, -0.0, float("nan"), float("inf")])),
        "half": torch.randn(5).to(torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "strided": torch.arange(9.0)[::2],
        "view": torch.arange(12.0).reshape(3, 4).t()[1:],
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "M1.safetensors"


def test_round_trip_is_bit_equal(path):
    expected = tensors()
    save_checkpoint(path, expected, {"stage": "train_rpn", "é": [1, 2.5, None]})
    loaded, description = load_checkpoint(path)
    assert first_difference(expected, loaded) is None
    assert description == {"stage": "train_rpn", "é": [1, 2.5, None]}
    assert read_description(path) == description


def test_other_programs_can_read_it(path):
    expected = tensors()
    save_checkpoint(path, expected, {"b": 1, "a": 2})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"altopt": '{"a":2,"b":1}'}
        assert first_difference(expected, {name: file.get_tensor(name) for name in file.keys()}) is None  # noqa: SIM118


def test_same_content_is_the_same_bytes(tmp_path):
    content = tensors()
    turned = dict(reversed([(name, tensor.detach().clone()) for name, tensor in content.items()]))
    save_checkpoint(tmp_path / "a", content, {"x": 1, "y": 2})
    save_checkpoint(tmp_path / "b", turned, {"y": 2, "x": 1})
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")


def test_tensors_that_share_memory_are_each_written(path):
    shared = torch.randn(3)
    save_checkpoint(path, {"a": shared, "b": shared}, {})
    assert first_difference({"a": shared, "b": shared}, load_checkpoint(path)[0]) is None


def test_changing_a_loaded_tensor_leaves_the_file(path):
    save_checkpoint(path, {"a": torch.zeros(3)}, {})
    load_checkpoint(path)[0]["a"].add_(1)
    assert load_checkpoint(path)[0]["a"].tolist() == [0, 0, 0]


def test_no_tensors(path):
    save_checkpoint(path, {}, {})
    assert load_checkpoint(path) == ({}, {})


def test_dtype_that_has_no_name_leaves_no_file(path, names):
    with pytest.raises(TypeError, match="z has dtype complex64"):
        save_checkpoint(path, {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    assert names(path.parent) == []


def test_foreign_file_has_no_description(path):
    save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"})
    loaded, description = load_checkpoint(path)
    assert loaded["a"].tolist() == [1, 1]
    assert description == {}
    save_file({"a": torch.ones(2)}, path)
    assert read_description(path) == {}


def test_missing_file(path):
    for load in (load_checkpoint, read_description, load_state_dict):
        with pytest.raises(ArtifactError, match=r'M1\.safetensors is missing: "altopt plan"'):
            load(path)


def test_every_cut_is_noticed(path):
    save_checkpoint(path, {"a": torch.arange(4.0)}, {"x": 1})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"M1\.safetensors is corrupt .*: make it again"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff\xff",
        b'{"__metadata__":5}',
        b'{"__metadata__":{"altopt":"{"}}',
        b'{"__metadata__":{"altopt":"[]"}}',
        b'{"__metadata__":{"altopt":1}}',
    ],
)
def test_damaged_header(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match="is corrupt"):
        read_description(path)
    with pytest.raises(ArtifactError, match="is corrupt"):
        load_checkpoint(path)


def test_header_that_claims_too_much_is_not_read(path):
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match="begins like no such file"):
        read_description(path)
    with path.open("wb") as file:  # sparse: it takes no room
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(ArtifactError, match="begins like no such file"):
        read_description(path)


def test_full_disk_keeps_the_old_file(path, file_size_limit, names):
    save_checkpoint(path, {"a": torch.zeros(2)}, {})
    with file_size_limit(10_000), pytest.raises(ResourceError, match=r"M1\.safetensors cannot be written"):
        save_checkpoint(path, {"a": torch.zeros(10_000)}, {})
    assert names(path.parent) == ["M1.safetensors"]
    assert load_checkpoint(path)[0]["a"].shape == (2,)


def test_description_is_read_without_torch(path):
    save_checkpoint(path, {"a": torch.zeros(2)}, {"x": 1})
    code = (
        "import sys, pathlib; from cache.checkpoints import read_description;"
        "assert read_description(pathlib.Path(sys.argv[1])) == {'x': 1}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x, "epoch": 3}, lambda x: {"model": x}])
def test_pth_files_are_read_and_unwrapped(tmp_path, wrap, zipped):
    path = tmp_path / "w.pth"
    expected = {"a": torch.randn(3), "b": torch.nn.Parameter(torch.randn(2))}
    torch.save(wrap(expected), path, _use_new_zipfile_serialization=zipped)
    loaded = load_state_dict(path)
    assert first_difference(expected, loaded) is None
    assert not loaded["b"].requires_grad


def test_state_dict_from_safetensors(path):
    save_checkpoint(path, {"a": torch.ones(2)}, {})
    assert load_state_dict(path)["a"].tolist() == [1, 1]


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, save):
    path, trap = tmp_path / "w.pth", tmp_path / "sprung"
    save({"a": torch.ones(2), "b": Trap(str(trap))}, path)
    with pytest.raises(ArtifactError, match=r"w\.pth is refused: .* run code: save model.state_dict"):
        load_state_dict(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert trap.exists()  # the trap was a real one


@pytest.mark.parametrize("content", [{}, torch.ones(2), {"a": 1.5}, {"model": {"a": "text"}}, [torch.ones(2)]])
def test_pth_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"w\.pth holds .*: save model.state_dict"):
        load_state_dict(tmp_path / "w.pth")


def test_damaged_pth_file(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.randn(1000)}, path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"w\.pth is"):
            load_state_dict(path)


def test_digest_covers_name_type_shape_and_value():
    base = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0).double(), "b": torch.zeros(2)},
        {"c": torch.arange(6.0), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.arange(6.0), "b": torch.tensor([0.0, -0.0])},
        {"a": torch.arange(6.0)},
        {},
    ]
    assert len({digest(content) for content in [base, *others]}) == 8
    assert digest(base) == digest(dict(reversed(base.items())))
    assert digest({"a": torch.ones(2, 3).t()}) == digest({"a": torch.ones(3, 2)})


def test_first_difference_in_words():
    a = {"z": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(2, 3), "c": torch.tensor(1)}
    assert first_difference(a, {name: tensor.clone() for name, tensor in a.items()}) is None
    assert first_difference(a, {**a, "z": torch.tensor([1.0, 2.5, 3.25])}) == (
        "z differs in 2 of 3 values, by at most 0.5"
    )
    assert first_difference(a, {**a, "b": torch.zeros(3, 2)}) == "b has shape (2, 3), and (3, 2) on the other side"
    assert first_difference(a, {**a, "c": torch.tensor(1.0)}) == "c has dtype int64, and float32 on the other side"
    assert first_difference(a, {"z": a["z"]}) == "b is missing on the other side"
    assert first_difference(a, {**a, "d": a["z"]}) == "d exists on the other side only"
    assert first_difference(a, {"b": torch.ones(2, 3), "z": a["z"] + 1, "c": a["c"]}).startswith("z ")


def test_first_difference_compares_bits():
    nan = float("nan")
    assert first_difference({"a": torch.tensor([nan])}, {"a": torch.tensor([nan])}) is None
    assert first_difference({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}) == (
        "a differs in 1 of 1 values, by at most 0"
    )
    assert first_difference({"a": torch.tensor([nan, 1.0])}, {"a": torch.tensor([0.0, 1.0])}) == (
        "a differs in 1 of 2 values, by at most 0"
    )
    assert first_difference({"a": torch.empty(0)}, {"a": torch.empty(0)}) is None
    assert first_difference({"a": torch.ones(3, 2).t()}, {"a": torch.ones(2, 3)}) is None


def test_header_is_json_with_one_metadata_key(path):
    save_checkpoint(path, {"a": torch.zeros(2)}, {"x": 1})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"] == {"altopt": '{"x":1}'}
