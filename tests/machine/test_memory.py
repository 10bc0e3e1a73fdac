import pytest

from altopt.machine import memory
from altopt.machine.memory import Memory, memory_left

MEMINFO = "MemTotal:  8000000 kB\nMemFree: 100 kB\nMemAvailable:  4000 kB\nSwapFree:  500 kB\nHugePages_Total:  0\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def group(folder, limit, used, **files):
    folder.mkdir(parents=True)
    names = ("memory.max", "memory.current") if folder.name == "cgroup" else (
        "memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in files.items()))


def test_without_a_container(machine):
    assert memory_left() == Memory(4_096_000, 512_000)


@pytest.mark.parametrize(("limit", "used", "expected"), [
    (3_000_000, 1_000_000, Memory(2_100_000, 0)),  # the cache of files can be given back
    (3_000_000, 9_000_000, Memory(0, 0)),
    (90_000_000, 1_000_000, Memory(4_096_000, 512_000)),  # the limit is above what the machine has
    ("max", 1_000_000, Memory(4_096_000, 512_000)),
])
def test_limit_of_a_container(machine, limit, used, expected):
    group(machine / "cgroup", limit, used, anon=5, inactive_file=100_000)
    assert memory_left() == expected


@pytest.mark.parametrize(("limit", "available"), [(3_000_000, 2_000_000), (2**63 - 4096, 4_096_000)])
def test_limit_of_a_container_of_version_1(machine, limit, available):
    group(machine / "cgroup" / "memory", limit, 1_000_000)
    left = memory_left()
    assert left is not None
    assert left.available == available


@pytest.mark.parametrize("text", [None, "", "MemAvailable: much kB\n", "MemFree: 7 kB\n"])
def test_a_system_that_does_not_say(machine, text):
    (machine / "meminfo").unlink()
    if text is not None:
        (machine / "meminfo").write_text(text)
    assert memory_left() is None


def test_here():
    left = memory_left()
    assert left is None or 0 < left.available < 1 << 50
