"""Every command and every block of Python in the docs runs, in the order of the site, on a tiny checkpoint.

A block behind `<!-- not run here: REASON -->` is not run; its commands are still read by the command line.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from test_cli import surgery

from surgery.cli import app
from surgery.data.prompts import professions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- not run here: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)```", re.S)
# Rendered from notebooks, which have tests of their own; the rest of the repository's pages are those of the site.
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "notebooks"]


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and why it is not run, if it is not."""

    kind: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [Block(one["kind"], one["code"], one["reason"]) for one in found]


def commands(code: str) -> Iterator[list[str]]:
    """The words of every `surgery` command of a shell block; comments and continued lines as a shell reads them."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "surgery":
            yield words[1:]


@pytest.fixture(scope="module")
def desk(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: a checkpoint that was fine-tuned a little, some texts, the file that a page writes."""
    place = tmp_path_factory.mktemp("desk")
    shutil.copytree(checkpoint, place / "checkpoint")
    child = load_file(place / "checkpoint" / "model.safetensors")
    torch.manual_seed(0)
    tuned = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in child.items()}
    save_file(tuned, place / "checkpoint" / "model.safetensors", {"format": "pt"})
    rows = [{"text": f"The {one.name} smiled because the day was good ."} for one in professions()[:24]]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for page in PAGES:
        for title, code in re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', page.read_text("utf-8"), re.S):
            (place / title).write_text(code.replace('"demo"', json.dumps(str(checkpoint))))
    return place


# Pages whose blocks build on each other run in one test, so that they may be spread over processes by file.
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_run(
    page: Path, desk: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    tiny = {"demo": str(checkpoint), "block=25": "block=2"}
    for block in blocks(page):
        if block.kind == "sh" and block.reason is None:
            for words in commands(block.code):
                code, _, stderr = surgery(*(tiny.get(word, word) for word in words))
                assert code == 0, f"{page.name}: surgery {' '.join(words)}: {stderr}"
        elif block.kind == "python" and block.reason is None:
            text = block.code.replace('"demo"', repr(str(checkpoint))).replace("block=25", "block=2")
            exec(compile(text, page.name, "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_that_are_only_shown_are_read_by_the_command_line(page: Path) -> None:
    root = typer.main.get_command(app)
    for block in blocks(page):
        for words in commands(block.code) if block.kind == "sh" else ():
            command, rest = root, words
            while rest and rest[0] in getattr(command, "commands", {}):
                command, rest = command.commands[rest[0]], rest[1:]
            assert command is not root, f"{page.name}: no command surgery {words[0]}"
            command.make_context("surgery", list(rest))  # raises for options that do not exist
        for target in re.findall(r"^make (\w+)", block.code, re.M) if block.kind == "sh" else ():
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_every_page_is_in_the_navigation_and_every_page_of_it_exists() -> None:
    named = set(re.findall(r"(?:: |- )([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_the_site_builds(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BlockImportance" in (tmp_path / "site" / "reference" / "hooks.html").read_text()
