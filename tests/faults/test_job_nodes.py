"""A node dies with the process that runs jobs, and with Generators that have their images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from serve.launch import RunningApplication
from serve.settings.application import Settings
from serve.settings.file import load_settings
from serve.store.database import Database

from ..builders import ROOT
from ..job_journal import JobJournal
from ..ports import free_port
from ..stored import store_in
from ..wait import wait_for
from .conftest import add_node
from .test_placement import FP8_CARD, SETTINGS, die, nodes_of

BODY = {"prompt": "dunes", "num_inference_steps": 4}


def add_large_node(cluster: Any) -> Any:
    return add_node(cluster, num_cpus=6, num_gpus=2, labels={"ray.io/accelerator-type": FP8_CARD})


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray warns while it starts
def test_a_node_dies_with_the_runner_of_jobs(
    cluster: Any, tmp_path: Path, deploy: Callable[[Settings], RunningApplication]
) -> None:
    environ = {
        **SETTINGS,
        "OCTET_HTTP__PORT": str(free_port()),
        "OCTET_DATA_FOLDER": str(tmp_path),
        "OCTET_JOB_RUNNER__NUM_CPUS": "4.5",  # more than the head has
    }
    settings = load_settings(ROOT / "examples" / "laptop.yaml", environ)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": settings.http.host, "port": settings.http.port},
    )
    first = add_large_node(cluster)
    octet = deploy(settings)
    octet.wait()
    add_large_node(cluster)
    (before,) = nodes_of("Jobs")
    journal = JobJournal(octet.url)
    bodies = [{**BODY, "seed": i} for i in range(200)]
    sending = threading.Thread(target=journal.send_all, args=(bodies,))
    with closing(Database(**store_in(tmp_path))) as database:
        sending.start()
        wait_for(lambda: any(journal.state(id) == "succeeded" for id in list(journal.promised)[:9]))
        die(cluster, first, "Jobs", "Generator-landscapes-fp8", "Generator-landscapes-fp16")
        wait_for(lambda: bool(nodes_of("Jobs") - {before}))
        sending.join()
        ended = journal.check(database, lambda name: (tmp_path / "images" / name).exists())
    assert ended == {"succeeded": len(bodies)}
