"""Time a step of every stage, part by part, beside torchvision's Faster R-CNN, and reckon the paper's schedule.

On generated images, with random weights, in one process and interleaved. It reports and never judges.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Literal

import click

from altopt.errors import AltoptError
from benchmarks.bench.measuring import make_plan, measure
from benchmarks.bench.tables import insert, markdown_of
from cache.files import write_json_atomic

PROGRAM = "python -m benchmarks.bench"


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--networks", metavar="A,B", help="Some of the networks. Default: all.")
@click.option("--sizes", metavar="HxW,...", default="600x800,300x400", help="Height and width of the images.")
@click.option("--contenders", metavar="A,B", help="Some of the stages and torchvision's parts. Default: all.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Steps of each that count, after one that does not.")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16", "both"]), default="auto",
              help="auto: float32, and bfloat16 where the hardware computes in it. torchvision is measured in both.")
@click.option("--device", default="all", metavar="A,B",
              help="cpu, cuda, ...; all is the CPU, and CUDA where there is one.")
@click.option("--clock", type=click.Choice(["wall", "processor"]), default="wall",
              help="What ratios and schedule are reckoned from; processor time is steadier where others work too "
                   "(CPU only).")
@click.option("--tf32", type=click.Choice(["torch", "on", "off"]), default="torch",
              help="Whether float32 on a GPU is multiplied as TF32; torch leaves it as torch has it.")
@click.option("--compile", "compiled", is_flag=True,
              help="Joint training with conv layers through torch.compile as well.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to a file too.")
@click.option("--markdown", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="RESULTS.md",
              help="Put the tables between the marks <!-- bench --> and <!-- /bench --> of a document.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def bench(networks: str | None, sizes: str, contenders: str | None, rounds: int, precision: str, device: str,
          clock: Literal["wall", "processor"], tf32: str, compiled: bool, save: Path | None, markdown: Path | None,
          as_json: bool) -> None:
    """Measure, print, and write what was asked for."""
    plan = make_plan(networks=networks, sizes=sizes, contenders=contenders, device=device, rounds=rounds,
                     precision=precision, clock=clock, tf32=tf32, compiled=compiled)
    result = measure(plan, shlex.join([*PROGRAM.split(), *sys.argv[1:]]), lambda text: click.echo(text, err=True))
    if save:
        write_json_atomic(save, result)
    if markdown:
        insert(markdown, markdown_of(result))
    click.echo(json.dumps(result, indent=1) if as_json else markdown_of(result))


def main(arguments: list[str]) -> int:
    """Run the bench and return its exit code; an expected failure is one line, as altopt's own are."""
    try:
        bench.main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except AltoptError as error:
        click.echo(f"bench: {error}", err=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
