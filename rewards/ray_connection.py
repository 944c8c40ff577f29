"""This process's connection to a Ray cluster, shared by everything that needs one.

    if CONNECTION.hold():                   # connects; False if user code has connected, which then also disconnects
        ...
        CONNECTION.release()                # the last holder to release it disconnects

It connects to the cluster in Ray's `RAY_ADDRESS`, or to a new one on this machine alone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from urllib.parse import urlsplit

from .texts import describe

REACH_TIMEOUT = 10.0
"""Seconds for the cluster to accept a connection."""


class Connection:
    """See the module's docstring. Ray has one connection per process, so there is one instance, `CONNECTION`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holders = 0
        self.dashboard_url: str | None = None
        """Dashboard of the cluster that `hold` has connected to; None if it has none."""

    def hold(self, *, dashboard: bool = False, logs: bool = True) -> bool:
        """Connect if this process is not connected; False if user code has called `ray.init` itself.

        Args:
            dashboard: whether a cluster that is started here serves Ray's dashboard.
            logs: whether the output of Ray's workers, and Ray's messages about them, are printed here too.

        Raises:
            ConnectionError: no cluster answers at `RAY_ADDRESS`.
        """
        import ray

        with self._lock:
            if not ray.is_initialized():
                self.dashboard_url = _connect(dashboard=dashboard, logs=logs)
            elif self._num_holders == 0:
                return False
            self._num_holders += 1
            return True

    def release(self) -> None:
        """Disconnect if there is no other holder."""
        import ray

        with self._lock:
            self._num_holders -= 1
            if self._num_holders == 0:
                ray.shutdown()


CONNECTION = Connection()


def starts_a_cluster() -> bool:
    """Whether `CONNECTION.hold` would start a cluster on this machine."""
    return not os.environ.get("RAY_ADDRESS")


def _connect(*, dashboard: bool, logs: bool) -> str | None:
    import ray
    from ray._private import worker

    logging.getLogger("ray").setLevel(logging.ERROR)
    # By default Ray would join any cluster that this machine belongs to.
    address = "local" if starts_a_cluster() else os.environ["RAY_ADDRESS"]
    at_sigterm = signal.getsignal(signal.SIGTERM)
    # The only switch for the pages that Ray prints in this process about lost nodes and workers.
    worker._worker_logs_enabled = logs
    try:
        _reach(address)
        if not starts_a_cluster():
            _authenticate(address)
        context = ray.init(
            address,
            ignore_reinit_error=True,
            include_dashboard=dashboard,
            log_to_driver=logs,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({describe(error)}): correct it, or unset it for a cluster "
            "on this machine alone"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread() and at_sigterm is not None:
            signal.signal(signal.SIGTERM, at_sigterm)  # Ray replaces it; a run has its own handler
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def _reach(address: str) -> None:
    """Raise OSError or ValueError if nothing listens at the address; Ray itself would try for minutes."""
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname is not None and url.port is not None:
        socket.create_connection((url.hostname, url.port), timeout=REACH_TIMEOUT).close()


def _authenticate(address: str) -> None:
    """Authenticate with the home folder's token if the cluster requires one.

    `ray start` makes a cluster that requires a token as soon as that file exists, and an earlier local cluster creates it; Ray
    itself would connect without a token. If the cluster requires none, Ray 2.60 starts no actor for a client that has one.
    """
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    server = canonicalize_bootstrap_address(address)
    if server is None or "://" in server:
        return
    with grpc.insecure_channel(server) as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
            nodes.GetClusterId(request, timeout=REACH_TIMEOUT)
        except grpc.RpcError as error:
            is_refused = error.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
            if is_refused and not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
                raise ConnectionError("it requires a token: put it into ~/.ray/auth_token or RAY_AUTH_TOKEN") from error
