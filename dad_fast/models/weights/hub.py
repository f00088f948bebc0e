"""Requests to the Hugging Face hub: quiet, and at once from the cache or refused where it is not
reachable.
"""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from dad_fast.models.weights.limits import without_downloads


@contextmanager
def hub_client() -> Iterator[None]:
    """Silence libraries that ask the hub, and keep them from retrying while it is not reachable.

    Unreachable, the hub's client reads its cache and raises at once for anything else.
    """
    with quiet(), nullcontext() if is_reachable() else without_downloads():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence log lines and warnings of libraries; they repeat the exception, or are intended."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def reason_of(error: Exception) -> str:
    """Return a short reason why a download failed, in one line."""
    # Libraries wrap the client's error in their own, with its text in the middle.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "the hub cannot be reached, and its cache lacks the file"
        cause = cause.__cause__ or cause.__context__
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


def is_reachable() -> bool:
    """Return whether the hub answers, or the user has turned it off."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:
        # The client's errors are those of its HTTP library, which changes with its version.
        return False
    return True
