"""Which module may import which: the top level one way, and inside altopt and stages every room from lower floors."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("altopt", "cache", "stages", "cli", "tests", "benchmarks")
MAY_IMPORT = {"cli": {"stages", "altopt", "cache"}, "stages": {"stages", "altopt", "cache"},
              "altopt": {"altopt"}, "cache": {"cache", "altopt"}}
# ``python -m altopt`` begins here: it calls the command line, which stands above it.
EXCEPTION = ROOT / "altopt" / "__main__.py"
MODULES = [ROOT / "cli.py", *(path for top in OURS[:3] for path in sorted((ROOT / top).rglob("*.py"))
                              if path != EXCEPTION)]
EACH_MODULE = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())

# A room is a folder, and the modules beside the folders are one room, named by the top. It imports lower floors only.
FLOORS = {
    "altopt": [
        {"altopt"},
        {"altopt.machine", "altopt.datasets", "altopt.drawing"},
        {"altopt.ops", "altopt.evaluation"},
        {"altopt.batches", "altopt.proposal_formats"},
        {"altopt.models"},
        {"altopt.training"},
    ],
    "stages": [
        {"stages.shared", "stages.recipes"},
        {"stages.steps"},
        {"stages"},
        {"stages.pipeline"},
        {"stages.console"},
    ],
}
# To raise one of these is a decision about the layout. A module beside the folders counts as a door of its own here.
MOST = {"altopt": {"doors": 13, "floors": 6, "arrows": 32}, "stages": {"doors": 6, "floors": 5, "arrows": 15}}
EACH_TOP = pytest.mark.parametrize("top", FLOORS)

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


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def imported_modules(path):
    """Return our modules that a file imports."""
    found = set()
    for name in imported(path):
        while name and name not in NAMES:  # what is imported from a module is no module itself
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module_name(path)}


GRAPH = {name: imported_modules(path) for name, path in NAMES.items()}


def room(name):
    """Return the folder that a module lies in."""
    return name if NAMES[name].name == "__init__.py" else name.rpartition(".")[0]


def door(name):
    """Return the module itself if it lies beside the folders, and else its folder."""
    return name if name.count(".") == 1 else room(name)


def arrows(top, place):
    """Return each (from, to) between two places of a top-level folder, with the imports that make it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, targets in GRAPH.items():
        for target in targets:
            if {name.split(".")[0], target.split(".")[0]} == {top} and place(name) != place(target):
                found.setdefault((place(name), place(target)), []).append(f"{name} -> {target}")
    return found


@EACH_TOP
def test_every_room_imports_lower_floors_only(top):
    floor = {name: number for number, names in enumerate(FLOORS[top], start=1) for name in names}
    rooms = {room(name) for name in GRAPH if name.split(".")[0] == top}
    assert rooms == set(floor), "say on which floor a new room stands"
    climbs = {pair: imports for pair, imports in arrows(top, room).items() if floor[pair[0]] <= floor[pair[1]]}
    assert climbs == {}


@EACH_TOP
def test_the_house_stays_small(top):
    between = arrows(top, door)
    doors = {door(name) for name in GRAPH if name.startswith(f"{top}.")} | ({top} if GRAPH[top] else set())
    assert len(doors) <= MOST[top]["doors"], sorted(doors)
    assert len(FLOORS[top]) <= MOST[top]["floors"]
    assert len(between) <= MOST[top]["arrows"], "\n".join(f"{a} -> {b}" for a, b in sorted(between))


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_step_imports_no_other_step():
    steps = {name: targets for name, targets in GRAPH.items() if name.startswith("stages.steps.")}
    assert {name: found for name, targets in steps.items() if (found := targets & set(steps))} == {}


def test_a_climb_and_a_circle_are_found(monkeypatch):
    """Otherwise the tests before this one say nothing."""
    monkeypatch.setitem(GRAPH, "altopt.ops.boxes", GRAPH["altopt.ops.boxes"] | {"altopt.models.rpn"})
    with pytest.raises(AssertionError, match=r"altopt\.ops\.boxes -> altopt\.models\.rpn"):
        test_every_room_imports_lower_floors_only("altopt")
    with pytest.raises(pytest.fail.Exception, match=r"altopt\.ops\.boxes imports altopt\.models\.rpn"):
        test_no_modules_import_each_other_in_a_circle()


@EACH_MODULE
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = [name for name in imported(path) if name.split(".")[0] in OURS]
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
                ["status", "--run", "tiny", "--json"], ["recall", "P1", "--run", "tiny"], ["check-data"], ["--version"],
                ["pln"]]
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
