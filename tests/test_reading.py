"""Files that users give: what is legal JSON and yet no text is refused by the line that it stands in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.data import neutral, pairs, rows, stereoset, texts
from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError

HALF = '{"text": "an emoji cut in two \\ud83d", "more": "a", "less": "b"}\n'
READERS: dict[str, Callable[[Path], Any]] = {
    "training texts": texts.examples,
    "rows of a benchmark": lambda path: rows.read_rows(path, ("text",)),
    "neutral sentences": neutral.sentences,
    "pairs of one's own": pairs.load,
    "stereoset": lambda path: stereoset.load(path, least=1),
}


@pytest.mark.parametrize("reader", READERS)
def test_half_of_a_character_is_refused_by_its_line(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00", "more": "a", "less": "b"}\n' * (reader != "stereoset") + HALF)
    line = 1 if reader == "stereoset" else 2
    with pytest.raises(SurgeryError, match=rf"a\.jsonl, line {line}: holds '\\ud83d', half of a character"):
        READERS[reader](path)


def test_a_whole_character_written_in_halves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\uD83D\\uDE00"}\r\n', newline="")
    assert [row.answer for row in texts.examples(path)] == neutral.sentences(path) == ["\U0001f600"]


def test_half_of_a_character_in_a_prompt_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text('{"name": "x", "words": ["he", "sh\\ud83d"], "templates": []}')
    with pytest.raises(SurgeryError, match=r"set\.json.*surrogates not allowed"):
        load_prompt_set(path)
