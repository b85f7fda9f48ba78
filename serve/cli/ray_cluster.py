"""The nodes of a Ray cluster at an address, asked for by a process of its own.

Ray's client tries for minutes at an address where no Ray answers, and ignores Ctrl-C meanwhile. So
it runs in a child process, which ends at once when this one is interrupted or loses patience.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import asdict

from cluster.placement import Node

from ..launch import LaunchError

CONNECT_S = 3.0
ANSWER_S = 30.0
ASKS_FOR_TOKEN = 3  # the exit code of the child process
NO_RAY = 4


def nodes_of_cluster(address: str) -> list[Node]:
    """The living nodes of the Ray cluster at an address.

    Raises `LaunchError` if nothing listens there within `CONNECT_S` seconds, if no Ray answers
    within `ANSWER_S`, or if it asks for another token.
    """
    check_listening(address)
    try:
        child = subprocess.run(  # noqa: S603 - this interpreter and this module
            [sys.executable, "-W", "ignore", "-m", __name__, address],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"no Ray at {address}: no answer within {ANSWER_S:g} s") from None
    if child.returncode == ASKS_FOR_TOKEN:
        raise LaunchError(
            f"the Ray at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as "
            "they were when it started (octet serve takes both from its environment)"
        )
    if child.returncode == NO_RAY:
        raise LaunchError(f"no Ray at {address}: {json.loads(child.stdout)}")
    if child.returncode:
        *_, reason = ["it said nothing", *child.stderr.strip().splitlines()]
        raise LaunchError(f"asking the Ray at {address} failed: {reason}")
    return [Node(**node) for node in json.loads(child.stdout)]


def check_listening(address: str) -> None:
    """Raise `LaunchError` if nothing listens at HOST:PORT within `CONNECT_S` seconds.

    Addresses of other forms, such as "auto", are not checked.
    """
    if match := re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\]):(\d+)", address):
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise LaunchError(f"no Ray at {address}: {error}") from None


def _print_nodes(address: str) -> None:
    import ray

    from cluster.ray_nodes import living_nodes

    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
        print(json.dumps([asdict(node) for node in living_nodes()]))  # noqa: T201 - for the parent
    except ray.exceptions.AuthenticationError:
        sys.exit(ASKS_FOR_TOKEN)
    except (ConnectionError, ValueError, RuntimeError) as error:
        print(json.dumps(str(error)))  # noqa: T201 - for the parent
        sys.exit(NO_RAY)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    _print_nodes(sys.argv[1])
