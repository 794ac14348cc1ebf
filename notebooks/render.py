"""Run the notebooks in a kernel and write the rendered copies into docs/notebooks: `python notebooks/render.py [01 ...]`.

Needs the extra `notebooks` (nbclient, ipykernel). The notebooks themselves stay without outputs.
"""

import base64
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "notebooks"


def render(path: Path) -> None:
    """Write the copy of one notebook: its cells, what they printed, and their pictures as files beside it."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as work:
        NotebookClient(book, timeout=600, resources={"metadata": {"path": work}}).execute()
    for old in DOCS.glob(f"{path.stem}_*.png"):
        old.unlink()
    parts = [
        f"*A rendered copy of [`notebooks/{path.name}`](../../notebooks/{path.name}), "
        "run on SmolLM2-135M-Instruct on a CPU.*\n"
    ]
    for number, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source + "\n")
            continue
        parts.append(f"```python\n{cell.source}\n```\n")
        said = ""
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stdout":
                said += output.text.replace(work, "…")
            elif "image/png" in output.get("data", {}):
                picture = DOCS / f"{path.stem}_{number:02d}.png"
                picture.write_bytes(base64.b64decode(output.data["image/png"]))
                said = said.rstrip("\n")
                parts += [f"```text\n{said}\n```\n"] * bool(said)
                parts.append(f"![the picture that this cell draws]({picture.name})\n")
                said = ""
            elif "text/plain" in output.get("data", {}):
                said += output.data["text/plain"] + "\n"
        parts += [f"```text\n{said.rstrip()}\n```\n"] * bool(said.strip())
    (DOCS / f"{path.stem}.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    chosen = sys.argv[1:] or [""]
    for each in sorted(HERE.glob("*.ipynb")):
        if each.stem.startswith(tuple(chosen)):
            render(each)
            print(DOCS / f"{each.stem}.md")
