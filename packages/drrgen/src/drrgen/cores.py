"""How many processors there are for us, which is not always how many the machine has."""

import os


def usable() -> int:
    """Those that this process may run on: fewer than the machine's where a scheduler, or `taskset`, says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
