"""LitServe: workers gather requests and generate them together."""

import os
from typing import Any

import litserve as ls
from landscapes import Landscapes


class LandscapesAPI(ls.LitAPI):
    def setup(self, device: str) -> None:
        self._landscapes = Landscapes()

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, requests: Any) -> Any:
        if isinstance(requests, dict):  # without batching
            return self._landscapes.images([requests])[0]
        return self._landscapes.images(requests)

    def unbatch(self, output: list[str]) -> list[str]:
        return output

    def encode_response(self, output: str) -> dict[str, str]:
        return {"b64_json": output}


if __name__ == "__main__":
    api = LandscapesAPI(
        max_batch_size=int(os.environ["PEER_BATCH"]),
        batch_timeout=float(os.environ["PEER_WAIT_S"]),
    )
    server = ls.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ["PEER_WORKERS"]),
        timeout=False,
        restart_workers=True,
    )
    server.run(host="127.0.0.1", port=int(os.environ["PEER_PORT"]), generate_client_file=False)
