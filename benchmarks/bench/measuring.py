"""What each stage's step costs, beside torchvision, and what follows for the whole schedule."""

import itertools
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from altopt.config import NETWORKS
from altopt.datasets.shapes import SMALLEST_IMAGE
from altopt.errors import UsageError
from benchmarks.bench import stage_contenders, torchvision_contenders
from benchmarks.bench.contender import Contender, Precision
from benchmarks.bench.machine import computes_bfloat16, machine_facts
from benchmarks.bench.rounds import run_rounds
from benchmarks.bench.schedule import Figures, ratios, schedule
from benchmarks.bench.stopwatch import Stopwatch
from benchmarks.bench.watching import watched
from benchmarks.bench.workplace import Workplace
from stages.pipeline.recipe import nearest
from stages.shared.step import Runtime
from stages.shared.training import device_of

FORMAT_VERSION = 1
CONTENDERS = (*stage_contenders.NAMES, *torchvision_contenders.NAMES)
CLOCKS = {"wall": "seconds", "processor": "processor_seconds"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. ``precision`` "auto" is float32, and bfloat16 where the hardware computes in it."""

    networks: tuple[str, ...] = NETWORKS
    sizes: tuple[tuple[int, int], ...] = ((800, 600), (400, 300))
    contenders: tuple[str, ...] = CONTENDERS
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    precision: str = "auto"
    rounds: int = 3
    clock: str = "wall"
    compiled: bool = False
    tf32: str = "torch"  # how float32 is multiplied on a GPU: as torch does by itself, or "on", or "off"

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """Return the precisions in which altopt is measured on a device; torchvision always is in both."""
        if self.precision == "auto":
            return ("float32", "bfloat16") if computes_bfloat16(device) else ("float32",)
        chosen: dict[str, tuple[Precision, ...]] = {
            "float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("float32", "bfloat16")}
        return chosen[self.precision]

    def as_dict(self) -> dict[str, Any]:
        """Return the settings, JSON-able."""
        return {
            "networks": list(self.networks), "sizes": [_text(size) for size in self.sizes],
            "contenders": list(self.contenders), "devices": [str(device) for device in self.devices],
            "precision": self.precision, "rounds": self.rounds, "clock": CLOCKS[self.clock],
            "compiled": self.compiled, "tf32": self.tf32,
        }


def make_plan(*, networks: str | None = None, sizes: str = "600x800,300x400", contenders: str | None = None,
              device: str = "all", **others: Any) -> Plan:
    """Return the plan that the words of the command line ask for. Raises ``UsageError``, with the nearest word."""
    if device == "all":
        devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    else:
        devices = [device_of(Runtime(device=word.strip())) for word in device.split(",")]
    return Plan(networks=_words("network", networks, NETWORKS), contenders=_words("contender", contenders, CONTENDERS),
                sizes=tuple(_size(word) for word in sizes.split(",")), devices=tuple(devices), **others)


def measure(plan: Plan, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the report of a bench, JSON-able; benchmarks/RESULTS.md says what stands in it."""
    set_tf32(plan.tf32)
    machine = machine_facts(list(plan.devices))
    results = []
    for network, size in itertools.product(plan.networks, plan.sizes):
        say(f"{network}, images of {_text(size)}")
        results += _measured(plan, network, size, say)
    return {"version": FORMAT_VERSION, "command": command, "machine": machine, "settings": plan.as_dict(),
            "results": results}


def set_tf32(wanted: str) -> None:
    """Let products and convolutions of float32 on a GPU round to TF32 or not; "torch" leaves both as torch has them."""
    if wanted != "torch":
        for switch in float32_switches():
            switch.fp32_precision = "tf32" if wanted == "on" else "ieee"


def float32_switches() -> list[Any]:
    """Return where torch keeps, as ``fp32_precision``, how a GPU multiplies matrices and convolves."""
    return [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]


def _measured(plan: Plan, network: str, size: tuple[int, int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a result for each device, all measured in the same rounds."""
    watch = Stopwatch(time.process_time if plan.clock == "processor" else time.perf_counter)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="altopt-bench-")))
        stack.enter_context(watched(watch))
        entered = []
        for number, device in enumerate(plan.devices):
            place = stack.enter_context(Workplace(network, size, device, folder / str(number), watch))
            entered += [(each, device) for each in _contenders(plan, place)]
        measured = run_rounds(entered, plan.rounds, say)
        rows = {device: [each.as_dict() for each in measured if each.device is device] for device in plan.devices}
    return [_result(plan, network, size, device, rows[device]) for device in plan.devices]


def _contenders(plan: Plan, place: Workplace) -> Iterator[Contender]:
    names = set(plan.contenders)
    precisions = plan.precisions(place.device)
    yield from stage_contenders.stage_contenders(place, names, precisions, plan.compiled)
    yield from torchvision_contenders.torchvision_contenders(place, names)


def _result(plan: Plan, network: str, size: tuple[int, int], device: torch.device,
            rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures, precisions = Figures(rows, CLOCKS[plan.clock]), plan.precisions(device)
    return {
        "network": network, "size": _text(size), "device": str(device), "contenders": rows,
        "ratios": {precision: ratios(figures, precision) for precision in precisions},
        "schedule": {precision: schedule(figures, precision) for precision in precisions},
    }


def _words(kind: str, text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    names = list(known) if text is None else [word.strip() for word in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {kind} {name!r}{nearest(name, known)}: choose among {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _size(text: str) -> tuple[int, int]:
    """Return (width, height) of "600x800", which is height by width, as the paper's sizes are given."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip())
    size = (int(found[2]), int(found[1])) if found else (0, 0)
    if min(size) < SMALLEST_IMAGE:
        raise UsageError(f"{text!r} is no size of images: write HEIGHTxWIDTH, such as 600x800, of at least "
                         f"{SMALLEST_IMAGE} pixels each")
    return size


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
