"""Memory that messages of blocks leave behind stays with the process, instead of going to the kernel and back."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc

KEPT_BYTES = 128 * 1024 * 1024
MAPPED_BYTES = 32 * 1024 * 1024
"""Allocations from here on have pages of their own, which go when they are freed: glibc's own upper limit."""


def keep_freed_memory() -> None:
    """Let the C heap keep up to `KEPT_BYTES` that are free; without effect where the C library has no such setting.

    gRPC allocates and frees each message of a megabyte or two. As glibc starts, the kernel takes such memory back at
    once and clears it page by page when it is wanted again: two thirds of the CPU time of a node that serves blocks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
