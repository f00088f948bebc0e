"""Entries of published checkpoints: strip wrappers, drop leftovers of training."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

# Prefixes of every key that DataParallel, torch.compile and trainers add.
WRAPPERS = ("module.", "_orig_mod.", "model.")

# Entries that belong to training or are computed when a model is built, with their names in the log
LEFTOVERS = {
    # taming's discriminator and LPIPS, or a trainer's criterion with its class weights
    r"(loss|loss_fn|criterion)\..*": "loss.*",
    # Averaged copy of latent-diffusion's trainers, under names of its own
    r"model_ema\..*": "model_ema.*",
    # Statistics of vector quantizers
    r"quantize\.(.*\.)?(cluster_size|embed_avg|ema_cluster_size|ema_w|ema_embed|codebook_used|used)": (
        "quantizer statistics"
    ),
    r"AuxLogits\..*": "AuxLogits.*",
    r"(.*\.)?(relative_position_index|attn_mask|position_ids|num_batches_tracked)": "buffers",
    # Settings that open_clip and OpenAI once stored as tensors
    r"input_resolution|context_length|vocab_size": "settings",
    # Counters of thop
    r"(.*\.)?(total_ops|total_params)": "counters",
}


def unwrap(
    state: Mapping[str, Tensor], path: str | Path, own: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the entries of a model: no wrappers' prefixes, no leftovers of training.

    own: the model's keys, where they are known; these are never dropped or stripped. Logs once what
    it did.
    """
    own = set(own)
    kept: dict[str, Tensor] = {}
    dropped: dict[str, int] = {}
    for key, tensor in state.items():
        bare = _bare(key)
        leftover = "" if key in own or bare in own else _leftover(bare)
        if leftover:
            dropped[leftover] = dropped.get(leftover, 0) + 1
        else:
            kept[key] = tensor

    stripped = ""
    while prefix := _shared_prefix(kept):
        if own and all(key.startswith(prefix) for key in own):
            break
        kept = {key.removeprefix(prefix): tensor for key, tensor in kept.items()}
        stripped += prefix
    done = [f"stripped the prefix {stripped}"] if stripped else []
    if dropped:
        named = ", ".join(f"{name} ({count})" for name, count in dropped.items())
        done.append(f"left out what belongs to training: {named}")
    if done:
        log.warning("%s: %s", path, "; ".join(done))
    return kept


def _shared_prefix(keys: Collection[str]) -> str:
    """Return the wrapper that all keys have; empty if there is none."""
    for prefix in WRAPPERS:
        if keys and all(key.startswith(prefix) for key in keys):
            return prefix
    return ""


def _bare(key: str) -> str:
    """Return a key without the wrappers' prefixes, in any order."""
    start = re.match("|".join(f"({re.escape(prefix)})" for prefix in WRAPPERS), key)
    return _bare(key[start.end() :]) if start else key


def _leftover(key: str) -> str:
    """Return the name in the log of a leftover; empty for an entry of a model."""
    for pattern, name in LEFTOVERS.items():
        if re.fullmatch(pattern, key):
            return name
    return ""
