"""The README's Python example runs, on the tiny checkpoint in place of the demo model."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    tiny = code.replace('"demo"', repr(str(checkpoint))).replace("block=25", "block=2")
    assert tiny != code
    exec(compile(tiny, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "final_norm" in printed and "'ideal': 0.0" in printed
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_the_pictures_and_commands_it_names_exist() -> None:
    root = Path(__file__).parent.parent
    for picture in re.findall(r"\]\(([\w/]+\.png)\)", README):
        assert (root / picture).stat().st_size > 10_000
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
