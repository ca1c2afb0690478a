"""Processes of this machine: which one this is, its cores, whether another has ended, and not outliving a parent; imports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def use_utf8() -> None:
    """Begin this process again in Python's UTF-8 mode, where a locale gives file names another encoding."""
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large libraries, which leave no garbage: to look for it among all that they make takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def this_process() -> dict[str, Any]:
    """What identifies this process among those of all machines and containers, now and later."""
    return {
        "host": platform.node(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": str(Path("/proc/self/ns/pid").readlink()),
        "pid": os.getpid(),
        "started": _state(os.getpid())[1],
    }


def has_ended(process: Mapping[str, Any]) -> bool:
    """Whether a process, as :func:`this_process` described it, is known to have ended.

    False for one of another machine, and for one that /proc hides.
    """
    here = this_process()
    if any(process.get(key) != here[key] for key in ("machine", "namespace")):
        return False
    try:
        state, started = _state(process["pid"])
    except (OSError, IndexError):
        return not _is_hidden(process["pid"])
    return started != process["started"] or state in "ZX"


def _is_hidden(pid: int) -> bool:
    """Whether a process exists that /proc does not show: with its option hidepid it shows no other user's."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def start_time() -> float:
    """When this process started, in seconds since the epoch."""
    seconds = int(_state(os.getpid())[1]) / os.sysconf("SC_CLK_TCK")  # since boot
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + seconds


def cores(groups: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use, by its affinity and by the quotas of its control groups; at least one.

    Args:
        groups: where control groups are mounted.
        of: says in which of them this process is.
    """
    found = [_quota(group) for group in _groups("cpu", groups, of)]
    return max(1, int(min(len(os.sched_getaffinity(0)), *found, float("inf"))))


def memory(groups: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this machine has, or of those its control groups let this process and its like use together."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _groups("memory", groups, of):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # there is one of them, or none; or "max"
                found.append(int((group / name).read_text()))
    return min(found)


def _groups(controller: str, groups: Path, of: Path) -> Iterator[Path]:
    """The control groups of this process that have a controller, and those around them."""
    with contextlib.suppress(OSError):
        for line in of.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = groups / controllers if controllers else groups
                group = root / name.strip("/")
                yield from (group, *(parent for parent in group.parents if parent.is_relative_to(root)))


def _quota(group: Path) -> float:
    """Cores that a control group may use, of version 2 or 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # a group has the files of one version, or, at the top, none
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return int(quota) / int(period) if quota not in ("max", "-1") else float("inf")
    return float("inf")


def _state(pid: int) -> tuple[str, str]:
    """State letter and start time, in clock ticks since boot, of a process of this machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], fields[19]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process ``parent``, ends; exit now if it has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
