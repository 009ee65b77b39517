"""The store that torchrun keeps for a job: what its processes know of one another before and beside a World.

It outlives the processes: after a failure torchrun ends all of them and starts them again, and what the earlier ones
have left in the store is still there.  Without torchrun there is none.
"""

import hashlib
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

SECONDS_BETWEEN_LOOKS = 0.02


def open_store(environment: Mapping[str, str]):
    """A torch.distributed.Store, or None where torchrun keeps none."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("WORLD_SIZE", "1") == "1":
        return None
    from torch.distributed import PrefixStore, TCPStore

    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return PrefixStore("tiny_diffusion", TCPStore(host, port, is_master=False, timeout=timedelta(minutes=1)))


def meet(store, rank: int, size: int) -> str:
    """A name that the processes of this attempt share, and none of an earlier one.

    torch itself reads what an earlier attempt has left, the addresses of processes that have gone, and fails.
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
            if store.check([f"hello/{other}"]):  # perhaps an earlier one's, which nobody waits to see answered
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return own


def first_to_report(message: str, because_of_another: bool, environment: Mapping[str, str]) -> bool:
    """Whether no process of this attempt has said this yet; True where there is no store to tell.

    because_of_another: it only follows from what has ended another process, which has perhaps said why.
    """
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT")
    try:
        if (store := open_store(environment)) is None:
            return True
        already = store.add(f"failures/{attempt}", 1) > 1
        if because_of_another:
            return not already
        return store.add(f"said/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the store has gone, and its processes with it
        return True


def mark_begun(environment: Mapping[str, str]) -> None:
    """The run of this job has begun to write its folder."""
    if (store := open_store(environment)) is not None:
        store.set("begun", "")


def has_begun(environment: Mapping[str, str]) -> bool:
    """Whether an earlier attempt of this job has begun its run; without a store, whether there was an attempt."""
    try:
        if (store := open_store(environment)) is not None:
            return store.check(["begun"])
    except (KeyError, ValueError, RuntimeError):
        return False
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
