"""Look into the wheel: ``python -m tests.wheel_contents dist`` fails unless it holds the program, and nothing else."""

import sys
import zipfile
from pathlib import Path

ROOMS = {
    "altopt": ("batches", "datasets", "drawing", "evaluation", "machine", "models", "ops", "proposal_formats",
               "training"),
    "stages": ("console", "pipeline", "recipes", "shared", "steps"),
    "cache": (),
}
PACKAGES = tuple(f"{top}/{room}" if room else top for top, rooms in ROOMS.items() for room in ("", *rooms))


def expected(root: Path) -> set[str]:
    """Return the files of the source tree that belong into the wheel."""
    files = [root / "cli.py"]
    for package in PACKAGES:
        files += (root / package).glob("*.py")
    files += (root / "stages" / "recipes").glob("*.toml")
    files += (root / "altopt" / "datasets").glob("*.txt")
    return {path.relative_to(root).as_posix() for path in files}


def contents(wheel: Path) -> set[str]:
    """Return the files in the wheel, without its own description of itself."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {name for name in names if ".dist-info/" not in name}


def problems(folder: Path, root: Path) -> list[str]:
    """Return what is wrong with the one wheel in the folder, a line each."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        return [f"{folder} holds {len(wheels)} wheels, not one"]
    there, wanted = contents(wheels[0]), expected(root)
    return ([f"{wheels[0].name} lacks {name}" for name in sorted(wanted - there)]
            + [f"{wheels[0].name} should not hold {name}" for name in sorted(there - wanted)])


def main(arguments: list[str]) -> int:
    """Print the problems and return 1 if there are any."""
    found = problems(Path(arguments[0]), Path(__file__).parents[1])
    print("\n".join(found) or "the wheel holds every module, recipe and list, and nothing else")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
