"""The errors that `serve.errors` and docs/api.md document."""

from pathlib import Path

from serve import errors

API_DOC = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    rows_of_text = [line.strip("│├└─ ").split() for line in (errors.__doc__ or "").splitlines()]
    rows = {row[0]: tuple(row[1:]) for row in rows_of_text if len(row) == 4 and row[1].isdigit()}
    assert rows == {c.__name__: (str(c.status), c.type, c.code) for c in errors.tree()}


def test_the_documented_table_lists_every_error() -> None:
    """`python -m serve.errors` prints the table."""
    assert errors.markdown_table() in API_DOC.read_text(encoding="utf-8")
