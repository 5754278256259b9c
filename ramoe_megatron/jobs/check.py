"""Check the command lines of jobs. Nothing is started and nothing is written.

    python -m ramoe_megatron.jobs.check < LINES.json

LINES.json is a list of `Line` objects. The result is one line on stdout: "RAMOE-CHECK " and a JSON object
{"flags": [all known flags], "findings": {NAME: [`Finding`, ...]}}. One process checks all lines, because the
import of Megatron takes seconds and each check only tenths of a second.
"""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from typing import Any

from ramoe_megatron.mcore import compat, trial
from ramoe_megatron.mcore.arguments import known_flags
from ramoe_megatron.mcore.cpu.backend import cpu_backend
from ramoe_megatron.mcore.findings import ANSWER, Finding, Line
from ramoe_megatron.mcore.launch import run_job


def main() -> None:
    """Check the command lines on stdin."""
    compat.refuse_other_megatron()
    lines = [Line(**entry) for entry in json.load(sys.stdin)]
    with cpu_backend() as on_cpu:
        compat.remember_docstrings()
        kept: dict[str, Any] = {}
        found = {line.name: [asdict(f) for f in check(line, on_cpu, kept)] for line in lines}
        flags = sorted(known_flags())
    print(f"\n{ANSWER}{json.dumps({'flags': flags, 'findings': found})}", flush=True)


def check(line: Line, on_cpu: bool, kept: dict[str, Any]) -> list[Finding]:
    """All findings about a command line. `on_cpu`: the CPU backend is on; `kept`: the argument of `Start`."""
    job = import_module(f"ramoe_megatron.jobs.{line.job}").JOB
    with trial.standing_for_rank_0(line.ranks, line.nodes):
        return job.check(line.flags, on_cpu, line.coming, kept)


if __name__ == "__main__":
    run_job(main)
