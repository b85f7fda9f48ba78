"""PromQL over Octet's metrics, for dashboards and alerts alike."""

from __future__ import annotations

from serve.metric_catalogue import exported

WINDOW = "$__rate_interval"  # Grafana's


def name(metric: str, **matching: str) -> str:
    """A metric with the tags that match; `_not` behind a tag's name, and `=~` for what has a |."""
    pairs = []
    for tag, value in matching.items():
        negative = tag.endswith("_not")
        pattern = "|" in value or "." in value
        sign = {(0, 0): "=", (0, 1): "=~", (1, 0): "!=", (1, 1): "!~"}[negative, pattern]
        pairs.append(f'{tag.removesuffix("_not")}{sign}"{value}"')
    return exported(metric) + (f"{{{','.join(pairs)}}}" if pairs else "")


def rate(metric: str, by: str = "", window: str = WINDOW, **matching: str) -> str:
    """Of a counter, a second, summed."""
    return f"sum{_by(by)} (rate({name(metric, **matching)}[{window}]))"


def increase(metric: str, window: str, by: str = "", **matching: str) -> str:
    return f"sum{_by(by)} (increase({name(metric, **matching)}[{window}]))"


def happened(metric: str, window: str, by: str = "", **matching: str) -> str:
    """Of a counter of rare events: more than none. Ray exports it from its first event on, which
    `increase` does not see.
    """
    counter = name(metric, **matching)
    first = f"sum{_by(by)} ({counter} unless {counter} offset {window})"
    return f"({increase(metric, window, by, **matching)} > 0 or {first} > 0)"


def total(metric: str, by: str = "", **matching: str) -> str:
    """Of a gauge, over the processes that set it."""
    return f"sum{_by(by)} ({name(metric, **matching)})"


def most(metric: str, by: str = "", **matching: str) -> str:
    """Of a gauge that several processes set, or one that has just been replaced."""
    return f"max{_by(by)} ({name(metric, **matching)})"


def quantile(q: float, histogram: str, by: str = "", window: str = WINDOW) -> str:
    grouped = ", ".join(filter(None, ("le", by)))
    buckets = f"sum by ({grouped}) (rate({exported(histogram)}_bucket[{window}]))"
    return f"histogram_quantile({q:g}, {buckets})"


def mean(histogram: str, by: str = "", window: str = WINDOW) -> str:
    parts = (f"rate({exported(histogram)}_{part}[{window}])" for part in ("sum", "count"))
    return " / ".join(f"sum{_by(by)} ({part})" for part in parts)


def _by(tags: str) -> str:
    return f" by ({tags})" if tags else ""
