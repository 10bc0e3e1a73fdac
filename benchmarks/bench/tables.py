"""The figures of a bench as Markdown, and putting them into a document between two marks."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from altopt.errors import ArtifactError
from benchmarks.bench.machine import bfloat16_sentence
from benchmarks.bench.stopwatch import PARTS
from cache.files import write_text_atomic
from stages.pipeline.plan import duration

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
RATIOS = {
    "store_rpn_step": "stage 4, a step: store against none",
    "store_fast_rcnn_step": "stage 6, a step: store against none",
    "store_rpn_stage_with_building": "stage 4 as a whole, building the store included",
    "store_both_stages_with_building": "stages 4 and 6, building included",
    "torchvision_default_joint_step": "joint training step against torchvision's",
    "torchvision_autocast_joint_step": "joint training step against torchvision's under autocast",
    "torchvision_default_detection": "detection against torchvision's",
    "torchvision_autocast_detection": "detection against torchvision's under autocast",
    "compiled_joint_step": "joint training step, conv layers through torch.compile against not",
}
SCHEDULE = {
    "alternating": "alternating, seven stages", "alternating_without_store": "alternating, no store",
    "approximate_joint": "joint, one image a step", "approximate_joint_iter_size_2": "joint, two images a step",
    "alternating_over_joint": "alternating / joint, one",
    "alternating_over_joint_iter_size_2": "alternating / joint, two",
    "without_store_over_joint_iter_size_2": "alternating, no store / joint, two",
    "alternating_over_torchvision_iter_size_2": "alternating / torchvision's joint, two",
    "alternating_over_torchvision_autocast_iter_size_2": "alternating / torchvision's joint under autocast, two",
}


def markdown_of(report: dict[str, Any]) -> str:
    """Return the tables of a report: steps, shares, ratios, schedule; a column for each network, size and device."""
    machine, settings = report["machine"], report["settings"]
    gpus = "".join(f"; {name}" for name in machine["gpus"])
    tf32 = "" if settings.get("tf32", "torch") == "torch" else f"; TF32 {settings['tf32']}"
    clock = "Wall clock" if settings["clock"] == "seconds" else "Processor time"
    about = (
        f"`{report['command']}` on {machine['processor']}, {machine['threads']} of {machine['cores']} threads{gpus}; "
        f"torch {machine['torch']}, torchvision {machine['torchvision']}; {bfloat16_sentence(machine)}. {clock}, "
        f"median of {settings['rounds']} interleaved steps, random weights, learning rate 0; load average "
        f"{machine['load_average']:.1f} before{tf32}."
    )
    results, heading = report["results"], "Seconds for a step, and peak memory of weights, momenta and step:"
    if settings["clock"] == "seconds":
        heading = "Seconds for a step (least to greatest), and peak memory of weights, momenta and step:"
    sections = {
        heading: _steps(results, settings["clock"]), "Where a step's time goes, in per cent:": _shares(results[0]),
        "How many times as fast:": _by_column(results, "ratios", RATIOS, _times_as_fast),
        "py-faster-rcnn's whole schedule on VOC 2007 trainval, reckoned from these steps:":
            _by_column(results, "schedule", SCHEDULE, _schedule_cell),
    }
    return "\n\n".join([about, *(f"{title}\n\n{table}" for title, table in sections.items() if table)])


def insert(path: Path, text: str) -> None:
    """Put the text between the two marks of a document, in the place of what stands there; the rest stays.

    Raises ``ArtifactError`` for a document without the marks, each on its own, in their order.
    """
    try:
        document = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}: name the document to write to") from None
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or document.count(BEGIN) + document.count(END) != 2:
        raise ArtifactError(f"{path} has no place for the tables: write a line {BEGIN} and a line {END}, each once")
    write_text_atomic(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _steps(results: list[dict[str, Any]], clock: str) -> str:
    labels = list(dict.fromkeys(_label(row) for result in results for row in result["contenders"]))
    lines = []
    for label in labels:
        found = ({_label(row): row for row in result["contenders"]}.get(label) for result in results)
        lines.append([label, *(_step_cell(row, clock) for row in found)])
    return _table(["step", *map(_column, results)], lines)


def _shares(result: dict[str, Any]) -> str:
    lines = [[_label(row), *(f"{100 * row['shares'][part]:.0f}" for part in PARTS)] for row in result["contenders"]]
    return _table([_column(result), *(part.replace("_", " ") for part in PARTS)], lines)


def _by_column(results: list[dict[str, Any]], kind: str, names: dict[str, str],
               cell: Callable[[str, Any], str]) -> str:
    columns = [(f"{_column(result)} {precision}", values)
               for result in results for precision, values in result[kind].items()]
    lines = [[text, *(cell(name, values[name]) for _, values in columns)] for name, text in names.items()
             if any(values[name] is not None for _, values in columns)]
    return _table(["", *(name for name, _ in columns)], lines) if lines else ""


def _table(heading: list[str], lines: Iterable[list[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _column(result: dict[str, Any]) -> str:
    return f"{result['network']} {result['size']} {result['device']}"


def _label(row: dict[str, Any]) -> str:
    marks = ["store"] * row["store"] + ["compiled"] * row["compiled"]
    marks += ["bfloat16"] if row["precision"] == "bfloat16" else []
    return ", ".join([f"`{row['name']}`", *marks])


def _step_cell(row: dict[str, Any] | None, clock: str) -> str:
    if row is None:
        return "-"
    peak = "" if row["peak_bytes"] is None else f"; {row['peak_bytes'] / 2**30:.2f} GiB"
    spread = f" ({row['least']:.3g} to {row['greatest']:.3g})" if clock == "seconds" else ""
    return f"{row[clock]:.3g}{spread}{peak}"


def _times_as_fast(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _schedule_cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if "over" in name else duration(value)
