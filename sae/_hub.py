"""The Hugging Face hub: whether it answers, and data sets from it.

A download from a hub that is out of reach retries for half a minute before it gives up, so the hub is asked once
first; where it does not answer, only what is on this disk already is looked for. The hub's libraries are slow to
import, and files need none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

TIMEOUT_S = 5


def hub_reachable() -> bool:
    """Whether the hub answers at all; False where the environment says to work offline."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # no name service, no route, no proxy, a time-out: whatever it is, only the cache is left
        return False
    return True


def hub_data_set(name: str, *configuration: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`, from the cache on this disk alone where the hub does not answer."""
    from datasets import load_dataset  # slow to import, and not needed for files

    with _offline(not hub_reachable()):
        return load_dataset(name, *configuration, **options)


_flipping = Lock()


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Both libraries work offline inside, if `offline`: they read these two variables at every request, and have no
    argument for it. One thread at a time, so that what stood there before comes back; nothing is touched online.
    """
    if not offline:
        yield
        return
    import datasets
    from huggingface_hub import constants

    with _flipping:
        before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
