"""torchrun's key-value store: how the ranks exchange messages without a World.

It outlives the ranks: after a failure torchrun restarts them all, and the store still holds what the earlier ones
wrote.  Without torchrun there is no store.
"""

import hashlib
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

POLL_SECONDS = 0.02


def open_store(environment: Mapping[str, str]):
    """A torch.distributed.Store, or None without torchrun."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("WORLD_SIZE", "1") == "1":
        return None
    from torch.distributed import PrefixStore, TCPStore

    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return PrefixStore("tiny_diffusion", TCPStore(host, port, is_master=False, timeout=timedelta(minutes=1)))


def attempt_name(store, rank: int, size: int) -> str:
    """A name that the ranks of this attempt share with one another, and with none of an earlier attempt.

    As a prefix it hides the keys of earlier attempts: torch would read the addresses of dead ranks, and fail.
    """
    own = uuid.uuid4().hex
    store.set(f"hello/{rank}", own)
    if rank:
        name = store.get(f"welcome/{own}").decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    others = range(1, size)
    while not all(store.check([f"here/{own}/{other}"]) for other in others):
        for other in others:
            if store.check([f"hello/{other}"]):  # if it is of an earlier attempt, nobody reads the answer
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(POLL_SECONDS)
    return own


def first_to_report(message: str, because_of_another: bool, environment: Mapping[str, str]) -> bool:
    """Whether no rank of this attempt has reported this message yet; True without a store.

    because_of_another: the error is a consequence of another rank's error, which may have been reported already.
    """
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT")
    try:
        if (store := open_store(environment)) is None:
            return True
        already = store.add(f"failures/{attempt}", 1) > 1
        if because_of_another:
            return not already
        return store.add(f"said/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the store is gone, and the other ranks with it
        return True


def mark_begun(environment: Mapping[str, str]) -> None:
    """Records that the run has begun to write its folder."""
    if (store := open_store(environment)) is not None:
        store.set("begun", "")


def has_begun(environment: Mapping[str, str]) -> bool:
    """Whether an earlier attempt has begun its run; without a store, whether there was an earlier attempt."""
    try:
        if (store := open_store(environment)) is not None:
            return store.check(["begun"])
    except (KeyError, ValueError, RuntimeError):
        return False
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
