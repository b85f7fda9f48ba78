"""The queries of the dashboards, and the metrics that they use."""

from __future__ import annotations

import re

from k8s import dashboards
from serve.metric_catalogue import ALL, exported

WINDOW = "30s"


def queries() -> list[str]:
    """All queries of the dashboards, with a fixed interval for rates, for all clusters."""
    return [
        re.sub(r"\$(namespace|cluster)", ".*", query).replace("$__rate_interval", WINDOW)
        for _, panels in dashboards.DASHBOARDS.values()
        for panel in panels
        for query, _ in panel.queries
    ]


def metrics_in(query: str) -> set[str]:
    """Names of the catalogue's metrics that a query uses."""
    names = {exported(name): name for name in ALL}
    found = set(re.findall(r"ray_octet_\w+", query))
    return {names[re.sub("_(bucket|sum|count)$", "", name)] for name in found}
