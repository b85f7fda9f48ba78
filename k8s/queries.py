"""Builders of PromQL queries over Octet's metrics, which dashboards and alerts share.

`by`: tags to group by, separated by commas. Keyword arguments select values of tags: see `name`.
"""

from __future__ import annotations

from serve.metric_catalogue import exported

WINDOW = "$__rate_interval"  # a variable that Grafana fills in


def name(metric: str, **matching: str) -> str:
    """A metric's exported name with a selector of its tags.

    A tag's name that ends in `_not` excludes the value. A value with `|` or `.` is a regular
    expression. For example, `name("octet_requests", status="5..")` selects with `{status=~"5.."}`.
    """
    pairs = []
    for tag, value in matching.items():
        negative = tag.endswith("_not")
        pattern = "|" in value or "." in value
        sign = {(0, 0): "=", (0, 1): "=~", (1, 0): "!=", (1, 1): "!~"}[negative, pattern]
        pairs.append(f'{tag.removesuffix("_not")}{sign}"{value}"')
    return exported(metric) + (f"{{{','.join(pairs)}}}" if pairs else "")


def rate(metric: str, by: str = "", window: str = WINDOW, **matching: str) -> str:
    """How much a counter grows per second, summed over processes."""
    return f"sum{_by(by)} (rate({name(metric, **matching)}[{window}]))"


def increase(metric: str, window: str, by: str = "", **matching: str) -> str:
    """How much a counter grew within the window, summed over processes."""
    return f"sum{_by(by)} (increase({name(metric, **matching)}[{window}]))"


def happened(metric: str, window: str, by: str = "", **matching: str) -> str:
    """A condition: a counter of rare events grew within the window.

    Ray exports such a counter only from its first event on. `increase` does not see that event, so
    a counter that did not exist before the window counts as grown too.
    """
    counter = name(metric, **matching)
    first = f"sum{_by(by)} ({counter} unless {counter} offset {window})"
    return f"({increase(metric, window, by, **matching)} > 0 or {first} > 0)"


def total(metric: str, by: str = "", **matching: str) -> str:
    """The sum of a gauge over the processes that set it."""
    return f"sum{_by(by)} ({name(metric, **matching)})"


def most(metric: str, by: str = "", **matching: str) -> str:
    """The largest value of a gauge over processes.

    Use this for a gauge that several processes set to the same value, or whose process may just
    have been replaced.
    """
    return f"max{_by(by)} ({name(metric, **matching)})"


def quantile(q: float, histogram: str, by: str = "", window: str = WINDOW) -> str:
    """The quantile `q` (0 to 1) of a histogram."""
    grouped = ", ".join(filter(None, ("le", by)))
    buckets = f"sum by ({grouped}) (rate({exported(histogram)}_bucket[{window}]))"
    return f"histogram_quantile({q:g}, {buckets})"


def mean(histogram: str, by: str = "", window: str = WINDOW) -> str:
    """The mean of a histogram's observations."""
    parts = (f"rate({exported(histogram)}_{part}[{window}])" for part in ("sum", "count"))
    return " / ".join(f"sum{_by(by)} ({part})" for part in parts)


def _by(tags: str) -> str:
    return f" by ({tags})" if tags else ""
