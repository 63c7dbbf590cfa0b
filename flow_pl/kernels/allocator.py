"""Configure glibc's allocator for frequent allocation of large tensors."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""

LARGEST = 1 << 30
"""Size in bytes up to which freed memory is kept for the next tensor."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system at once.

    By default it maps every large tensor anew, and each page is then zeroed and faulted in again; a step of many
    clients allocates and frees such tensors all the time. Settings in the environment (MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_, or another allocator in LD_PRELOAD) take precedence.

    Returns:
        Whether the setting took effect; False if glibc is not the allocator.
    """
    known = {"LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if not sys.platform.startswith("linux") or known & os.environ.keys():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
