import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("altopt", "cache", "stages", "cli", "tests")
MAY_IMPORT = {"cli": {"stages", "altopt", "cache"}, "stages": {"stages", "altopt", "cache"},
              "altopt": {"altopt"}, "cache": {"cache", "altopt"}, "__main__": {"cli"}}
MODULES = [ROOT / "cli.py", *(path for top in OURS[:3] for path in sorted((ROOT / top).rglob("*.py")))]
EACH_MODULE = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())

# Commands that answer at once: they must not wait for torch, which takes seconds to import, nor, where they only look
# at files, for what takes half of their time.
HEAVY = ("torch", "torchvision", "h5py", "safetensors", "numpy", "PIL", "rich", "importlib.metadata")
RUNNER = """
import contextlib, io, sys
import cli
for arguments in {commands}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = cli.exit_code(arguments)
    print(code, *(name for name in {heavy} if name in sys.modules), *arguments)
"""


def imported(path):
    """Every module that a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@EACH_MODULE
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = [name for name in imported(path) if name.split(".")[0] in OURS]
    if path.relative_to(ROOT).as_posix() == "altopt/__main__.py":
        part = "__main__"  # python -m altopt: the one exception
    assert {name.split(".")[0] for name in ours} <= MAY_IMPORT[part]
    if part == "cache":
        assert all(name.startswith(("cache.", "altopt.errors.")) for name in ours)


def test_the_scan_finds_imports_inside_functions():
    names = imported(ROOT / "stages" / "steps" / "assemble.py")
    assert "cache.checkpoints.save_checkpoint" in names


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"],
                         ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_packages_export_nothing_but_the_schemes(path):
    assert (path.read_text() == "") == (path.parent != ROOT / "stages")


def test_no_package_of_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def answers(commands, folder, heavy):
    """Run commands in one process; return a line for each: its exit code, the heavy modules imported, itself."""
    done = subprocess.run([sys.executable, "-c", RUNNER.format(commands=commands, heavy=heavy)], cwd=folder,
                          capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    return done.stdout.splitlines()


def test_quick_commands_do_not_import_torch(copied):
    commands = [["--help"], ["plan", "--help"], ["recipes"], ["recipe", "shapes"], ["recipe", "tiny.toml", "--json"],
                ["stage", "3", "--help"], ["plan"], ["status"], ["plan", "--run", "tiny"],
                ["status", "--run", "tiny", "--json"], ["recall", "P1", "--run", "tiny"], ["--version"], ["pln"],
                ["bench", "--help"]]
    expected = [f"{0 if each != ['pln'] else 2} {' '.join(each)}" for each in commands]
    assert answers(commands, copied.parents[1], ("torch",)) == expected


def test_commands_that_only_look_at_files_import_nothing_heavy(copied):
    commands = [["--help"], ["plan", "--help"], ["recipes"], ["recipe", "shapes"], ["stage", "3", "--help"], ["plan"],
                ["status"], ["plan", "--run", "tiny"], ["status", "--run", "tiny"], ["plan", "--run", "tiny", "--json"]]
    expected = [f"0 {' '.join(each)}" for each in commands]
    assert answers(commands, copied.parents[1], HEAVY) == expected


@pytest.mark.parametrize(("recipe", "files"), [
    ("voc07-vgg16", ("VOC2007/JPEGImages/a.jpg", "VOC2007/Annotations/a.xml", "VOC2007/ImageSets/Main/trainval.txt")),
    ("coco-vgg16", ("annotations/instances_train2017.json", "train2017/a.jpg")),
])
def test_nor_where_the_files_of_a_data_set_lie_on_the_disk(copied, altopt, recipe, files):
    for name in files:
        path = copied.parents[1] / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    command = ["plan", "--recipe", recipe, "--run", "tiny", "--data-root", "data"]
    assert "the images or annotations changed" in altopt(*command).out  # so their hashes were looked at
    assert answers([command], copied.parents[1], HEAVY) == [f"0 {' '.join(command)}"]
