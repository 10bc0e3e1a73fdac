"""The tables that commands print to stdout."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from stages.pipeline.plan import duration

if TYPE_CHECKING:
    from altopt.evaluation.undefined import ScoreDict
    from stages.pipeline.evaluation import ProposalRecall, Summary
    from stages.pipeline.probing import Probe


def summary_tables(summary: "Summary") -> list[Table]:
    """Return what run-all ends with: scores, recall of the proposals, time of each stage."""
    scores = Table(title="Detection on the test split", box=None, pad_edge=False, title_justify="left")
    for heading in ("network", "protocol", "mAP", "recall@0.5 of its proposals", "s/image"):
        scores.add_column(heading)
    for each in summary["scores"]:
        scores.add_row(each["name"], each["protocol"], number(each["map"]), number(each["recall_at_0.5"]),
                       f"{each['seconds_per_image']:.3f}")
    recalls = Table(title="Proposals on the training split: recall at IoU 0.5", box=None, pad_edge=False,
                    title_justify="left")
    recalls.add_column("file")
    limits = list(next(iter(summary["recall"].values()))["limits"]) if summary["recall"] else []
    for limit in limits:
        recalls.add_column(f"{limit} proposals")
    for name, recall in summary["recall"].items():
        recalls.add_row(name, *(number(recall["limits"][limit]["areas"]["all"]["recall"][0]) for limit in limits))
    times = Table(title="Time", box=None, pad_edge=False, title_justify="left")
    for heading in ("output", "stage", "time"):
        times.add_column(heading)
    for name, made in summary["stages"].items():
        times.add_row(name, made["stage"], "given" if made["given"] else duration(made["seconds"]))
    times.add_row("", "total", duration(sum(made["seconds"] for made in summary["stages"].values())))
    return [scores, *([recalls] if summary["recall"] else []), times]


def score_table(result: "ScoreDict") -> Table:
    """Return per-class AP and the mean."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    table.add_column("AP")
    for name, each in result["classes"].items():
        table.add_row(escape(name), number(each["ap"]))
    table.add_row("mean", number(result["map"]), style="bold")
    return table


def recall_table(result: "ProposalRecall") -> Table:
    """Return recall against IoU, a row for each number of proposals, and the average recall."""
    title = escape(f"{result['proposals']} on {result['split']}: {result['convention']}")
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    table.add_column("proposals")
    for threshold in result["thresholds"]:
        table.add_column(f"{threshold:.2f}")
    table.add_column("AR")
    for limit, each in result["limits"].items():
        of_all = each["areas"]["all"]
        table.add_row(limit, *(number(value) for value in of_all["recall"]), number(of_all["average_recall"]))
    return table


def beside_table(rows: "list[dict[str, str | float | None]]") -> Table:
    """Return per-class AP in per cent beside published ones; the last row is the mean."""
    table = Table(box=None, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in rows:
        cells = [value if isinstance(value, str) else per_cent(value) for value in row.values()]
        table.add_row(*cells, style="bold" if row is rows[-1] else "")
    return table


def comparison_table(headings: list[str], rows: list[list[str]]) -> Table:
    """Return a row for each scheme, and one for what the slides say of it; names are never folded."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=heading == "scheme")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def probe_table(result: "Probe") -> Table:
    """Return, block by block, the exact gradient beside the approximate one: of the detector's losses, and of all."""
    title = (f"{result['network']}, {len(result['images'])} images: gradient with the path through the proposals' "
             "coordinates beside that without")
    table = Table(title=escape(title), box=None, pad_edge=False, title_justify="left")
    for heading in ("losses", "block", "cosine", "norm with / without"):
        table.add_column(heading)
    for row in result["rows"]:
        table.add_row(", ".join(row["losses"]), row["block"], number(row["cosine"]), number(row["norm_ratio"]))
    return table


def per_cent(value: float | None) -> str:
    """Return a percentage with one decimal; a dash where it is not defined."""
    return "-" if value is None else f"{value:.1f}"


def number(value: float | None) -> str:
    """Return a share with three decimals; a dash where it is not defined."""
    return "-" if value is None else f"{value:.3f}"
