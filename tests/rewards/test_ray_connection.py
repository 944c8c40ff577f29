"""The connection to a Ray cluster that requires a token, and to one that does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CODE = """
import ray
from rankup.rewards.ray_connection import CONNECTION


class One:
    def number(self):
        return 1


assert CONNECTION.hold()
actor = ray.remote(One).remote()
print(ray.get(actor.number.remote()))
CONNECTION.release()
print("connected:", ray.is_initialized())
"""


@pytest.fixture(params=["unset", "disabled"])
def environment(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment of a client of a cluster that found a token in the home folder when it started."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a short path, as it becomes part of socket names
        token = Path(folder, "home", ".ray", "auth_token")
        token.parent.mkdir(parents=True)
        token.write_text("0123456789abcdef" * 4)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        values["HOME"] = f"{folder}/home"
        command = [
            Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false",
            f"--port={port}", f"--temp-dir={folder}/ray", "--disable-usage-stats", f"--object-store-memory={100 * 2**20}",
        ]  # fmt: skip
        mode = {} if request.param == "unset" else {"RAY_AUTH_MODE": request.param}
        with subprocess.Popen(command, env=values | mode, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
            assert head.stdout is not None
            said = ""
            while "Ray runtime started" not in said:
                line = head.stdout.readline()
                assert line, said
                said += line
            assert ("Token authentication is enabled" in said) == (request.param == "unset")
            yield values | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            head.send_signal(signal.SIGTERM)
            head.communicate(timeout=60)


def test_a_cluster_is_joined_with_and_without_a_token(environment: dict[str, str]):
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("1\nconnected: False\n", "")
