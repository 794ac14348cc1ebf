"""The house rules that a reader relies on: imports go one way, and nothing speaks of one machine."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The floors of `surgery`, from the ground up; a file may import its own floor and those below it.
FLOORS = (
    ("surgery", "catalogue", "errors", "processes", "progress", "seeds"),
    ("files",),
    ("modules", "devices", "weights"),
    ("delta",),
    ("apply",),
    ("checkpoints", "data", "forward", "gradients", "moved", "objective", "training", "training_state"),
    ("adapters",),
    ("metrics",),
    ("edits",),
    ("attribution", "locate"),
    ("runs",),
    ("operation", "study", "survive"),
    ("cli", "__main__"),
)
FORBIDDEN = {"hooks": {"surgery", "recipes"}, "surgery": {"recipes"}, "recipes": {"recipes"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        own = ".".join(file.relative_to(ROOT).with_suffix("").parts[:2])  # a recipe may have rooms of its own
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            others = {name for name in names if package != "recipes" or not f"{name}.".startswith(f"{own}.")}
            assert not {name.split(".")[0] for name in others} & FORBIDDEN[package], f"{file}: {names}"


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


def imported(package: str) -> dict[str, set[str]]:
    """Every module of ``package`` with the modules of the project that it imports, also inside its functions."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        only_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
        left_out = {id(node) for branch in only_types for node in ast.walk(branch)}
        names: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in left_out:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        known = {name if name in modules else name.rpartition(".")[0] for name in names}
        found[module] = {name for name in known if name in modules and name != module}
    return found


def test_the_floors_of_surgery_import_downwards() -> None:
    height = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for module, names in imported("surgery").items():
        room = module.split(".")[1] if "." in module else "surgery"
        assert room in height, f"{module}: its room has no floor; add it to FLOORS"
        for name in names:
            other = name.split(".")[1] if "." in name else "surgery"
            assert height[other] <= height[room], f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_imports_in_a_circle(package: str) -> None:
    left = imported(package)
    while left:
        free = [module for module, names in left.items() if not names & left.keys()]
        assert free, f"these import each other in a circle: {', '.join(sorted(left))}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_file_is_longer_than_a_reader_s_patience(package: str) -> None:
    long = {file: n for file in (ROOT / package).rglob("*.py") if (n := len(file.read_text().splitlines())) > 300}
    assert not long, f"over 300 lines: {long}; does each still fit the one sentence at its top?"
