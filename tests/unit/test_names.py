"""Rooms, modules and public classes are named in the words of docs/concepts.md; rooms and modules stay small."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()
SOURCES = [path for room in ("pals_ray", "policies", "deployments") for path in sorted((ROOT / room).rglob("*.py"))]
MOST_WORDS = 45
MOST_MODULES = 12
MOST_LINES = 350


def words_of(name):
    """The words of a name, in lower case: `ReplicaSnapshot` and `replica_snapshot` alike."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def stem(word):
    """A word without the endings that make another form of it."""
    return re.sub(r"(ies|ing|ed|er|es|s|e|y|or|ion)$", "", word) or word


def names():
    """Where each name is found: folders, modules and public classes."""
    found = {}
    for path in SOURCES:
        inside = path.relative_to(ROOT)
        for part in inside.with_suffix("").parts:
            if part != "__init__":
                found.setdefault(part, str(inside))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, f"{inside}:{node.lineno}")
    return found


def glossary():
    return re.findall(r"^\| ([a-z -]+) \|", CONCEPTS, flags=re.MULTILINE)[1:]


def plain_words():
    text = CONCEPTS.partition("## Plain words in names")[2]
    return [word for line in text.splitlines() if re.fullmatch(r"[a-z, ]+\.?", line) for word in words_of(line)]


def test_the_glossary_is_short_and_defines_each_word_once():
    words = glossary()
    assert len(words) <= MOST_WORDS
    assert len(set(words)) == len(words)
    assert len(words) > 30, "the table could not be read"


def test_every_name_is_made_of_words_that_the_glossary_has():
    known = {stem(word) for entry in (*glossary(), *plain_words()) for word in words_of(entry)}
    strange = {name: where for name, where in names().items() if any(stem(w) not in known for w in words_of(name))}
    assert not strange, f"name these in docs/concepts.md's words, or add a plain word there: {strange}"


def test_no_plain_word_is_listed_that_no_name_uses():
    used = {stem(word) for name in names() for word in words_of(name)}
    assert [word for word in plain_words() if stem(word) not in used] == []


@pytest.mark.parametrize("room", sorted({path.parent for path in SOURCES}), ids=lambda room: room.name)
def test_a_room_has_few_enough_modules_to_be_seen_at_once(room):
    assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


def test_a_long_module_says_why_it_is_long():
    for path in SOURCES:
        text = path.read_text()
        if len(text.splitlines()) > MOST_LINES:
            assert "longer than others because" in (ast.get_docstring(ast.parse(text)) or ""), path


def test_no_two_modules_of_a_room_have_names_that_differ_by_a_plural():
    for room in {path.parent for path in SOURCES}:
        stems = [re.sub(r"s$", "", path.stem) for path in room.iterdir() if path.suffix == ".py" or path.is_dir()]
        assert len(set(stems)) == len(stems), room
