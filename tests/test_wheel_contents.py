import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheel_contents import PACKAGES, expected, main, problems

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(tmp_path):
    def make(without=(), more=()):
        names = (expected(ROOT) - set(without)) | {"altopt-0.1.0.dist-info/METADATA"} | set(more)
        with zipfile.ZipFile(tmp_path / "altopt-0.1.0-py3-none-any.whl", "w") as archive:
            for name in sorted(names):
                archive.writestr(name, "")
        return tmp_path

    return make


def test_whole_wheel(build):
    assert problems(build(), ROOT) == []


def test_expected_files():
    files = expected(ROOT)
    assert {"cli.py", "altopt/models/rpn.py", "altopt/datasets/voc.py", "cache/lock.py", "stages/__init__.py",
            "stages/recipes/shapes.toml", "stages/recipes/__init__.py"} <= files
    assert not [name for name in files if name.startswith(("tests", "runs", "build"))]


def test_packages_are_those_of_setup_cfg_and_of_the_tree():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {name.replace(".", "/") for name in config["options"]["packages"].split()} == set(PACKAGES)
    in_tree = {path.parent.relative_to(ROOT).as_posix()
               for top in ("altopt", "cache", "stages") for path in (ROOT / top).rglob("*.py")}
    assert in_tree == set(PACKAGES)


@pytest.mark.parametrize("name", ["cli.py", "altopt/evaluation/voc.py", "stages/recipes/shapes.toml"])
def test_missing_file(build, name):
    assert problems(build(without=[name]), ROOT) == [f"altopt-0.1.0-py3-none-any.whl lacks {name}"]


@pytest.mark.parametrize("name", ["tests/test_cli.py", "runs/shapes/M1.safetensors", "altopt/old.py"])
def test_foreign_file(build, name):
    assert problems(build(more=[name]), ROOT) == [f"altopt-0.1.0-py3-none-any.whl should not hold {name}"]


def test_no_wheel(tmp_path):
    assert problems(tmp_path, ROOT) == [f"{tmp_path} holds 0 wheels, not one"]


def test_exit_codes(build, capsys):
    assert main([str(build())]) == 0
    assert "nothing else" in capsys.readouterr().out
    assert main([str(build(without=["cli.py"]))]) == 1
    assert "lacks cli.py" in capsys.readouterr().out


def test_runs_as_the_makefile_calls_it(build):
    command = [sys.executable, "-m", "tests.wheel_contents", str(build(more=["tests/x.py"]))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "should not hold tests/x.py" in done.stdout
