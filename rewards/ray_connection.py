"""This process's connection to a Ray cluster, for whatever in it needs one.

    if CONNECTION.hold():                   # connects, unless somebody else has done that, who will also end it
        ...
        CONNECTION.release()                # the last one to hold it ends it

It goes to the cluster of Ray's own `RAY_ADDRESS`, or to one that it starts on this machine alone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from urllib.parse import urlsplit

REACH_SECONDS = 10.0
"""What a machine gets to accept a connection."""


class Connection:
    """See the module's docstring. Ray knows one connection a process, so there is one of these, `CONNECTION`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holders = 0
        self.dashboard_url: str | None = None
        """Of the cluster that `hold` has connected to, where it has one."""

    def hold(self, *, dashboard: bool = False, logs: bool = True) -> bool:
        """Connect unless that is done; False where somebody else has done it.

        Args:
            dashboard: whether a cluster that is started here serves Ray's dashboard.
            logs: whether what Ray's workers print, and what Ray has to say of them, is printed here too.

        Raises:
            ConnectionError: no cluster answers where `RAY_ADDRESS` says.
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
        """End the connection if nobody else holds it."""
        import ray

        with self._lock:
            self._num_holders -= 1
            if self._num_holders == 0:
                ray.shutdown()


CONNECTION = Connection()


def starts_a_cluster() -> bool:
    """Whether a connection that is made now starts a cluster on this machine."""
    return not os.environ.get("RAY_ADDRESS")


def _connect(*, dashboard: bool, logs: bool) -> str | None:
    import ray
    from ray._private import worker

    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray left to itself would join any cluster that this machine is in.
    address = "local" if starts_a_cluster() else os.environ["RAY_ADDRESS"]
    at_sigterm = signal.getsignal(signal.SIGTERM)
    # The only switch there is for what Ray prints in this process about nodes and workers that it has lost, pages of it.
    worker._worker_logs_enabled = logs
    try:
        _reach(address)
        if not starts_a_cluster():
            _take_token(address)
        context = ray.init(
            address,
            ignore_reinit_error=True,
            include_dashboard=dashboard,
            log_to_driver=logs,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): correct it, or unset it for a "
            "cluster on this machine alone"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread() and at_sigterm is not None:
            signal.signal(signal.SIGTERM, at_sigterm)  # Ray takes it; a run has its own answer
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def _reach(address: str) -> None:
    """Raise OSError or ValueError where nothing listens at the address; Ray itself would try for minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is not None and place.port is not None:
        socket.create_connection((place.hostname, place.port), timeout=REACH_SECONDS).close()


def _take_token(address: str) -> None:
    """Come with the token of the home folder where the cluster asks for one.

    `ray start` makes clusters that do as soon as there is such a token, and a cluster that was started here has left one; Ray
    itself would come without. Where none is asked for, Ray 2.60 starts no actor for who comes with one.
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
            nodes.GetClusterId(request, timeout=REACH_SECONDS)
        except grpc.RpcError as error:
            is_refused = error.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
            if is_refused and not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
                raise ConnectionError("it asks for a token: put it into ~/.ray/auth_token or RAY_AUTH_TOKEN") from error
