"""The cores and the memory of this process, and environment variables for child processes."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cores(proc: Path = Path("/proc/self")) -> int:
    """Cores that this process may use, by its affinity and by the CPU quotas of its container.

    A quota of 1.5 CPUs counts as 2 cores, as in Java and Go: one thread would leave a third of it
    unused. `proc` is the folder of the process in Linux's /proc.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = (_read_quota(folder) for folder in _cgroup_folders(proc, "cpu"))
    return math.ceil(min([cores, *quotas]))


def total_memory(proc: Path = Path("/proc/self")) -> float:
    """The bytes of memory that this process may use at most: the machine's, or its container's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (_read_memory_limit(folder) for folder in _cgroup_folders(proc, "memory"))
    return min([machine, *limits])


def _cgroup_folders(proc: Path, resource: str) -> Iterator[Path]:
    """The mounted control groups of the process: its own, and the groups that contain it.

    The limit of each of them applies. Of cgroup v1, only the hierarchy of a resource's controller.
    """
    try:
        groups = [line.split(":", 2)[1:] for line in (proc / "cgroup").read_text().splitlines()]
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    for mount in mounts:  # proc_pid_mountinfo(5)
        first, _, last = mount.partition(" - ")
        root, mount_point = (PurePosixPath(field) for field in first.split()[3:5])
        kind, _, options = last.split(" ")[:3]  # the second one may be empty
        if kind != "cgroup2" and (kind != "cgroup" or resource not in options.split(",")):
            continue
        controller = "" if kind == "cgroup2" else resource
        for controllers, path in groups:
            if controller in controllers.split(","):
                group = PurePosixPath(path)
                is_mounted = group.is_relative_to(root) and ".." not in group.parts
                inner = group.relative_to(root) if is_mounted else PurePosixPath()
                yield from (Path(mount_point / part) for part in (inner, *inner.parents))


def _read_quota(cgroup: Path) -> float:
    """The quota of a control group in CPUs; infinite without one."""
    try:
        if (cgroup / "cpu.max").exists():  # v2
            quota, period_us = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu.cfs_quota_us").read_text()
            period_us = (cgroup / "cpu.cfs_period_us").read_text()
        cpus = int(quota) / int(period_us)
    except (OSError, ValueError):  # the root group has no file; the quota may be "max"
        return math.inf
    return cpus if cpus > 0 else math.inf  # in v1, -1 is none


def _read_memory_limit(cgroup: Path) -> float:
    """The memory limit of a control group in bytes; infinite without one."""
    for name in ("memory.max", "memory.limit_in_bytes"):  # v2, v1
        with contextlib.suppress(OSError, ValueError):  # as for quotas
            return int((cgroup / name).read_text())
    return math.inf


@contextlib.contextmanager
def extend_environment(**values: str) -> Iterator[None]:
    """Set environment variables in this block, also for the processes that it starts."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
