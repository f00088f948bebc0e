"""Stores of adversarial codes, images and teacher outputs, written once and read by later runs.

docs/store.md has the format.
"""

from dad_fast.store.layout import RowBlock, hash_keys
from dad_fast.store.manifest import Manifest
from dad_fast.store.outputs import OutputsForm
from dad_fast.store.reader import AdversarialStore, Store, TargetStore, open_store
from dad_fast.store.writer import ShardWriter, StoreRows, StoreWriter

__all__ = [
    "AdversarialStore",
    "Manifest",
    "OutputsForm",
    "RowBlock",
    "ShardWriter",
    "Store",
    "StoreRows",
    "StoreWriter",
    "TargetStore",
    "hash_keys",
    "open_store",
]
