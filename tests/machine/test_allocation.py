"""What the C library is told about freed memory, and that it does so."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from altopt.machine import allocation

FAULTS = """
import resource, sys
import numpy as np
from altopt.machine.allocation import give_back_freed_memory, keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(50_000_000, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
keep_freed_memory()
faults()
kept = faults()
give_back_freed_memory()
print(plain, kept, faults())
"""


@pytest.mark.skipif(allocation._glibc() is None, reason="the C library has no such settings")
def test_kept_memory_is_used_again_and_what_is_given_back_is_not():
    """Each page that comes anew from the system is a fault; numpy asks for huge pages, so there are few, but some."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    plain, kept, back = map(int, ran.stdout.split())
    assert kept < 20 < min(plain, back)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocation, "_glibc", lambda: None)
    allocation.keep_freed_memory()
    allocation.give_back_freed_memory()


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=print)])
def test_a_library_without_the_settings_counts_as_another(monkeypatch, library):
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: library)
    assert allocation._glibc.__wrapped__() is None


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_a_system_without_a_c_library_to_ask_counts_as_another(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(allocation.ctypes, "CDLL", refuse)
    assert allocation._glibc.__wrapped__() is None
