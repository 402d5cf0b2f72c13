"""Whether the C library keeps or returns the memory of freed tensors."""

import ctypes
import os
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, in malloc.h
MAX_KEPT_BYTES = 2**30  # freed memory that the process keeps


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for later ones, instead of returning it.

    By default glibc returns large blocks to the kernel, which clears each page before its next
    use: a step of batch 33 took 1.4 times as long (two cores of Zen 5, 2026-11-29).
    """
    mallopt = _find_libc_function("mallopt")
    if mallopt and mallopt(M_MMAP_THRESHOLD, MAX_KEPT_BYTES):  # or it maps blocks one by one
        mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES)


def return_freed_memory() -> None:
    """Let glibc return freed memory now: between runs, whose batches differ in size."""
    if trim := _find_libc_function("malloc_trim"):
        trim(0)


def _find_libc_function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where the library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
