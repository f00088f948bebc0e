"""Stored adversarial codes, images and teacher outputs: written once, read by every run after. docs/store.md has the format."""

from dad_fast.store.layout import Block, hash_keys
from dad_fast.store.manifest import Manifest
from dad_fast.store.outputs import OutputsForm
from dad_fast.store.reader import AdversarialStore, Store, TargetStore, open_store
from dad_fast.store.writer import Records, ShardWriter, StoreWriter

__all__ = [
    "AdversarialStore",
    "Block",
    "Manifest",
    "OutputsForm",
    "Records",
    "ShardWriter",
    "Store",
    "StoreWriter",
    "TargetStore",
    "hash_keys",
    "open_store",
]
