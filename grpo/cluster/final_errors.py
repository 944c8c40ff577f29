"""Which errors of a worker end a run; any other one makes Ray restart all workers.

    is_final(error, has_begun=True)
"""

from __future__ import annotations

import errno

from ..checkpoint.remote import StorageError
from ..common.errors import BaseWeightsModifiedError, explain, is_transient
from ..run.worker_reports import DivergedError

UNAVAILABLE = (errno.EIO, errno.ESTALE, errno.EADDRINUSE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)
"""Errors of a network, or of a network file system, that is temporarily unavailable."""


def is_final(error: Exception, *, has_begun: bool) -> bool:
    """Whether a restart would not fix it: a mistake of the user, or workers that hold different policies.

    Disks and storages that could be reached when the run began are taken to be temporarily unavailable. Base weights are loaded
    again by a restart.
    """
    is_unavailable = has_begun and (isinstance(error, StorageError) or getattr(error, "errno", None) in UNAVAILABLE)
    is_mended_by_restart = is_unavailable or is_transient(error) or isinstance(error, BaseWeightsModifiedError)
    return isinstance(error, DivergedError) or (explain(error) is not None and not is_mended_by_restart)
