"""Builders of PromQL queries over Octet's metrics, which dashboards and alerts share.

On Kubernetes every series has the labels `CLUSTER`, by which the two clusters of an upgrade, and
the Octets of several namespaces, stay apart. Elsewhere the series have no such labels, which
Prometheus treats like empty ones.

`by`: tags to group by, separated by commas. Keyword arguments select values of tags: see `name`.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.metric_catalogue import exported

WINDOW = "$__rate_interval"  # a variable that Grafana fills in
CLUSTER = "namespace", "ray_io_cluster"


@dataclass(frozen=True)
class Queries:
    """Queries of one purpose; `selected`: a selector that they all have; `apart`: tags to keep."""

    selected: str = ""
    apart: tuple[str, ...] = ()

    def name(self, metric: str, **matching: str) -> str:
        """A metric's exported name with a selector of its tags.

        A tag's name that ends in `_not` excludes the value. A value with `|` or `.` is a regular
        expression. For example, `name("octet_requests", status="5..")` selects with
        `{status=~"5.."}`.
        """
        return exported(metric) + self._selector(matching)

    def rate(self, metric: str, by: str = "", window: str = WINDOW, **matching: str) -> str:
        """How much a counter grows per second, summed over processes."""
        return f"sum{self.by(by)} (rate({self.name(metric, **matching)}[{window}]))"

    def increase(self, metric: str, window: str, by: str = "", **matching: str) -> str:
        """How much a counter grew within the window, summed over processes."""
        return f"sum{self.by(by)} (increase({self.name(metric, **matching)}[{window}]))"

    def happened(self, metric: str, window: str, by: str = "", **matching: str) -> str:
        """A condition: a counter of rare events grew within the window.

        Ray exports such a counter only from its first event on. `increase` does not see that event,
        so a counter that did not exist before the window counts as grown too.
        """
        counter = self.name(metric, **matching)
        first = f"sum{self.by(by)} ({counter} unless {counter} offset {window})"
        return f"({self.increase(metric, window, by, **matching)} > 0 or {first} > 0)"

    def total(self, metric: str, by: str = "", **matching: str) -> str:
        """The sum of a gauge over the processes that set it."""
        return f"sum{self.by(by)} ({self.name(metric, **matching)})"

    def most(self, metric: str, by: str = "", **matching: str) -> str:
        """The largest value of a gauge over processes.

        Use this for a gauge that several processes set to the same value, or whose process may just
        have been replaced.
        """
        return f"max{self.by(by)} ({self.name(metric, **matching)})"

    def quantile(self, q: float, histogram: str, by: str = "", window: str = WINDOW) -> str:
        """The quantile `q` (0 to 1) of a histogram."""
        grouped = ", ".join(filter(None, ("le", by)))
        return f"histogram_quantile({q:g}, {self.bucket_rate(histogram, grouped, window)})"

    def bucket_rate(self, histogram: str, by: str, window: str, **matching: str) -> str:
        """How much the buckets of a histogram grow per second, summed over processes."""
        buckets = f"{exported(histogram)}_bucket{self._selector(matching)}"
        return f"sum{self.by(by)} (rate({buckets}[{window}]))"

    def mean(self, histogram: str, by: str = "", window: str = WINDOW) -> str:
        """The mean of a histogram's observations."""
        parts = (
            f"rate({exported(histogram)}_{part}{self._selector({})}[{window}])"
            for part in ("sum", "count")
        )
        return " / ".join(f"sum{self.by(by)} ({part})" for part in parts)

    def by(self, tags: str = "") -> str:
        """The clause that groups by these tags, and by those that keep clusters apart."""
        grouped = ", ".join(filter(None, (*self.apart, tags)))
        return f" by ({grouped})" if grouped else ""

    def on(self) -> str:
        """The clause that compares series of the same cluster."""
        return f" on ({', '.join(self.apart)})" if self.apart else ""

    def _selector(self, matching: dict[str, str]) -> str:
        pairs = [self.selected] if self.selected else []
        for tag, value in matching.items():
            negative = tag.endswith("_not")
            pattern = "|" in value or "." in value
            sign = {(0, 0): "=", (0, 1): "=~", (1, 0): "!=", (1, 1): "!~"}[negative, pattern]
            pairs.append(f'{tag.removesuffix("_not")}{sign}"{value}"')
        return f"{{{','.join(pairs)}}}" if pairs else ""
