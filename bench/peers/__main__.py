"""Compare Octet with other ways to serve the same model.

    python -m bench.peers [--quick]

The servers run one after the other on this machine, and the same client sends them requests for the
demo model. First Octet is tuned: of the configurations in its grid it gets the one with the largest
throughput of mixed requests. It is then measured, and its throughput counts as 100 % load. Each
peer gets the configuration of its grid that answers the most requests in time at 80 % load.
`--quick` tries no configurations, but takes those of bench/peers/tuned.json, which whole runs
write. Writes bench/results/peers.json and bench/peers.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from ..machine import machine, speed
from .alone import CHECKED, alone
from .contestants import (
    CONTESTANTS,
    HERE,
    ROOT,
    Config,
    Contestant,
    Server,
    image_of,
    served,
    shown,
)
from .load import OwnTimes, killed, light_tenant, mixed, throughput, wasted
from .report import beside_best_peer, likeness_db, plot, table

TUNED = HERE / "tuned.json"
RESULT = ROOT / "bench" / "results" / "peers.json"
PLOT = ROOT / "bench" / "peers.png"
EQUAL = "128x128", 20, 3.0
LEAST_PSNR_DB = 40.0  # of an image against that of the pipeline alone


class Durations(NamedTuple):
    """Seconds of each part of the measurement, 0 to leave it out; and what else differs."""

    tune: float
    most: float  # for each of the two largest throughputs
    mixed: float
    kill: float
    kills: int
    flood: float
    calm: float
    loads: tuple[float, ...]
    wasted: bool
    repeats: int  # for the images' own times


FULL = Durations(10, 15, 30, 36, 3, 25, 25, (0.5, 0.8, 0.95), True, 3)
QUICK = Durations(0, 4, 7, 5, 1, 5, 0, (0.8,), False, 1)


def say(text: str, began: float = time.monotonic()) -> None:
    print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)


def fastest(octet: Contestant, seconds: float, dtype: str) -> Config:
    """The configuration of Octet that generates most mixed images."""

    def per_s(config: Config) -> float:
        with served(octet, config, dtype) as server:
            found = throughput(server, "tune", seconds)
        say(f"{octet.name} {shown(config)}: {found:.2f} mixed images/s")
        return found

    return max(octet.grid, key=per_s)


def tuned(
    contestant: Contestant, per_s: float, seconds: float, own_s: OwnTimes, dtype: str
) -> Config:
    """The configuration that answers most requests in time at `per_s`; on a tie, the lowest p99."""

    def quality(config: Config) -> tuple[float, float]:
        with served(contestant, config, dtype) as server:
            found = mixed(server, "tune", per_s, seconds, own_s)
        say(f"{contestant.name} {shown(config)}: {found['goodput']:.0%} in time")
        return round(found["goodput"], 2), -found["p99_s"]

    return max(contestant.grid, key=quality)


def measured(
    server: Server, per_s: float | None, lasts: Durations, own_s: OwnTimes, image: str
) -> dict[str, Any]:
    """All parts for one contestant; between them the server comes to rest.

    `per_s`: Octet's largest throughput of mixed requests, None for Octet itself. `image`: what
    `CHECKED` must give. The kills come last, because a server may not survive them.
    """
    alike_db = likeness_db(image, image_of(server, CHECKED))
    assert alike_db > LEAST_PSNR_DB, f"{server.contestant.name}: another image: {alike_db:.1f} dB"
    found: dict[str, Any] = {
        "version": server.contestant.version,
        "lines": server.contestant.lines,
        "start_s": server.start_s,
        "speed": speed(),
        "psnr_db": alike_db,
        "mixed_per_s": throughput(server, "most", lasts.most),
        "equal_per_s": throughput(server, "equal", lasts.most, EQUAL),
        "mixed": {},
    }
    per_s = per_s or found["mixed_per_s"]
    for load in lasts.loads:
        server.rest()
        name = f"{load:g}"
        found["mixed"][name] = mixed(server, name, load * per_s, lasts.mixed, own_s)
    server.rest()
    found["memory_mib"] = server.memory_mib()
    if lasts.wasted:
        found["wasted"] = wasted(server)
    if lasts.calm:
        found["calm"] = light_tenant(server, per_s, lasts.calm, own_s, flooded=False)
    found["flooded"] = light_tenant(server, per_s, lasts.flood, own_s, flooded=True)
    server.rest()
    found["killed"] = killed(server, 0.5 * per_s, lasts.kill, own_s, lasts.kills)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about 10 minutes, without tuning")
    parser.add_argument("--only", nargs="*", default=[], help="names of the peers to measure")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    lasts = QUICK if options.quick else FULL
    chosen = [c for c in CONTESTANTS if not options.only or c.name in ("Octet", *options.only)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        dtype, own_s, image = pool.submit(alone, lasts.repeats).result()
    configs: dict[str, Config] = json.loads(TUNED.read_text(encoding="utf-8"))
    say(f"the peers compute in {dtype}, in which diffusers' pipeline is fastest here")
    octet, *peers = chosen
    if not options.quick:
        configs[octet.name] = fastest(octet, lasts.tune, dtype)
    contestants: dict[str, Any] = {}
    report: dict[str, Any] = {"machine": machine(), "dtype": dtype, "quick": options.quick}
    per_s: float | None = None
    for contestant in (octet, *peers):
        if per_s and not options.quick:
            configs[contestant.name] = tuned(contestant, 0.8 * per_s, lasts.tune, own_s, dtype)
        config = configs[contestant.name]
        with served(contestant, config, dtype) as server:
            found = measured(server, per_s, lasts, own_s, image)
        contestants[contestant.name] = found | {"config": config}
        per_s = per_s or found["mixed_per_s"]
        at = found["mixed"]["0.8"]
        say(f"{contestant.name} {shown(config)}: {at['goodput']:.0%} in time at 80 %")
        # Written after each, so that a later one that fails loses nothing.
        report |= {"octet_mixed_per_s": per_s, **beside_best_peer(contestants)}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps({**report, "contestants": contestants}, indent=1) + "\n")
        if not options.quick:
            TUNED.write_text(json.dumps(configs, indent=1) + "\n")
    report["contestants"] = contestants
    plot(report, PLOT)
    print(table(report))


if __name__ == "__main__":
    main()
