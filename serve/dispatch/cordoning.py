"""Cordoning nodes: by an operator's order or because a card fails, and for as long as it takes.

A file keeps the cordoned nodes, so that a restarted Dispatcher knows them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..atomic_file import replace_file
from .cordons import Cordons
from .node_watch import NodeWatch
from .protocol import CordonedNode

FILE = "cordons.json"  # in the data folder

log = logging.getLogger("ray.serve")


class Cordoning:
    """Joins the cordons with the watch over the nodes and with their file."""

    def __init__(
        self, cordons: Cordons, nodes: NodeWatch, folder: Path | None, on_change: Callable[[], None]
    ) -> None:
        """`folder`: the folder of the file; None: the cordons end with this process.

        `on_change` is called after each change.
        """
        self._cordons, self._nodes, self._on_change = cordons, nodes, on_change
        self._file = folder / FILE if folder else None

    async def run(self, every_s: float) -> None:
        """Cordon the nodes whose cards fail, for ever."""
        while True:
            await asyncio.sleep(every_s)
            if due := self._nodes.to_cordon(time.monotonic()):
                await self._cordon(due)

    async def cordon(self, node: str, reason: str) -> str | None:
        """Give a node no new work from now on, and move its replicas elsewhere; return its id.

        `node`: Ray's id of the node, or the beginning of it. Returns None if it is not the
        beginning of exactly one living node's id.
        """
        found = _only_one(node, self._nodes.nodes)
        if found:
            await self._cordon(CordonedNode(found, reason))
        return found

    async def uncordon(self, node: str) -> str | None:
        """Let a node, and others with its cards, get work again; return its id.

        Returns None if `node` is not the beginning of exactly one cordoned node's id.
        """
        found = _only_one(node, self._cordons.cordoned)
        if found:
            ended = self._cordons.cordoned[found]
            self._cordons.uncordon(found)
            self._nodes.end_drain(found)
            await self._keep(remove=ended)
        return found

    async def _cordon(self, cordoned: CordonedNode) -> None:
        self._cordons.cordon(cordoned.node, cordoned.reason, cordoned.cards or None)
        log.error("node %s is cordoned: %s", cordoned.node, cordoned.reason)
        await self._keep(add=self._cordons.cordoned[cordoned.node])

    async def _keep(
        self, add: CordonedNode | None = None, remove: CordonedNode | None = None
    ) -> None:
        self._nodes.look_again()
        self._on_change()
        if self._file is None:
            return
        try:
            await asyncio.to_thread(change_cordons, self._file, add=add, remove=remove)
        except (OSError, ValueError) as error:  # the change holds until this process ends
            log.error("the cordoned nodes are not on disk: %s", error)


def read_cordons(folder: Path | None) -> list[CordonedNode]:
    """The cordoned nodes in the file of `folder`; none if there is no file.

    Raises `OSError` if the file cannot be read, and `ValueError` if it is not such a file.
    """
    file = folder / FILE if folder else None
    if file is None or not file.exists():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [CordonedNode(n["node"], n["reason"], tuple(n["cards"])) for n in found]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: not a list of cordoned nodes") from None


def change_cordons(
    file: Path, *, add: CordonedNode | None = None, remove: CordonedNode | None = None
) -> None:
    """Add a cordoned node to the file, or remove one; other entries with its cards go.

    What another cluster has written about other cards stays. Raises `OSError` if the file cannot be
    written, and `ValueError` if it is not such a file.
    """
    from filelock import FileLock

    with FileLock(f"{file}.lock"):
        kept = read_cordons(file.parent)
        for gone in (one for one in (add, remove) if one):
            cards = set(gone.cards)
            kept = [one for one in kept if one.node != gone.node and not cards & set(one.cards)]
        text = json.dumps([one._asdict() for one in (*kept, *([add] if add else []))], indent=1)
        replace_file(file, text.encode(), sync=True)


def _only_one(beginning: str, ids: Iterable[str]) -> str | None:
    """The only id with this beginning; None if there are none or several."""
    found = [id for id in ids if id.startswith(beginning)] if beginning else []
    return found[0] if len(found) == 1 else None
