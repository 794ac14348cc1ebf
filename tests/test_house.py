"""The house rules that a reader relies on: imports go one way, and nothing speaks of one machine."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"hooks": {"surgery", "recipes"}, "surgery": {"recipes"}, "recipes": {"recipes"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} & FORBIDDEN[package], f"{file}: {names}"


def test_heavy_libraries_are_imported_when_called() -> None:
    for package in FORBIDDEN:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(re.match("transformer_lens|nnsight|matplotlib", name) for name in names), file


def test_every_file_starts_with_a_sentence() -> None:
    for file in (path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")):
        opening = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
        assert opening.rstrip().endswith((".", ":", "?")), file
