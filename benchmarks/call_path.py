"""How far it is from a command to the first backward pass: functions of ours that are entered, their modules, frames.

``python -m benchmarks.call_path`` runs the first two stages of the ``shapes`` recipe on 12 images in a folder of its
own, then ``altopt stage 3`` up to the first call of ``Tensor.backward``, and prints two lines: counted from the command
line's first function, and from the stage function.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from types import FrameType

import torch

import cli

ROOT = Path(__file__).parents[1]
SMALL = ("--workers", "0", "--set", 'data.train=["train:12"]', "--set", "all.iterations=2", "--set",
         "pretrain_on_crops.iterations=2")


class Arrived(BaseException):
    """The first backward pass."""


def ours(frame: FrameType) -> str | None:
    """Return module and name of a frame's code if it is altopt's own; lambdas and bodies of classes count too."""
    name = frame.f_code.co_filename
    return f"{Path(name).relative_to(ROOT)}:{frame.f_code.co_qualname}" if name.startswith(
        tuple(f"{ROOT / top}" for top in ("altopt", "stages", "cache", "cli.py"))) else None


def entered(stage: str) -> tuple[list[str], list[str]]:
    """Return the functions that ``altopt stage 3`` enters before the first backward, in order, and its own frames."""
    functions: list[str] = []
    frames: list[str] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and (name := ours(frame)):
            functions.append(name)

    def backward(*_: object, **__: object) -> None:
        sys.setprofile(None)
        frame: FrameType | None = sys._getframe(1)
        while frame:
            if name := ours(frame):
                frames.append(name)
            frame = frame.f_back
        raise Arrived

    before, torch.Tensor.backward = torch.Tensor.backward, backward  # type: ignore[method-assign]
    sys.setprofile(watch)
    try:
        cli.exit_code(["stage", stage, *SMALL])
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
        torch.Tensor.backward = before  # type: ignore[method-assign]
    return functions, frames[::-1]


def main() -> None:
    """Print the two lines, and the frames."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        # In a process of its own, so that what the stage imports is imported, and counted, when it asks for it.
        subprocess.run([sys.executable, "-c", "import cli; cli.run()", "run-all", "--until", "P1", *SMALL], check=True,
                       capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        functions, frames = entered("3")
    start = next(number for number, name in enumerate(functions) if name.endswith(":train_fast_rcnn"))
    for where, part in (("command", functions), ("stage function", functions[start:])):
        modules = {name.split(":")[0] for name in part}
        print(f"from the {where}: {len(set(part))} functions in {len(modules)} modules")
    print(f"{len(frames)} frames: {' > '.join(frames)}")
    if "--list" in sys.argv:
        print("\n".join(dict.fromkeys(functions[start:])))


if __name__ == "__main__":
    main()
