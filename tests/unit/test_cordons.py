"""Nodes are cordoned by hand or because their cards fail, and nothing is lost meanwhile."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.placement import Node
from cluster.telemetry import CardTelemetry
from serve.dispatch.client.session import DispatchSession
from serve.dispatch.cordoning import FILE, change_cordons, read_cordons
from serve.dispatch.cordons import WINDOW_S, Cordons
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.protocol import CordonedNode, Heartbeat, Lease

from ..builders import queued_image
from ..in_process import PROMPT, Client, Handle, a_dispatcher
from .nvml import UUID, FakeNvml

CARD = UUID.removeprefix("GPU-")


def heartbeat(name: str = "r", node: str = "n", card: str = "c", fault: str = "") -> Heartbeat:
    return Heartbeat("p", name, 4, node=node, card=card, fault=fault)


def test_a_card_with_two_faults_in_ten_minutes_is_due() -> None:
    cordons = Cordons()
    assert cordons.heard(heartbeat(), 0) == 4
    for second in range(20):  # one incident: several heartbeats of several replicas
        assert cordons.heard(heartbeat(f"r{second % 2}", fault="Xid 79"), second) == 0
    assert not cordons.due(20)
    cordons.died(heartbeat("s"), ["call"], 100)
    cordons.generated("call", "c")  # on the same card
    assert not cordons.due(100)  # the call may be the cause
    cordons.generated("call", "another")
    (due,) = cordons.due(100)
    assert (due.node, due.cards) == ("n", ("c",))
    assert "Xid 79, a replica died on it" in due.reason
    assert not cordons.due(WINDOW_S + 50)  # the first one is forgotten by then


def test_a_card_with_a_fault_runs_one_image_at_a_time() -> None:
    cordons = Cordons()
    cordons.died(heartbeat(), ["call"], 0)
    assert cordons.heard(heartbeat("new"), 1) == 1
    assert cordons.heard(heartbeat("other", node="m", card="d"), 1) == 4
    assert cordons.heard(heartbeat("new"), WINDOW_S + 1) == 4


def test_a_call_that_kills_replica_after_replica_is_the_cause() -> None:
    cordons = Cordons()
    cordons.died(heartbeat("r"), ["poison", "neighbour"], 0)
    cordons.generated("neighbour", "another")
    cordons.died(heartbeat("s"), ["poison"], 100)
    assert not cordons.due(100)
    cordons.died(heartbeat("t", node="m", card="d"), ["poison"], 200)
    for node, card in (("n", "c"), ("m", "d")):
        assert cordons.heard(heartbeat("new", node, card), 201) == 4  # forgiven


def test_a_cordoned_card_is_known_on_the_next_node() -> None:
    cordons = Cordons()
    cordons.heard(heartbeat(), 0)
    cordons.cordon("n", "noise")
    assert cordons.heard(heartbeat(), 1) == 0
    assert cordons.heard(heartbeat("new", node="m"), 2) == 0
    (due,) = cordons.due(2)
    assert due == CordonedNode("m", "noise", ("c",))
    cordons.cordon(*due)
    assert list(cordons.cordoned) == ["m"]  # the card has moved
    assert cordons.uncordon("m")
    assert cordons.heard(heartbeat("new", node="m"), 3) == 4
    assert not cordons.uncordon("m")
    assert not cordons.due(3)


def test_the_file_keeps_what_other_clusters_have_cordoned(tmp_path: Path) -> None:
    assert read_cordons(tmp_path) == []
    ours, theirs = CordonedNode("a", "x", ("1",)), CordonedNode("b", "y", ("2",))
    change_cordons(tmp_path / FILE, add=ours)
    change_cordons(tmp_path / FILE, add=theirs)
    change_cordons(tmp_path / FILE, add=CordonedNode("c", "again", ("1",)))  # the card has moved
    assert read_cordons(tmp_path) == [theirs, CordonedNode("c", "again", ("1",))]
    change_cordons(tmp_path / FILE, remove=ours)
    assert read_cordons(tmp_path) == [theirs]
    (tmp_path / FILE).write_text("{}")
    assert read_cordons(tmp_path) == []
    (tmp_path / FILE).write_text("[1]")
    with pytest.raises(ValueError, match="not a list of cordoned nodes"):
        read_cordons(tmp_path)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - threads and timers make it true
            await asyncio.sleep(0.01)


QUICK = replace(PROMPT, heartbeat_s=0.01, nodes_s=0.02)


class Machines:
    """Two nodes with a card and a replica of two slots each; the card of "bad" fails.

    An image that runs on the bad card for some heartbeats makes its driver report an error, and
    kills the replica with all images that it runs. Another replica takes its place on the card.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher, self.nvml = dispatcher, FakeNvml()
        self.running: dict[str, dict[Lease, asyncio.Future[bool]]] = {"bad": {}, "good": {}}
        self.lock, self.careful = asyncio.Lock(), False
        self.deaths = self.lost = 0
        self.up = True

    async def beat(self) -> None:
        """Send heartbeats as Generators do, for ever."""
        telemetry = CardTelemetry(CARD, self.nvml)
        while True:
            if not self.up:  # Ray Serve starts another replica
                telemetry = CardTelemetry(CARD, self.nvml)
            telemetry.sample()
            for node, images in self.running.items():
                card, fault = (CARD, telemetry.broken) if node == "bad" else ("0", "")
                name = f"{node}{self.deaths}"
                beat = Heartbeat("p", name, 2, 0.0, 1e6, node, 0.0, card, fault)
                reply = await self.dispatcher.report_replica(beat, list(images))
                if node == "bad":
                    self.careful = reply.one_at_a_time
            self.up = True  # a new replica gets images after its first heartbeat
            await asyncio.sleep(0.01)

    async def run(self, lease: Lease, *, last: bool) -> bool | None:
        """Run an image, on the bad card if its replica takes one.

        `last`: whether it is the image's last attempt. Returns whether the image was generated;
        None if its replica died before it was started.
        """
        usable = self.up and "bad" not in self.dispatcher.grants.draining
        usable = usable and not (last and self.careful)
        if not usable or len(self.running["bad"]) > 1:
            self.running["good"][lease] = asyncio.get_running_loop().create_future()
            await asyncio.sleep(0.05)  # some heartbeats
            del self.running["good"][lease]
            return True
        if not self.careful:
            return await self._on_bad(lease)
        deaths = self.deaths
        async with self.lock:
            return await self._on_bad(lease) if deaths == self.deaths else None

    async def _on_bad(self, lease: Lease) -> bool:
        died = self.running["bad"][lease] = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.04):  # some heartbeats
                await asyncio.shield(died)
        if not died.done():
            self.nvml.xids.append(79)
            self.up, self.deaths = False, self.deaths + 1
            for image in self.running["bad"].values():
                image.set_result(False)
                self.lost += 1
            self.running["bad"] = {}
        return False


