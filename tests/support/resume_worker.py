"""Runs a table of offline jobs on one set of ranks, some of which are killed with SIGKILL on their way.

    tests/support/resume_worker.py TABLE.json OUT, on each rank

Each row: {"name", "job", "argv"}, run in a fork of its rank as in `worker.py`, with shards of `SHARD`
examples. More keys: "kill": [ranks, saves, seconds]: these ranks kill themselves that long after they begin
to save so many shards (0: a pass); "slow": seconds that each forward pass takes longer; "truncate": a
pattern, under OUT, of files that are cut in half before; "hold": a lock file, under OUT, that another process
holds meanwhile. OUT/NAME.RANK.log has a line RUN for each forward pass, and SAVE NUMBER for each shard that
is about to be saved; the last line is END, or ERROR with the message.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from worker import meet_apart

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.fork_server import IMPORTED

SHARD = 3
RANK = int(os.environ.get("RANK", "0"))


def main() -> None:
    table, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from ramoe_megatron.mcore.compat import import_early
    from ramoe_megatron.mcore.cpu.backend import cpu_backend

    with cpu_backend():
        jobs = ("scores", "profile", "taxonomy", "evaluate", "steer")
        import_early((*IMPORTED, *(f"ramoe_megatron.jobs.{name}" for name in jobs)))
        for row in table:
            with prepared(row, out) if RANK == 0 else contextlib.nullcontext():
                run_in_fork(row, out)


@contextlib.contextmanager
def prepared(row: dict[str, Any], out: Path) -> Iterator[None]:
    for path in out.glob(row["truncate"]) if "truncate" in row else ():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if "hold" not in row:
        yield
        return
    (out / row["hold"]).parent.mkdir(parents=True)
    with filelock.FileLock(out / row["hold"]):
        yield


def run_in_fork(row: dict[str, Any], out: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            meet_apart(row["name"])
            with (out / f"{row['name']}.{RANK}.log").open("w", buffering=1) as log:
                sys.stdout = log
                run(row)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)


def run(row: dict[str, Any]) -> None:
    from ramoe_megatron.jobs import profile, scores, shards
    from ramoe_megatron.mcore.offline.model import OfflineModel

    for module in (shards, profile, scores):
        module.SHARD_EXAMPLES = SHARD
    ranks, saves, seconds = row.get("kill", ([], 0, 0.0))
    told: Counter[str] = Counter()

    def tell(text: str) -> None:
        print(text)
        what = text.split()[0]
        told[what] += 1
        if RANK in ranks and (what, told[what]) == (("SAVE", saves) if saves else ("RUN", 1)):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    run_group, save = OfflineModel.run, shards.Shards.save

    def counted_run(*args: Any, **kwargs: Any) -> None:
        tell("RUN")
        time.sleep(row.get("slow", 0))
        run_group(*args, **kwargs)

    def counted_save(self: Any, number: int, *args: Any) -> None:
        tell(f"SAVE {number}")
        save(self, number, *args)

    OfflineModel.run, shards.Shards.save = counted_run, counted_save
    sys.argv = [row["job"], *row["argv"]]
    try:
        importlib.import_module(f"ramoe_megatron.jobs.{row['job']}").main()
        print("END")
    except RamoeError as error:
        print(f"ERROR {error}")


if __name__ == "__main__":
    main()
