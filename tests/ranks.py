"""`sfc` as several processes, as torchrun starts them, but without imports: forks that share a store of values."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

from torch.distributed import TCPStore

from sae._run.processes import Processes
from sae.training.trainer import Trainer
from tests.forked import ForkedCommands, Result
from tests.workers import fork


def sfc_in_ranks(forked: ForkedCommands, n: int, *words: object, kill_after: int = 0) -> Result:
    """Run `sfc` with these words in n processes; the status is that of the first of them that fails.

    Args:
        kill_after: kill the second process after this many training steps, or once it has taken so many batches of a
            discovery.
    """
    task = json.dumps([n, [str(word) for word in words], kill_after])
    return forked.call(run_ranks, environment={"RANKS": task})


def run_ranks() -> None:
    """The processes of the task in the environment; ends with their status."""
    n, words, kill_after = json.loads(os.environ["RANKS"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = {fork_rank(rank, n, store.port, words, kill_after * (rank == 1)): rank for rank in range(n)}
    statuses = []
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        statuses.append(os.waitstatus_to_exitcode(status))
    sys.exit(next((status for status in statuses if status), 0))


def fork_rank(rank: int, n: int, port: int, words: list[str], kill_after: int) -> int:
    pid = fork()
    if pid:
        return pid
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    status: object = 1
    try:
        if kill_after:
            _die_after(Trainer, "_one_step", kill_after)
            _die_after(Processes, "_next", kill_after)
        from circuits.cli.main import main

        main(words)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status or 0))


def _die_after(owner: type, name: str, times: int) -> None:
    """Kill this process when a method has been called so many times."""
    method, calls = getattr(owner, name), []

    def counted(*arguments: object) -> object:
        result = method(*arguments)
        calls.append(name)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)
