"""Code lines of every room: without docstrings, comments and blank lines.

python benchmarks/code_lines.py [PATH_OF_ANOTHER_CHECKOUT]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

_NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
)


def code_lines(source: str) -> int:
    """Lines of Python on which something stands that is neither a comment nor a docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = getattr(statement, "value", None)
            is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
            if isinstance(statement, ast.Expr) and is_text:
                documentation |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def rooms(root: Path) -> Counter[str]:
    """Code lines by room of the package, and of the other top-level folders."""
    counts: Counter[str] = Counter()
    for folder in ("jaximm", "experiments", "benchmarks", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            lines = code_lines(path.read_text(encoding="utf-8"))
            parts = path.relative_to(root).parts
            counts[folder] += lines
            if folder == "jaximm" and len(parts) > 2:
                counts[f"jaximm/{parts[1]}"] += lines
    return counts


def main() -> None:
    here = rooms(Path(__file__).resolve().parents[1])
    other = rooms(Path(sys.argv[1])) if len(sys.argv) > 1 else Counter[str]()
    for room in sorted(here.keys() | other.keys()):
        before = f"{other[room]:8d}" if other else ""
        ratio = f"{here[room] / other[room]:8.1%}" if other[room] else ""
        print(f"{room:24}{before}{here[room]:8d}{ratio}")


if __name__ == "__main__":
    main()
