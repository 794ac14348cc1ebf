"""What a command writes at its end: whole, or not there, and never in the place of a device."""

import os
import resource
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.files.atomic import write_json, write_text


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"before": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(SurgeryError, match=r"numbers\.json: writing failed \(File too large"):
            write_json(path, list(range(1000)))
        with pytest.raises(SurgeryError, match=r"page\.html: writing failed"):
            write_text(tmp_path / "page.html", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["numbers.json"]


def test_a_link_stays_one_and_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("{}")
    link.symlink_to(real)
    write_json(link, [1])
    assert link.is_symlink() and real.read_text() == "[\n 1\n]\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(SurgeryError, match="is no plain file"):
            write_text(path, "x")
    assert pipe.is_fifo()
