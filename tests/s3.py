"""An S3 server for tests, and a proxy that is slow, refuses connections, or loses answers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

import boto3

from serve.settings.application import S3Settings

# With these variables, the tests run on any bucket that may be emptied.
ENDPOINT, BUCKET = os.environ.get("TEST_S3_ENDPOINT"), os.environ.get("TEST_S3_BUCKET")

Fault = Literal["none", "refuse", "slow", "lose_answers", "error"]


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a local server, or of the server that the environment names."""
    if ENDPOINT:
        yield ENDPOINT
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(  # noqa: S603 - this interpreter
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def a_bucket(endpoint: str, **more: object) -> S3Settings:
    """An empty bucket."""
    name = BUCKET or f"images-{time.monotonic_ns()}"
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    if BUCKET:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for found in page.get("Contents", ()):
                client.delete_object(Bucket=name, Key=found["Key"])
    else:
        client.create_bucket(Bucket=name)
    return S3Settings(bucket=name, endpoint_url=endpoint, region="us-east-1", **more)  # type: ignore[arg-type]  # any fields


class FaultProxy:
    """Passes connections on to an HTTP server, with the current `fault`."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream, self._upstream = upstream, (parts.hostname, parts.port)
        self.fault: Fault = "none"
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            fault = self.fault
            self.requests += 1
            if fault == "refuse":
                return
            if fault == "error":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\n\r\n")
                return
            if fault == "slow":
                time.sleep(30)
                return
            with socket.create_connection(self._upstream) as server:
                back = threading.Thread(target=self._answer, args=(server, client, fault))
                back.start()
                while data := client.recv(65536):
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                back.join()

    def _answer(self, server: socket.socket, client: socket.socket, fault: Fault) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if fault == "lose_answers":
                    go_on, end, rest = data.partition(b"\r\n\r\n")
                    if b"100 Continue" in go_on:
                        client.sendall(go_on + end)
                        data = rest
                    if data:
                        # The request is done, but its answer is lost.
                        client.shutdown(socket.SHUT_RDWR)
                        return
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
