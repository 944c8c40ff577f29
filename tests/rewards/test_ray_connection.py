"""The connection to a Ray cluster: to one that asks for a token too."""

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
assert CONNECTION.hold()
print("connected:", ray.is_initialized())
CONNECTION.release()
print("connected:", ray.is_initialized())
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a cluster that has found a token in the home folder when it started."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a short path: it becomes part of sockets' names
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
        with subprocess.Popen(command, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
            assert head.stdout is not None
            said = ""
            while "Ray runtime started" not in said:
                line = head.stdout.readline()
                assert line, said
                said += line
            assert "Token authentication is enabled" in said
            yield values | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            head.send_signal(signal.SIGTERM)
            head.communicate(timeout=60)


def test_a_cluster_that_asks_for_a_token_is_joined(environment: dict[str, str]):
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("connected: True\nconnected: False\n", "")
