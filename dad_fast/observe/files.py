"""The same names as `dad_fast.files`."""

from dad_fast.files import atomic_write_bytes, atomic_write_json, atomic_write_text, plain, sync

__all__ = ["atomic_write_bytes", "atomic_write_json", "atomic_write_text", "plain", "sync"]
