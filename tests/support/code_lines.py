"""Lines of code by room, without blanks, comments and docstrings: `make lines`."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines of a module hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in NO_CODE for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


if __name__ == "__main__":
    rooms: Counter[str] = Counter()
    for path in (path for root in sys.argv[1:] for path in sorted(Path(root).rglob("*.py"))):
        rooms[str(Path(*path.parts[:2]) if len(path.parts) > 2 else path.parts[0])] += code_lines(path.read_text())
    for room, count in rooms.items():
        print(f"{count:6d} {room}")
    print(f"{rooms.total():6d} in all")
