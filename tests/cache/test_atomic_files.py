import errno
import json
import os
import stat
from pathlib import Path

import pytest

from altopt.errors import ArtifactError, ResourceError
from cache.files import (
    atomic_path,
    canonical_json,
    link_or_copy,
    sha256_file,
    write_json_atomic,
    write_text_atomic,
)


def test_file_appears_when_the_block_ends(tmp_path, names):
    path = tmp_path / "new" / "M1"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["M1"]


def test_error_leaves_the_old_file_and_nothing_else(tmp_path, names):
    path = tmp_path / "M1"
    path.write_text("old")

    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["M1"]


def test_leftover_of_a_killed_process_is_not_built_upon(tmp_path):
    path = tmp_path / "M1"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
        leftover = temporary
    leftover.write_text("of a killed process, longer than what follows")
    with atomic_path(path) as temporary:
        assert temporary == leftover
        assert not temporary.exists()
        temporary.write_text("second")
    assert path.read_text() == "second"
    assert not leftover.exists()


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    path = tmp_path / "M1"
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(Path(f"/proc/self/fd/{fd}").readlink().name))

    def replaced(*args):
        calls.append("replace")
        replace(*args)

    monkeypatch.setattr(os, "replace", replaced)
    with atomic_path(path) as temporary:
        temporary.write_text("x")
    assert calls == [temporary.name, "replace", tmp_path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_a_resource_error_with_free_bytes_and_remedy(tmp_path, monkeypatch, number, names):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"M1 cannot be written: .* bytes free\): make room"):
        write_text_atomic(tmp_path / "M1", "x")
    assert names(tmp_path) == []


def test_no_room_inside_the_block(tmp_path, file_size_limit, names):
    with file_size_limit(100), pytest.raises(ResourceError, match="M1 cannot be written"):
        write_text_atomic(tmp_path / "M1", "x" * 1000)
    assert names(tmp_path) == []


def test_unwritable_place_is_an_artifact_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"M1 cannot be written: .*: check the permissions"):
        write_text_atomic(tmp_path / "file" / "M1", "x")


def test_folder_in_the_place_of_the_file_is_an_artifact_error(tmp_path, names):
    (tmp_path / "M1").mkdir()
    with pytest.raises(ArtifactError, match="M1 cannot be written: Is a directory"):
        write_text_atomic(tmp_path / "M1", "x")
    assert names(tmp_path) == ["M1"]


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "M1"):
        (tmp_path / "other").read_text()


def test_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("x")
    write_text_atomic(tmp_path / "M1", "x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "M1")]
    assert modes[0] == modes[1]


def test_json_is_sorted_and_pure(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"b": 1, "a": "é"})
    assert json.loads(path.read_text()) == {"a": "é", "b": 1}
    assert path.read_text().index("a") < path.read_text().index("b")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"a": float("nan")})
    assert canonical_json({"b": (1,), "a": 0.1}) == '{"a":0.1,"b":[1]}'


def test_sha256_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ArtifactError, match="none is missing"):
        sha256_file(tmp_path / "none")


def test_link_or_copy_makes_one_file_of_two(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "sub" / "b").parent.mkdir()
    (tmp_path / "sub" / "b").write_text("what was there before")
    for _ in range(2):  # the second time they are one file already
        link_or_copy(tmp_path / "a", tmp_path / "sub" / "b")
        assert (tmp_path / "sub" / "b").samefile(tmp_path / "a")
        assert [path.name for path in (tmp_path / "sub").iterdir()] == ["b"]


def test_linked_file_stays_when_the_other_is_replaced(tmp_path):
    write_text_atomic(tmp_path / "a", "one")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    write_text_atomic(tmp_path / "a", "two")
    assert (tmp_path / "b").read_text() == "one"


def test_copies_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(path, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "a").write_text("one")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "one"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
