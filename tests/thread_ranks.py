"""Several ranks in one process: each is a thread, and the group that torch has for its own tests joins them."""

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed import multi_threaded_pg

SECONDS = 10
"""After which a rank that has not ended waits for one that has left."""


def on_ranks(function: Callable[[int], Any], num_ranks: int = 2) -> list[Any]:
    """Call a function with the rank on every rank and return what each returned; raise what one raised."""
    found = outcomes(function, num_ranks)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def outcomes(function: Callable[[int], Any], num_ranks: int = 2) -> list[Any]:
    """Call a function with the rank on every rank; return what each returned, or the exception that it raised.

    Raises:
        AssertionError: If a rank waits for another that does not come.
    """
    store = dist.HashStore()
    found: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=num_ranks, store=store)
        try:
            found[rank] = function(rank)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (handed on to the test)
            found[rank] = error
        dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in range(num_ranks)]
    _set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        waiting = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if waiting:
            multi_threaded_pg.ProcessLocalGroup.exception_handle(None)  # ends them
            for thread in threads:
                thread.join(SECONDS)
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
    assert not waiting, f"ranks {waiting} still waited after {SECONDS} seconds; what came back: {found}"
    return found
