"""Test of a JPEG's structure: DALI decodes only files for which it and PIL give the same result.

Both decode with libjpeg-turbo, but the library only warns of damage inside the scan, and PIL, which
feeds it in pieces, stops at some damage that DALI reads over: a marker in the middle of a baseline
scan. So PIL decodes such files and all unusual ones. Damaged codes that are still valid codes
remain; neither decoder detects those, and both return the same wrong pixels. In trials with
thousands of damaged files no case was left where PIL refuses a file and DALI does not. The opposite
exists (a bad table that is never used) and costs only speed, since PIL makes a batch on which DALI
fails.
"""

from __future__ import annotations

import struct

import numpy as np

_BASELINE, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)
_HUFFMAN, _QUANTIZATION, _RESTART, _SCAN, _COMMENT = 0xC4, 0xDB, 0xDD, 0xDA, 0xFE
_SKIPPED = (*range(0xE0, 0xF0), _COMMENT, _HUFFMAN, _QUANTIZATION)


def is_sound(data: bytes, width: int, height: int) -> bool:
    """Return whether `data` is a whole JPEG of 8 bits, one or three components and this size.

    A baseline scan must hold no markers.
    """
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return False
    frame = 0
    restarts = False
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return False
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = position + 4
        if marker in (*_BASELINE, *_PROGRESSIVE):
            frame = marker
            if data[body : body + 5] != struct.pack(">BHH", 8, height, width):
                return False
            if data[body + 5] not in (1, 3):
                return False
        elif marker == _RESTART:
            restarts = True
        elif marker == _SCAN:
            if frame in _PROGRESSIVE:
                return True
            return frame in _BASELINE and _scan_is_plain(data, position + 2 + length, restarts)
        elif marker not in _SKIPPED:
            return False
        position += 2 + length
    return False


def _scan_is_plain(data: bytes, start: int, restarts: bool) -> bool:
    """Return whether each 0xFF before the closing marker precedes a zero or a restart marker."""
    codes = np.frombuffer(data, np.uint8, offset=start)
    # The last 0xFF belongs to the closing marker.
    after = codes[1:][codes[:-1] == 0xFF][:-1]
    plain = after == 0
    if restarts:
        plain |= after >> 3 == 0xD0 >> 3
    return bool(plain.all())
