"""For tests of handlers of your own: checks that every handler should pass, a small run, and what happened in it."""

from .checks import CHECKS, CheckFailedError, check_callback, parametrize_checks
from .events import Recorded, record_events
from .host_reads import HostReads, count_host_reads
from .toy import toy_data, toy_engine, toy_run

__all__ = [
    "check_callback",
    "parametrize_checks",
    "CHECKS",
    "CheckFailedError",
    "toy_run",
    "toy_engine",
    "toy_data",
    "record_events",
    "Recorded",
    "count_host_reads",
    "HostReads",
]
