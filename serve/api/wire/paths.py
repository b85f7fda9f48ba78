"""The paths of requests for images, as in OpenAI's API.

Pure: standard library only.
"""

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"  # OpenAI has retired it


def endpoint(path: str) -> str:
    """The name of a path in metrics: `generations` or `edits`; empty for any other path."""
    return path.rpartition("/")[2] if path in (GENERATIONS, EDITS) else ""
