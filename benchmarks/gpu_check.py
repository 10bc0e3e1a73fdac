"""What a GPU can show of altopt in at most eight minutes: ``python3 -m benchmarks.gpu_check --out FOLDER``.

Runs its parts in order, each within a time limit of its own, and writes what each said to FOLDER, with a summary. It
needs no environment but the interpreter it is started with, and no network.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 480.0  # in all
GRACE = 10.0  # between SIGTERM and SIGKILL
FACTS = """
import platform, torch, torchvision
print(platform.platform(), "python", platform.python_version(), "torch", torch.__version__, "torchvision",
      torchvision.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
for number in range(torch.cuda.device_count()):
    facts = torch.cuda.get_device_properties(number)
    print(facts.name, round(facts.total_memory / 2**30, 1), "GiB", "bfloat16", torch.cuda.is_bf16_supported())
assert torch.cuda.is_available(), "this PyTorch sees no GPU"
"""


@dataclass(frozen=True)
class Part:
    """A command, and how long it may take."""

    name: str
    seconds: float
    arguments: tuple[str, ...]  # of this interpreter


@dataclass(frozen=True)
class Outcome:
    """How a part ended; ``code`` is None where it was stopped at its limit, or never began."""

    name: str
    command: str
    code: int | None
    seconds: float


def parts(out: Path, photographs: Path | None, device: str = "cuda") -> list[Part]:
    """Return what there is to do, the most telling first; ``photographs`` is a data root with PASCAL VOC 2007."""
    bench = ("-m", "benchmarks.bench", "--device", device, "--networks", "vgg16", "--sizes", "600x800", "--rounds", "5")
    made = [
        Part("facts", 60, ("-c", FACTS)),
        Part("tests", 240, ("-m", "pytest", str(ROOT / "tests" / "cuda"), "-m", "cuda", "-rA", "--durations", "20",
                            "-p", "no:cacheprovider", "--junitxml", str(out / "tests.xml"),
                            "-W", "default")),  # another torch may warn of what this one does not
        Part("demo", 120, ("-m", "altopt", "run-all", "--run", "demo", "--device", device, "--json")),
        *(Part(f"bench-{name}", 90, (*bench, *options, "--save", str(out / f"bench-{name}.json")))
          for name, options in (("float32", ("--precision", "float32", "--tf32", "off")),
                                ("tf32", ("--precision", "float32", "--tf32", "on")),
                                ("bfloat16", ("--precision", "bfloat16")))),
    ]
    if photographs:
        made.append(Part("photographs", SECONDS, (
            "-m", "altopt", "run-all", "--recipe", "voc07-squeezenet-mini", "--run", "photographs", "--data-root",
            str(photographs.resolve()), "--device", device, "--json")))
    return made


def run_parts(todo: Sequence[Part], out: Path, seconds: float = SECONDS) -> list[Outcome]:
    """Run the parts one after the other, in ``seconds`` altogether; others run whatever becomes of one.

    The summary is written after each, so that what was seen is there whatever happens next.
    """
    end = time.monotonic() + seconds
    outcomes = []
    for part in todo:
        limit = min(part.seconds, end - time.monotonic() - GRACE)
        outcomes.append(run_part(part, out, limit))
        print(line_of(outcomes[-1]), flush=True)
        write_summary(out, outcomes)
    return outcomes


def run_part(part: Part, out: Path, limit: float) -> Outcome:
    """Run a part in ``out``, where NAME.txt gets what it says; at the limit it and its children are ended."""
    command = [sys.executable, *part.arguments]
    shown = " ".join(command) if part.arguments[0] == "-m" else part.name
    if limit <= 0:
        return Outcome(part.name, shown, None, 0.0)
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (out / f"{part.name}.txt").open("w", encoding="utf-8") as said:
        # In a process group of its own, so that a signal reaches what it started too.
        process = subprocess.Popen(command, cwd=out, env=environment, stdout=said, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(part.name, shown, code, round(time.monotonic() - began, 1))


def line_of(outcome: Outcome) -> str:
    """Return an outcome in words."""
    if outcome.code is not None:
        how = f"exit code {outcome.code}"
    else:
        how = "stopped at its limit" if outcome.seconds else "no time was left"
    return f"{outcome.name}: {how}, {outcome.seconds:.1f} s"


def write_summary(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Write summary.json, and summary.md for people."""
    content = json.dumps([asdict(each) for each in outcomes], indent=1)
    (out / "summary.json").write_text(f"{content}\n", encoding="utf-8")
    lines = [f"# GPU check of {date.today().isoformat()}", ""]
    lines += [f"- {line_of(each)}; `{each.command}`, [what it said]({each.name}.txt)" for each in outcomes]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 1 if one failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="where every result goes")
    parser.add_argument("--data-root", type=Path, help="PASCAL VOC 2007, for photographs through all seven stages")
    parser.add_argument("--device", default="cuda", help="cpu shows that the check itself works")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all")
    chosen = parser.parse_args(arguments)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_parts(parts(out, chosen.data_root, chosen.device), out, chosen.seconds)
    return int(any(each.code != 0 for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
