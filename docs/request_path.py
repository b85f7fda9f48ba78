"""Draws docs/request-path.svg, the way of a request: `python docs/request_path.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

OUT = Path(__file__).with_name("request-path.svg")
WIDTH, HEIGHT = 960, 470


class Box(NamedTuple):
    """A part of Octet: its top left corner and size in px, its name, and lines about it."""

    x: int
    y: int
    width: int
    height: int
    name: str
    lines: tuple[str, ...]
    fill: str


class Arrow(NamedTuple):
    """A message from one point to another, with the number of its step and a text."""

    start: tuple[int, int]
    end: tuple[int, int]
    step: str
    text: str
    at: tuple[int, int]  # where the number is; the text stands at its right


EDGE, DISPATCH, ENGINE, STORE = "#dbeafe", "#fef3c7", "#dcfce7", "#f3e8ff"
BOXES = (
    Box(20, 150, 126, 70, "Clients", ("OpenAI's client,", "curl, a page"), "#f1f5f9"),
    Box(
        230,
        120,
        190,
        130,
        "Ingress × n",
        ("API keys, OpenAI's format", "single flight, retries", "files, links, previews"),
        EDGE,
    ),
    Box(230, 20, 190, 62, "Result cache", ("memory or Redis",), STORE),
    Box(230, 350, 190, 76, "Result store", ("folder or S3, with a", "spool on each node"), STORE),
    Box(
        560,
        20,
        190,
        112,
        "Dispatcher × 1",
        ("limits, budgets, deadlines", "fair queue, leases", "usage on disk, replicas"),
        DISPATCH,
    ),
    Box(560, 190, 380, 150, "", (), "#f8fafc"),
    Box(
        576,
        226,
        166,
        100,
        "Generator, FP8",
        ("denoising loop:", "images join and leave", "between steps"),
        ENGINE,
    ),
    Box(
        758,
        226,
        166,
        100,
        "Generator, 16 bit",
        ("nodes without FP8,", "and images that were", "not finite in FP8"),
        ENGINE,
    ),
    Box(576, 380, 166, 62, "TextEncoder", ("shared by all models",), ENGINE),
)
ARROWS = (
    Arrow((146, 185), (230, 185), "1", "request", (158, 172)),
    Arrow((300, 120), (300, 82), "2", "same before?", (312, 102)),
    Arrow((420, 140), (560, 70), "3", "admit, queue", (440, 62)),
    Arrow((560, 110), (420, 178), "4", "grant of a slot", (472, 166)),
    Arrow((420, 215), (576, 262), "5", "image", (474, 252)),
    Arrow((650, 326), (650, 380), "6", "prompt", (662, 358)),
    Arrow((300, 250), (300, 350), "7", "keep for a URL", (312, 304)),
)


def svg() -> str:
    """The picture as an SVG document."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#0f172a">',
        "<title>The way of a request through Octet</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z" fill="#475569"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    parts += [_box(box) for box in BOXES]
    parts.append(_text(576, 212, "cards: several replicas share one, by fractions", "#475569"))
    parts += [_arrow(arrow) for arrow in ARROWS]
    return "\n".join([*parts, "</svg>", ""])


def _box(box: Box) -> str:
    lines = [
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="8" '
        f'fill="{box.fill}" stroke="#94a3b8"/>'
    ]
    if box.name:
        lines.append(
            f'<text x="{box.x + 12}" y="{box.y + 24}" font-weight="600" font-size="15">'
            f"{escape(box.name)}</text>"
        )
    lines += [
        _text(box.x + 12, box.y + 46 + 19 * i, line, "#334155") for i, line in enumerate(box.lines)
    ]
    return "\n".join(lines)


def _arrow(arrow: Arrow) -> str:
    (x1, y1), (x2, y2), (x, y) = arrow.start, arrow.end, arrow.at
    return "\n".join(
        (
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#475569" stroke-width="1.5" '
            'marker-end="url(#tip)"/>',
            f'<circle cx="{x}" cy="{y}" r="9" fill="#0f172a"/>',
            f'<text x="{x}" y="{y + 4}" text-anchor="middle" font-size="11" fill="white">'
            f"{arrow.step}</text>",
            _text(x + 14, y + 4, arrow.text, "#475569"),
        )
    )


def _text(x: int, y: int, text: str, fill: str) -> str:
    return f'<text x="{x}" y="{y}" fill="{fill}">{escape(text)}</text>'


if __name__ == "__main__":
    OUT.write_text(svg())
