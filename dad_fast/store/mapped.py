"""Read-only maps of files that hold no file descriptor.

Python's own mmap, and so numpy's memmap, keeps one for each map (unless told otherwise, from 3.13 on): a store of a thousand files would
meet the usual limit of 1,024 open files, in every loader process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np


def map_file(path: Path) -> np.ndarray:
    """uint8 [bytes] of a file, read-only. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        if size == 0:  # which cannot be mapped
            return np.empty(0, np.uint8)
        libc = _libc()
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        if address == ctypes.c_void_p(-1).value:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(path))
    finally:
        os.close(handle)
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, libc.munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(buffer), np.uint8)
    array.flags.writeable = False
    return array


@lru_cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
