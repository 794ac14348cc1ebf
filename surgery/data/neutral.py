"""Neutral sentences for perplexity: 200 of our own without gendered word or profession, 40 with pronouns, or a file."""

from importlib.resources import files
from pathlib import Path

from surgery.data.reading import json_object, read_text
from surgery.errors import SurgeryError


def sentences(path: str | Path | None = None) -> list[str]:
    """The shipped sentences, or those of a ``.txt`` (one per line) or ``.jsonl`` file (key "text").

    Blank lines are skipped. Raises SurgeryError for a missing, unreadable, malformed or empty file.
    """
    if path is None:
        return _lines(files("surgery.data").joinpath("neutral.txt").read_text("utf-8"))
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in (".txt", ".jsonl"):
        raise SurgeryError(
            f"no neutral text at {path}: got {'an unknown ending' if path.is_file() else 'no such file'}, "
            f"expected a .txt file with a sentence per line or a .jsonl file with the key 'text'"
        )
    if path.suffix.lower() == ".txt":
        found = _lines(read_text(path))
    else:
        found = [_text(line, f"{path}, line {number}") for number, line in _numbered(read_text(path))]
    if not found:
        raise SurgeryError(f"no sentence in {path}: got an empty file, expected at least one line; fill it")
    return found


def with_pronouns() -> list[str]:
    """40 shipped sentences full of pronouns: what an edit of he and she costs there, the 200 others cannot show."""
    return _lines(files("surgery.data").joinpath("neutral_pronouns.txt").read_text("utf-8"))


def _numbered(text: str) -> list[tuple[int, str]]:
    # Only the line feed ends a line: str.splitlines would also cut at characters inside a JSON string.
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _lines(text: str) -> list[str]:
    return [line for _, line in _numbered(text)]


def _text(line: str, at: str) -> str:
    text = json_object(line, at).get("text")
    if not isinstance(text, str) or not text.strip():
        raise SurgeryError(f"{at}: got {line[:60]!r}, expected a JSON object with the string 'text'; mend that line")
    return text.strip()
