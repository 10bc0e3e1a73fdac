"""``python -m altopt``, in a folder whose modules have the names of ours."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from rank_runs import LOOPBACK, PROGRAM

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("start", [
    ("-m", "altopt", "--version"),
    (str(PROGRAM), "--version"),
    (*TORCHRUN, "-m", "--", "altopt", "--version"),
    (str(PROGRAM), "run-all", "--processes", "2", "--recipe", "none.toml"),
], ids=["python -m", "its path", "torchrun -m", "--processes"])
def test_it_works_from_a_folder_with_a_command_line_of_its_own(tmp_path, start):
    for name in ("cli", "config", "stages"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is the user\'s own')")
    environment = os.environ | LOOPBACK | {"PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run([sys.executable, *start], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "--version" in start:
        assert (done.returncode, done.stdout) == (0, f"altopt, version {version('altopt')}\n")
    else:
        assert done.returncode == 2
        assert done.stderr.count("none.toml") == done.stderr.count("\n") == 1
