import collections
import io
import os
import pickle
import subprocess

import numpy as np
import pytest

from altopt.errors import ArtifactError
from altopt.proposal_formats.safe_pickle import ADMITTED, load_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
BOX = np.array([[1, 2, 300.5, 400]], np.float32)

# One array in a list, as Python 2 and numpy 1 wrote it, by protocols 2 and 0.
PYTHON_2 = (
    b"\x80\x02]q\x00cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03U\x01bq\x04\x87q\x05"
    b"Rq\x06(K\x01K\x01K\x04\x86q\x07cnumpy\ndtype\nq\x08U\x02f4q\tK\x00K\x01\x87q\nRq\x0b(K\x03U\x01<q\x0cNNNJ\xff\xff"
    b"\xff\xffJ\xff\xff\xff\xffK\x00tq\rb\x89U\x10" + BOX.tobytes() + b"q\x0etq\x0fba.",
    b"(lp0\ncnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\ntp5\nRp6\n(I1\n(I1\nI4\n"
    b"tp7\ncnumpy\ndtype\np8\n(S'f4'\np9\nI0\nI1\ntp10\nRp11\n(I3\nS'<'\np12\nNNNI-1\nI-1\nI0\ntp13\nbI00\nS'"
    + "".join(f"\\x{byte:02x}" for byte in BOX.tobytes()).encode() + b"'\np14\ntp15\nba.",
)


class Attack:
    """Pickled, it makes a file when it is loaded by ``pickle``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def load(tmp_path):
    def save_and_load(content, protocol=2):
        raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
        (tmp_path / "boxes.pkl").write_bytes(raw)
        return load_pickle(tmp_path / "boxes.pkl")

    return save_and_load


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", [
    BOX, BOX.astype(np.float64), BOX.astype(">f4"), BOX.astype(np.uint16), BOX.astype(np.int64), np.empty((0, 4)),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)), np.arange(24).reshape(6, 4)[::2], np.array(3.5),
    np.array(["000005", "7"]), np.array([b"000005"]), BOX > 2, np.arange(200).astype(np.int8),
], ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays_of_every_protocol(load, array, protocol):
    read, again = load([array, array], protocol)
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)
    assert np.array_equal(again, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_numbers_and_texts(load, protocol):
    content = {"ids": ["a", 5, np.int64(7), None], "scores": (0.5, np.float32(0.25), True), "raw": b"\xff", "none": b""}
    plain = {"ids": ["a", 5, 7, None], "scores": [0.5, 0.25, True], "raw": b"\xff", "none": b""}
    assert load(content, protocol) == plain
    assert load(collections.OrderedDict(content), protocol) == plain


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_objects_become_lists(load, protocol):
    ragged = np.empty(3, object)
    ragged[:] = [BOX, np.repeat(BOX, 2, 0), np.empty((0, 4), np.uint8)]
    read = load(ragged, protocol)
    assert [each.shape for each in read] == [(1, 4), (2, 4), (0, 4)]
    assert np.array_equal(read[0], BOX)


@pytest.mark.parametrize("raw", PYTHON_2, ids=["protocol 2", "protocol 0"])
def test_python_2(load, raw):
    assert any(byte > 127 for byte in BOX.tobytes())
    assert np.array_equal(pickle.loads(raw, encoding="latin1")[0], BOX)
    assert np.array_equal(load(raw)[0], BOX)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_attack_is_refused_and_not_executed(load, tmp_path, protocol):
    made = tmp_path / "made"
    attack = [BOX, Attack(os.mkdir, str(made))]
    pickle.loads(pickle.dumps(attack, protocol))
    assert made.is_dir()  # what it does where it can
    made.rmdir()
    with pytest.raises(ArtifactError, match=r"asks to run 'posix.mkdir'") as caught:
        load(attack, protocol)
    assert not made.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("function", "arguments"), [
    (eval, ("1",)), (exec, ("1",)), (getattr, (1, "real")), (__import__, ("os",)), (subprocess.check_output, ("true",)),
    (np.load, ("x",)), (complex, (1,)), (np.fromfile, ("x",)), (io.open, ("x",)), (bytearray, (3,)),
    (pickle.loads, (b"",)),
], ids=lambda value: getattr(value, "__name__", ""))
def test_every_other_name_is_refused(load, function, arguments):
    with pytest.raises(ArtifactError, match="asks to run"):
        load([Attack(function, *arguments)])


@pytest.mark.parametrize("raw", [
    b"c_codecs\nencode.__globals__\n.",
    b"\x80\x04\x8c\x07_codecs\x8c\x10encode.__class__\x93.",
    b"cnumpy.core.multiarray\n_reconstruct.__func__\n.",
    b"cos\nsystem\n.",
    b"c\xc3\xa9\nx\n.",
])
def test_paths_through_admitted_names_are_refused(load, raw):
    with pytest.raises(ArtifactError, match="asks to run"):
        load(raw)


@pytest.mark.parametrize("raw", [
    b"", b"garbage", pickle.dumps([BOX])[:-5], b"\x80\x09.", pickle.dumps({1, 2}),
    b"c_codecs\nencode\n(Vabc\nVbz2\ntR.",  # another codec than latin1
    b"c__builtin__\nbytes\n(I1000000000000\ntR.",  # a size instead of bytes
    b"c_codecs\nencode\n(NV__call__\nI1\nsb.",
    b"c_codecs\nencode\n(dV_function\nI1\nsb.",  # a dict of attributes for a function
    b"c_codecs\nencode\n(N(dV_function\nI1\nstb.",  # the same for its slots
    b"c_codecs\nencode\n.",
    b"cnumpy\ndtype\n(VV8\nI0\nI1\ntR.",
    b"]" * 50 + b"a" * 49 + b".",
])
def test_what_is_no_pickle_of_arrays(load, raw):
    before = dict(ADMITTED)
    with pytest.raises(ArtifactError, match="is not a pickle of arrays, or is damaged") as caught:
        load(raw)
    assert "\n" not in str(caught.value)
    assert before == ADMITTED


def test_raw_bytes_are_never_taken_for_objects(load):
    raw = PYTHON_2[0].replace(b"U\x02f4", b"U\x02O8")
    assert raw != PYTHON_2[0]
    with pytest.raises(ArtifactError, match="objects made of bytes"):
        load(raw)
    with pytest.raises(ArtifactError, match="damaged"):
        load(pickle.dumps([np.zeros(2, [("a", "f4"), ("b", "f4")])]))


def test_lists_within_lists_are_read_once(load):
    """Six times twenty lists in one list: a few bytes that stand for sixty million, were each read anew."""
    nested: list[object] = [BOX]
    for _ in range(6):
        nested = [nested] * 20
    read = load(nested)
    assert read[0] is read[19]


def test_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_pickle(tmp_path / "none.pkl")