def test_a_bad_card_costs_at_most_three_images_and_no_request(tmp_path: Path) -> None:
    drained: list[str] = []

    async def image(session: DispatchSession, machines: Machines) -> bool:
        call = session.open("t", uuid.uuid4().hex, [queued_image()], 60, Client())
        await call.admitted()
        try:
            attempts = 0
            while attempts < 3:
                async with call.slot(0) as slot:
                    done = await machines.run(slot.lease, last=attempts == 2)
                    slot.took_s = None if done is False else 1.0 if done else 0.0
                    slot.lost = done is False
                    attempts += slot.lost
                    if done:
                        return True
            return False
        finally:
            call.close()

    async def main() -> tuple[Machines, Dispatcher, list[bool]]:
        nodes = [Node("bad", num_cpus=1), Node("good", num_cpus=1)]
        folder = str(tmp_path)
        dispatcher = a_dispatcher(
            "p", nodes=nodes, drained=drained, timing=QUICK, data_folder=folder, max_queued=99
        )
        dispatcher._cordons.incident_s = 0.0  # replicas start at once here
        machines = Machines(dispatcher)
        beating = asyncio.create_task(machines.beat())
        session = DispatchSession(Handle(dispatcher), QUICK)
        async with asyncio.timeout(20):
            images = [asyncio.create_task(image(session, machines)) for _ in range(20)]
            done = await asyncio.gather(*images)
            await until(lambda: bool(drained))
        assert not beating.done()
        beating.cancel()
        return machines, dispatcher, done

    machines, dispatcher, done = asyncio.run(main())
    assert all(done)
    assert 1 <= machines.lost <= 3
    assert set(drained) == {"bad"}
    (cordoned,) = read_cordons(tmp_path)
    assert (cordoned.node, cordoned.cards) == ("bad", (CARD,))
    assert cordoned.reason in str(dispatcher._status().as_json()["cordoned"])


def test_the_last_node_that_can_hold_a_pool_stays() -> None:
    async def main() -> None:
        drained: list[str] = []
        dispatcher = a_dispatcher("p", drained=drained, timing=QUICK)
        await asyncio.sleep(0.05)  # the nodes have been read
        dispatcher._cordons.incident_s = 0.0
        for number in range(4):
            beat = Heartbeat("p", f"r{number}", 1, node="n", card="c", fault="Xid 79")
            await dispatcher.report_replica(beat)
            await asyncio.sleep(0.01)
        assert dispatcher._cordons.due(time.monotonic())
        dispatcher.grants.expire_replicas(math.inf)  # Serve ends unhealthy replicas
        await asyncio.sleep(0.1)  # several rounds
        assert not drained
        assert not (await dispatcher.state()).cordoned

    asyncio.run(main())


def test_operators_cordon_a_node_by_the_beginning_of_its_id() -> None:
    async def main() -> None:
        drained: list[str] = []
        nodes = [Node("abc", num_cpus=1), Node("abd", num_cpus=1)]
        dispatcher = a_dispatcher("p", nodes=nodes, drained=drained, timing=QUICK)
        await asyncio.sleep(0.05)
        await dispatcher.report_replica(Heartbeat("p", "r", 1, node="abc"))
        assert dispatcher.grants.staying("p").slots == 1
        assert await dispatcher.cordon("ab", "noise") is None
        assert await dispatcher.cordon("x", "noise") is None
        assert await dispatcher.cordon("", "noise") is None
        assert await dispatcher.cordon("abc", "noise") == "abc"
        await until(lambda: bool(drained))
        await dispatcher.report_replica(Heartbeat("p", "r", 1, node="abc"))
        assert dispatcher.grants.staying("p").slots == 0
        row = (await dispatcher.overview())["nodes"][0]
        assert (row["node"], row["replicas"], row["cordoned"]) == ("abc", 1, "noise")
        assert await dispatcher.uncordon("abd") is None
        assert await dispatcher.uncordon("a") == "abc"
        await dispatcher.report_replica(Heartbeat("p", "r", 1, node="abc"))
        assert dispatcher.grants.staying("p").slots == 1

    asyncio.run(main())
