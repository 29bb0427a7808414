"""docs/architecture.md is true: every file and function that it names exists, and no room is left out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "docs" / "architecture.md").read_text()
HOPS = re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|", MAP)


def defined_in(path):
    """Functions, classes and methods of a module, by dotted name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{part.name}" for part in getattr(node, "body", []) if hasattr(part, "name")}
    return found


def test_the_paths_have_all_their_hops():
    assert len(HOPS) >= 25


@pytest.mark.parametrize(("file", "function"), HOPS)
def test_what_a_hop_names_exists(file, function):
    assert function in defined_in(ROOT / file)


def test_every_room_is_on_the_map():
    rooms = {path.name for path in (ROOT / "pals_ray").iterdir() if (path / "__init__.py").exists()}
    assert {room for room in rooms if f"`{room}/" not in MAP} == set()
