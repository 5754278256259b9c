"""Reads the output of a job: how far the job is, and why it failed."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

ERROR_PREFIX = "ramoe: error: "
_ITERATION = re.compile(r" iteration\s+(\d+)/\s*(\d+) \|(.*)")
_LOSS = re.compile(r"(lm loss|routing_alignment_loss): ([-+.\dEe]+)")
_RANK = re.compile(r"^\[rank\d+\]: ?")
# The last line of an exception, with the rank that torch may put before it; argparse's error about a flag;
# the ranks that did not respond; or the signal that ended a rank.
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt|Exit)\b.*|\S+: error: .*"
    r"|ramoe: (?:\w+: a collective|rank \d+ was ended by ).*)"
)
# torchrun's summary of the rank that ended first, if a signal killed it.
_KILLED = re.compile(r"Root Cause.*?rank\s*: (\d+) .*?Signal \d+ \((SIG\w+)\) received", re.DOTALL)
# The start of torchrun's own summary after a rank has failed.
_SUMMARY = re.compile(r"torch/distributed/elastic/.*(failed \(exitcode|closing signal)|ChildFailedError")


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int
    total: int
    unit: str
    note: str = ""


def parse_progress(line: str) -> Progress | None:
    """Progress in a line of output: RAMOE-PROGRESS of our jobs, or Megatron's iteration line."""
    if (start := line.find("RAMOE-PROGRESS ")) >= 0:
        try:
            told = json.loads(line[start + len("RAMOE-PROGRESS ") :])
            return Progress(
                int(told["done"]), int(told["total"]), str(told["unit"]), str(told.get("note") or "")
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # another rank's output is mixed into the line
    if match := _ITERATION.search(line):
        losses = [f"{name.replace('_', ' ')} {float(value):.4g}" for name, value in _LOSS.findall(match[3])]
        return Progress(int(match[1]), int(match[2]), "iterations", ", ".join(losses))
    return None


def relevant_lines(lines: Sequence[str], *others: Sequence[str]) -> tuple[list[str], bool]:
    """The lines that say why a job failed, and whether the user can correct the reason (a RamoeError).

    The lines are the text of the first RamoeError with its indented lines, or else the exceptions that ranks
    raised, or else the last lines without torchrun's own summary. `others` is the output on other nodes: it
    is read when `lines` holds no reason, because node 0 is ended once another node has failed.
    """
    reasons = [_reason(each) for each in (lines, *others)]
    told, mendable, _ = next((reason for reason in reasons if reason[2]), reasons[0])
    return told, mendable


def _reason(lines: Sequence[str]) -> tuple[list[str], bool, bool]:
    """The lines, whether the user can correct the reason, and whether the lines hold one."""
    for place, line in enumerate(lines):
        if (start := line.find(ERROR_PREFIX)) >= 0:
            text = [line[start + len(ERROR_PREFIX) :]]
            for more in lines[place + 1 :]:
                if not more.startswith("  "):
                    break
                text.append(more)
            return text, True, True
    summary = next((place for place, line in enumerate(lines) if _SUMMARY.search(line)), len(lines))
    plain = [line for line in lines[:summary] if line.strip() and parse_progress(line) is None]
    raised = [
        _with_source(match[1], plain[:place])
        for place, line in enumerate(plain)
        if (match := _EXCEPTION.match(line))
    ]
    raised += [
        f"rank {rank} was ended by {name}" for rank, name in _KILLED.findall("\n".join(lines[summary:]))
    ]
    return (list(dict.fromkeys(raised))[-3:] or plain[-12:]), False, bool(raised)


def _with_source(raised: str, before: Sequence[str]) -> str:
    """The last line of an exception. If it has no text, the line of code that raised it is added."""
    return raised if ":" in raised or not before else f"{raised} at: {_RANK.sub('', before[-1]).strip()}"
