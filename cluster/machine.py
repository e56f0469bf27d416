"""What this process may use of its machine: its CPUs and memory, within its affinity and its control groups.

A container, a Slurm job or a systemd slice limits a process by control groups (Linux, `man 7 cgroups`): by its own and
by each above it, of version 1 or 2. What else counts the machine itself, as `os.cpu_count` and psutil do. Knows nothing
of Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def num_cpus(root: Path = ROOT) -> int:
    """Return how many CPUs this process may keep busy, at least 1. root: of the file system, for tests."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, math.floor(min([cpus, *_least("cpu", _cpu_quota, root)])))


def num_gpus(root: Path = ROOT) -> int:
    """Return how many NVIDIA GPUs the driver shows on this machine or in this container, at least 1."""
    with suppress(OSError):  # another kind of GPU, or of system
        return max(1, len(list((root / "proc/driver/nvidia/gpus").iterdir())))
    return 1


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process can have without swapping or being killed."""
    import psutil  # a plan wants CPUs only

    return int(max(0, min([psutil.virtual_memory().available, *_least("memory", _memory_left, root)])))


def _least(controller: str, read: Callable[[Path], float | None], root: Path) -> Iterator[float]:
    """Yield what each control group of this process allows."""
    for group in _groups(controller, root):
        with suppress(OSError, ValueError, IndexError):  # it has no such file: it sets no limit
            if (amount := read(group)) is not None:
                yield amount


def _cpu_quota(group: Path) -> float | None:
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _memory_limit(group: Path) -> float | None:
    name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
    limit = (group / name).read_text().strip()
    return None if limit == "max" else int(limit)


def _memory_left(group: Path) -> float | None:
    """Bytes to a group's limit; pages of files, which the kernel gives up first, count as free."""
    limit = _memory_limit(group)
    if limit is None:
        return None
    second = (group / "memory.max").exists()
    used = int((group / ("memory.current" if second else "memory.usage_in_bytes")).read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return limit - used + int(statistics["inactive_file" if second else "total_inactive_file"])


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups that may limit it, from its own up to the mounted one."""
    with suppress(OSError):  # not Linux
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and controller not in controllers.split(","):
                continue
            for mount in mounts:
                if _mounts(mount, controller if number != "0" else None):
                    yield from _upwards(path, mount[3], root / mount[4].lstrip("/"))


def _mounts(mount: list[str], controller: str | None) -> bool:
    """Whether a line of mountinfo is of the hierarchy of a controller of version 1, or, without one, of version 2."""
    kind, _, options = mount[mount.index("-") + 1 :][:3]
    return kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(",")


def _upwards(path: str, mounted: str, at: Path) -> Iterator[Path]:
    """Yield the folder of the group at `path` and those above. mounted: the group whose folder is `at`."""
    own = PurePosixPath(path)
    below = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()  # another namespace's path
    for part in (below, *below.parents):
        yield at / part
