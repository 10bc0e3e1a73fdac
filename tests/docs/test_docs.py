"""README and docs against the program: links, files, make targets, recipes and every command that they show."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import pytest

import cli
from altopt.errors import UsageError
from stages.pipeline.recipe import read_recipe

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "commands.md"
HISTORY = ROOT / "CHANGELOG.md"  # speaks of what is no longer there
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", HISTORY, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OURS = re.compile(r"(?:altopt|stages|cache|tests|benchmarks|docs)/[\w./-]*")
NEW = {"altopt/datasets/yolo.py"}  # what an example of CONTRIBUTING writes
EACH_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of code blocks, fenced or indented, continued ones as one."""
    fenced, held = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            held += line.strip()
            if held.endswith("\\"):
                held = held[:-1]
                continue
            yield held
            held = ""


def spans(text: str) -> list[str]:
    return SPAN.findall(re.sub(r"^(```.*?^```|    .*?$)", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the words after ``altopt`` of every command."""
    for line in lines:
        for part in line.split(" && "):
            match = re.match(r"(?:\.venv/bin/)?altopt +(?=[a-z-])|(?:srun +)?torchrun .*?-m altopt +", part)
            if match and not part.endswith("..."):
                yield shlex.split(part[match.end():].split("  ")[0].split(" > ")[0])


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", TEXTS[path], re.MULTILINE)}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in LINK.findall(TEXTS[path]):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def understood(words: list[str], whole: bool = True) -> None:
    """Raise ``click.UsageError``, or what a recipe raises, unless the program understands the words; nothing runs.

    What is not ``whole`` may lack arguments.
    """
    context, rest = click.Context(cli.main, **cli.main.context_settings), list(words)
    command: click.Command | None = cli.main
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        _, command, rest = command.resolve_command(context, rest)
        assert command is not None
        context = click.Context(command, parent=context, info_name=command.name)
    if "--help" in rest:
        return
    values, left, _ = command.make_parser(context).parse_args(args=list(rest))
    assert not left, f"{left} is left over"
    for param in command.params:
        value = values.get(param.name)
        assert not (whole and param.required and value in (None, ())), f"{param.name} is missing"
        if value is not None and isinstance(param.type, click.Choice | click.IntRange):
            param.type_cast_value(context, value)
    recipe = values.get("recipe") or "shapes"
    read_recipe("shapes" if recipe.endswith(".toml") else recipe, values.get("sets") or (), values.get("scheme"))


def test_readme_is_a_screen_and_a_half():
    text = TEXTS[ROOT / "README.md"]
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 9000


@EACH_PAGE
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# Some `heading`, here\n")
    monkeypatch.setitem(TEXTS, page, "# Some `heading`, here\n[a](#some-heading-here) [b](#other) [c](missing.md)")
    assert broken_links(page) == ["#other", "missing.md"]


def test_every_page_is_in_the_list():
    listed = {(ROOT / "docs" / link).resolve() for link in LINK.findall(TEXTS[ROOT / "docs" / "README.md"])}
    assert {path for path in PAGES if path.parent == ROOT / "docs"} - {ROOT / "docs" / "README.md"} <= listed


@EACH_PAGE
def test_commands_are_understood(path, tmp_path, monkeypatch):
    if path in (HISTORY, GENERATED):
        return
    monkeypatch.chdir(tmp_path)  # stages are those of a run in the current folder
    settings = [f"altopt plan {span}" for span in spans(TEXTS[path]) if re.match(r"--set '?[a-z]", span)]
    for lines, whole in ((code_lines(TEXTS[path]), True), (spans(TEXTS[path]), False), (settings, True)):
        for words in commands(lines):
            try:
                understood(words, whole)
            except Exception as error:
                pytest.fail(f"altopt {shlex.join(words)}: {error}")


def test_commands_are_found():
    readme = TEXTS[ROOT / "README.md"]
    assert ["stage", "3", "--from", "M1", "--set", "train_fast_rcnn.lr=0.01"] in list(commands(code_lines(readme)))
    assert ["probe", "M5"] in list(commands(spans(readme)))
    found = list(commands(code_lines(TEXTS[ROOT / "docs" / "several-processes.md"])))
    assert [words[0] for words in found] == ["run-all"] * 4  # of torchrun and of a job, too


@pytest.mark.parametrize("words", [
    "run_all", "stage 9", "run-all --sett a.b=1", "run-all --recipe shaps", "run-all --set train_rpn.lrr=1",
    "run-all --scheme joint", "proposals import boxes.json", "evaluate --protocol voc08", "plan here",
    "recall --limit x"])
def test_what_the_program_does_not_know_is_found(words):
    with pytest.raises((click.ClickException, UsageError, AssertionError)):
        understood(shlex.split(words))


@EACH_PAGE
def test_files_and_targets_exist(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = [*code_lines(TEXTS[path]), *spans(TEXTS[path])]
    named = {word for line in spans(TEXTS[path]) for word in OURS.findall(line) if OURS.fullmatch(line)} - NEW
    assert [name for name in sorted(named) if path != HISTORY and not (ROOT / name).exists()] == []
    asked = {word for line in code for word in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", line)}
    assert asked <= targets


def test_page_of_commands_is_current():
    """By itself: click keeps what another test made of a command's options."""
    answer = subprocess.run([sys.executable, ROOT / "docs" / "make_commands.py", "--check"], capture_output=True,
                            text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_citation_is_of_this_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## {cited[1]} " in TEXTS[HISTORY]
