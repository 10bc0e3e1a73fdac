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


@pytest.mark.parametrize(("processes", "expected"), [("1", "at exit\n"), ("2", "")])
def test_one_of_several_processes_leaves_without_pythons_own_end(processes, expected):
    """There a thread of gloo's that asks for the interpreter would take the process down."""
    code = "import atexit, cli; atexit.register(print, 'at exit'); cli.exit_code = lambda arguments: 3; cli.run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[1]), "WORLD_SIZE": processes})
    assert (done.returncode, done.stdout, done.stderr) == (3, expected, "")


@pytest.mark.parametrize("shell", ["> /dev/full", ">&-"])
@pytest.mark.parametrize("command", ["plan", "plan --json", "recipe shapes", "--version"])
def test_an_output_that_takes_nothing(tmp_path, command, shell):
    run = ["bash", "-c", f"{sys.executable} {PROGRAM} {command} {shell}"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    if shell == ">&-":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 6
        assert done.stderr.startswith("altopt: the output cannot be written: No space left on device: make room")
        assert done.stderr.count("\n") == 1
