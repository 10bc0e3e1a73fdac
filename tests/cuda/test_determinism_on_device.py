"""``--deterministic`` on a device: twice the same bytes, also after a SIGTERM in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from device_runs import CUDA
from tiny_runs import hashes, write_recipe

ROOT = Path(__file__).parents[2]
NETWORKS = {"alternating": ("M1", "M2", "M3", "M4", "M5"), "approximate-joint": ("M1",), "exact-joint": ("M1",)}


def start(place, scheme, device):
    """Start all stages in a process of its own, as cuBLAS reads its setting when it is first used."""
    place.mkdir(exist_ok=True)
    write_recipe(place / "tiny.toml")
    command = [sys.executable, str(ROOT / "cli.py"), "run-all", "--recipe", "tiny.toml", "--run", "tiny",
               "--scheme", scheme, "--set", "all.iterations=12", "--deterministic", "--device", device,
               "--snapshot-seconds", "0", "--log-every", "1"]
    return subprocess.Popen(command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code=0):
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said


def wait_for(log, artifact, iteration):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else ():
            event = json.loads(line) if line.endswith("}") else {}
            if event.get("artifact") == artifact and event.get("iteration", 0) >= iteration:
                return
        time.sleep(0.01)
    raise AssertionError(f"{artifact} never came to iteration {iteration}")


@pytest.mark.parametrize("scheme", NETWORKS)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_twice_the_same_bytes_also_after_sigterm(tmp_path, scheme, device):
    first, second = (start(tmp_path / name, scheme, device) for name in ("first", "second"))
    finish(first)
    finish(second)
    expected = hashes(tmp_path / "first" / "runs" / "tiny", *NETWORKS[scheme])
    assert hashes(tmp_path / "second" / "runs" / "tiny", *NETWORKS[scheme]) == expected
    stopped = start(tmp_path / "stopped", scheme, device)
    wait_for(tmp_path / "stopped" / "runs" / "tiny" / "log.jsonl", "M1", 5)
    os.kill(stopped.pid, signal.SIGTERM)
    finish(stopped, 143)
    finish(start(tmp_path / "stopped", scheme, device))
    assert hashes(tmp_path / "stopped" / "runs" / "tiny", *NETWORKS[scheme]) == expected
