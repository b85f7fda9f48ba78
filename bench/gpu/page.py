"""A page that shows the results of a card: `python -m bench.gpu.page FILE`.

The page is one HTML file beside FILE, without scripts and without anything from elsewhere.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1f2937; }
table { border-collapse: collapse; margin: .3rem 0 1rem; }
td, th { padding: .2rem .8rem; border: 1px solid #d1d5db; text-align: left; vertical-align: top; }
th { background: #f3f4f6; font-weight: 600; }
"""


def write_page(results: Path) -> Path:
    """Write the page of a file of results; returns its path.

    Raises `OSError` if a file cannot be read or written, and `ValueError` if it is no JSON.
    """
    found = json.loads(results.read_text(encoding="utf-8"))
    page = results.with_suffix(".html")
    body = "".join(f"<h2>{escape(part)}</h2>{_shown(value)}" for part, value in found.items())
    title = escape(results.stem)
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{body}</html>\n",
        encoding="utf-8",
    )
    return page


def _shown(value: Any) -> str:
    """A value of the results as HTML: a table for an object or a list of objects."""
    if isinstance(value, dict):
        rows = (f"<tr><th>{escape(k)}</th><td>{_shown(v)}</td></tr>" for k, v in value.items())
        return f"<table>{''.join(rows)}</table>"
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        columns = list(dict.fromkeys(key for item in value for key in item))
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        rows = (
            "<tr>" + "".join(f"<td>{_shown(item.get(c, ''))}</td>" for c in columns) + "</tr>"
            for item in value
        )
        return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file of bench/results")
    print(write_page(parser.parse_args().results))


if __name__ == "__main__":
    main()
