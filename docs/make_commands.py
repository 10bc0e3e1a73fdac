"""Write docs/commands.md: the help of every command, as the program prints it.

``python docs/make_commands.py`` writes it, ``--check`` says whether it is current.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
INTRODUCTION = """\
# Commands

`python docs/make_commands.py` makes this page from the program's own help. `altopt stage M1 --help`, and so on, also
lists the settings of a stage.
"""


def commands(command: click.Command, context: click.Context) -> Iterator[click.Context]:
    """Yield the context of a command and of those below it, without the stages, whose help is the recipe's."""
    yield context
    if isinstance(command, click.Group) and context.command_path != "altopt stage":
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from commands(below, click.Context(below, info_name=name, parent=context))


def page() -> str:
    """Return the whole page."""
    sys.path.insert(0, str(ROOT))
    import cli

    # A width of its own: the help must not depend on the terminal.
    top = click.Context(cli.main, info_name="altopt", terminal_width=100, max_content_width=100,
                        help_option_names=["-h", "--help"])
    sections = [INTRODUCTION]
    for context in commands(cli.main, top):
        with context.scope(cleanup=False):
            text = "\n".join(line.rstrip() for line in context.get_help().splitlines())
        sections.append(f"## {context.command_path}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a run in the current folder would show
        text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/commands.md is not what the program prints: run python docs/make_commands.py")
