"""The tables that commands print to stdout."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from stages.pipeline.plan import duration

if TYPE_CHECKING:
    from altopt.evaluation.measures import ScoreDict
    from stages.pipeline.evaluation import ProposalRecall, Summary
    from stages.pipeline.probing import Probe


def summary_tables(summary: "Summary") -> list[Table]:
    """Return what run-all ends with: scores, recall of the proposals, time of each stage."""
    scores = _table("network", "protocol", "mAP", "recall@0.5 of its proposals", "s/image",
                    title="Detection on the test split")
    for each in summary["scores"]:
        scores.add_row(each["name"], each["protocol"], number(each["map"]), number(each["recall_at_0.5"]),
                       f"{each['seconds_per_image']:.3f}")
    limits = list(next(iter(summary["recall"].values()))["limits"]) if summary["recall"] else []
    recalls = _table("file", *(f"{limit} proposals" for limit in limits),
                     title="Proposals on the training split: recall at IoU 0.5")
    for name, recall in summary["recall"].items():
        recalls.add_row(name, *(number(recall["limits"][limit]["areas"]["all"]["recall"][0]) for limit in limits))
    times = _table("output", "stage", "time", title="Time")
    for name, made in summary["stages"].items():
        times.add_row(name, made["stage"], "given" if made["given"] else duration(made["seconds"]))
    times.add_row("", "total", duration(sum(made["seconds"] for made in summary["stages"].values())))
    return [scores, *([recalls] if summary["recall"] else []), times]


def score_table(result: "ScoreDict") -> Table:
    """Return per-class AP and the mean."""
    table = _table("class", "AP")
    for name, each in result["classes"].items():
        table.add_row(escape(name), number(each["ap"]))
    table.add_row("mean", number(result["map"]), style="bold")
    return table


def recall_table(result: "ProposalRecall") -> Table:
    """Return recall against IoU, a row for each number of proposals, and the average recall."""
    table = _table("proposals", *(f"{threshold:.2f}" for threshold in result["thresholds"]), "AR",
                   title=f"{result['proposals']} on {result['split']}: {result['convention']}")
    for limit, each in result["limits"].items():
        of_all = each["areas"]["all"]
        table.add_row(limit, *(number(value) for value in of_all["recall"]), number(of_all["average_recall"]))
    return table


def beside_table(rows: "list[dict[str, str | float | None]]") -> Table:
    """Return per-class AP in per cent beside published ones; the last row is the mean."""
    table = _table(*rows[0], right=True)
    for row in rows:
        cells = [value if isinstance(value, str) else "-" if value is None else f"{value:.1f}"
                 for value in row.values()]
        table.add_row(*cells, style="bold" if row is rows[-1] else "")
    return table


def comparison_table(headings: list[str], rows: list[list[str]]) -> Table:
    """Return a row for each scheme, and one for what the slides say of it; names are never folded."""
    table = _table(*headings, right=True)
    for row in rows:
        table.add_row(*map(escape, row))
    table.columns[0].no_wrap = True
    return table


def probe_table(result: "Probe") -> Table:
    """Return, block by block, the exact gradient beside the approximate one: of the detector's losses, and of all."""
    table = _table("losses", "block", "cosine", "norm with / without",
                   title=f"{result['network']}, {len(result['images'])} images: gradient with the path through the "
                         "proposals' coordinates beside that without")
    for row in result["rows"]:
        table.add_row(", ".join(row["losses"]), row["block"], number(row["cosine"]), number(row["norm_ratio"]))
    return table


def number(value: float | None) -> str:
    """Return a share with three decimals; a dash where it is not defined."""
    return "-" if value is None else f"{value:.3f}"


def _table(*headings: str, title: str | None = None, right: bool = False) -> Table:
    table = Table(title=title and escape(title), box=None, pad_edge=False, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if right and number else "left")
    return table
