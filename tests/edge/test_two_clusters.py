"""Two clusters on one PostgreSQL: each an Ingress and a Dispatcher over real HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import httpx
import pytest

from bench.tenants import add_tenants
from serve.settings.application import Settings, StoreSettings
from serve.store.database import Database
from serve.usage import leases
from serve.usage.leases import BudgetLeases, ForgottenError, Need, NeededWork, ReplacedError
from serve.usage.ledger import UsageLedger, records
from serve.usage.record import Used

from ..builders import usage_record
from ..postgres_server import PostgresServer
from ..wait import wait_for
from .databases import NOW, emptied
from .edge import WORK, Edge, started

GENERATE = "/v1/images/generations"
PRICE = WORK[0] + 28 * WORK[1]
MONTH = "2026-11"
LIMITS: dict[str, dict[str, float]] = {
    "thrifty": {"monthly_work": 10 * PRICE},
    "mixed": {"monthly_work": 10 * PRICE},
    "single": {"max_requests": 1},
    "slow": {"requests_per_s": 0.01, "request_burst": 5},
}


class Clusters:
    """Two clusters, `edges`, with one database; `keys`: of each tenant."""

    def __init__(self, edges: list[Edge], keys: dict[str, str], url: str) -> None:
        self.edges, self.keys, self.url = edges, keys, url

    def charged(self, tenant: str) -> int:
        with closing(Database(self.url)) as database:
            return sum(1 for _ in records(database, tenant=tenant))

    def generate(self, cluster: int, tenant: str, prompt: str = "a hill") -> int:
        """Ask one of the clusters for an image; return the status."""
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        url = self.edges[cluster].url + GENERATE
        return httpx.post(url, json={"prompt": prompt}, headers=headers, timeout=30).status_code

    def flood(self, tenant: str, requests: int, **body: int) -> Counter[int]:
        """Ask both clusters in turns, all at the same time; return how often each status came."""

        async def main() -> list[httpx.Response]:
            headers = {"authorization": f"Bearer {self.keys[tenant]}"}
            limits = httpx.Limits(max_connections=requests)
            async with httpx.AsyncClient(headers=headers, limits=limits, timeout=60) as client:
                return await asyncio.gather(
                    *(
                        client.post(
                            self.edges[i % 2].url + GENERATE, json={"prompt": f"{i}", **body}
                        )
                        for i in range(requests)
                    )
                )

        return Counter(answer.status_code for answer in asyncio.run(main()))


@pytest.fixture(scope="module")
def clusters(
    laptop: Settings, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Clusters]:
    url = emptied(postgres)
    store = StoreSettings(url=url)
    keys = add_tenants(store.model_dump(), LIMITS)
    with ExitStack() as stack:
        edges = []
        for _ in range(2):
            folder = str(tmp_path_factory.mktemp("cluster"))
            changes = {"auth": "keys", "data_folder": folder, "store": store, "cache": None}
            edges.append(stack.enter_context(started(laptop.model_copy(update=changes))))
        wait_for(lambda: all(edge.ingress._session.tenants is not None for edge in edges))
        yield Clusters(edges, keys, url)


def test_two_hundred_parallel_requests_at_two_clusters_with_a_budget_for_ten(
    clusters: Clusters,
) -> None:
    assert clusters.flood("thrifty", 200) == {200: 10, 429: 190}
    assert clusters.charged("thrifty") == 10
    for _ in range(2):  # after everything was given back and told
        assert clusters.flood("thrifty", 2) == {429: 2}


def test_a_budget_is_never_overspent_by_requests_of_many_sizes(clusters: Clusters) -> None:
    """Small ones fill what large ones leave, at whichever cluster."""
    sizes = [clusters.flood("mixed", 20, n=n)[200] * n for n in (4, 2, 1)]
    assert sum(sizes) == 10
    assert clusters.charged("mixed") == 10


def test_open_requests_are_told_within_a_second(clusters: Clusters) -> None:
    first, second = clusters.edges
    with ThreadPoolExecutor(1) as pool, first.painter.holding():
        held = pool.submit(clusters.generate, 0, "single", "held")
        wait_for(lambda: second.dispatcher.admission.account("single").open_elsewhere == 1)
        assert clusters.generate(1, "single") == 429
    assert held.result() == 200
    wait_for(lambda: second.dispatcher.admission.account("single").open_elsewhere == 0)
    assert clusters.generate(1, "single") == 200


def test_a_rate_is_used_up_by_both_clusters_together(clusters: Clusters) -> None:
    """In the second before they hear of each other, each may let a burst pass: no more."""
    _, second = clusters.edges
    assert [clusters.generate(0, "slow") for _ in range(5)] == [200] * 5
    account = second.dispatcher.admission.account("slow")
    wait_for(lambda: bool(account.requests and account.requests.remaining(time.monotonic()) < 1))
    assert clusters.generate(1, "slow") == 429


# -- leases alone ---------------------------------------------------------------------------------


@pytest.fixture
def both(postgres: PostgresServer) -> Iterator[tuple[BudgetLeases, BudgetLeases, Database]]:
    url = emptied(postgres)
    with closing(Database(url)) as one, closing(Database(url)) as two:
        first, second = BudgetLeases(one, "a", "a1"), BudgetLeases(two, "b", "b1")
        first.join(MONTH)
        second.join(MONTH)
        yield first, second, one


def needs(*works: float, budget: float = 10.0) -> dict[str, Need]:
    return {"t": Need(0.0, tuple(map(NeededWork, works)), budget)}


def test_leases_and_charges_are_never_more_than_the_budget(
    both: tuple[BudgetLeases, BudgetLeases, Database],
) -> None:
    first, second, database = both
    assert first.extend(needs(4.0, 3.0), MONTH) == {"t": 7.0}
    assert second.extend(needs(2.0, 2.0, 1.0), MONTH) == {"t": 3.0}  # 2 and 1 fit, 2 does not
    ledger = UsageLedger(database, NOW, "a")
    ledger.append([usage_record("c", tenant="t", work_s=4.0)], NOW)
    assert second.extend(needs(1.0), MONTH) == {"t": 0.0}
    first.beat({}, {"t": 3.0}, MONTH)
    assert second.extend(needs(2.0, 2.0), MONTH) == {"t": 2.0}
    assert first.extend(needs(1.0), MONTH) == {"t": 1.0}
    assert second.extend(needs(0.1), MONTH) == {"t": 0.0}


def test_a_request_leaves_what_is_kept_for_accepted_jobs(
    both: tuple[BudgetLeases, BudgetLeases, Database],
) -> None:
    first, second, _ = both

    def need(work_s: float, kept_s: float) -> dict[str, Need]:
        return {"t": Need(0.0, (NeededWork(work_s, kept_s),), 10.0)}

    assert first.extend(need(5.0, 6.0), MONTH) == {"t": 0.0}
    assert first.extend(need(4.0, 6.0), MONTH) == {"t": 4.0}
    assert second.extend(need(6.0, 0.0), MONTH) == {"t": 6.0}


def test_with_plenty_left_a_lease_is_for_several_calls(
    both: tuple[BudgetLeases, BudgetLeases, Database],
) -> None:
    first, *_ = both
    assert first.extend(needs(1.0, budget=1000.0), MONTH) == {"t": 9.0}


def test_the_next_dispatcher_of_a_cluster_takes_its_leases_over(
    both: tuple[BudgetLeases, BudgetLeases, Database],
) -> None:
    first, second, database = both
    first.extend(needs(6.0), MONTH)
    successor = BudgetLeases(database, "a", "a2")
    assert successor.join(MONTH) == {"t": 6.0}
    with pytest.raises(ReplacedError):
        first.extend(needs(1.0), MONTH)
    assert second.extend(needs(5.0, 4.0), MONTH) == {"t": 4.0}


def test_the_leases_of_a_dead_cluster_end(
    both: tuple[BudgetLeases, BudgetLeases, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = both
    first.extend(needs(6.0), MONTH)
    assert second.extend(needs(5.0), MONTH) == {"t": 0.0}
    monkeypatch.setattr(leases, "DEAD_S", -1.0)  # whoever was heard of before now is dead
    assert second.extend(needs(5.0), MONTH) == {"t": 5.0}
    monkeypatch.undo()
    with pytest.raises(ForgottenError):
        first.extend(needs(1.0), MONTH)
    assert first.join(MONTH) == {}
    assert first.extend(needs(6.0), MONTH) == {"t": 0.0}


def test_each_hears_what_the_other_has_used(
    both: tuple[BudgetLeases, BudgetLeases, Database],
) -> None:
    first, second, _ = both
    first.extend(needs(4.0), MONTH)
    assert first.beat({"t": Used(3.0, 1.5, 1)}, {}, MONTH) == ({"b": {}}, {"t": 4.0})
    assert second.beat({}, {}, MONTH) == ({"a": {"t": Used(3.0, 1.5, 1)}}, {})
    assert first.beat({}, {"t": 1.0}, MONTH).leased == {"t": 3.0}
