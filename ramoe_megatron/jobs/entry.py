"""How every job starts: the arguments, what the job reads, and then the work; with --check, all of it but the
work.

Light to import: each rank's first checkpoint starts a process of Megatron's that imports the job's module
again.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.findings import Finding
from ramoe_megatron.mcore.start import Absent, Start

FORWARD_ONLY_FLAGS = ("--micro-batch-size", "1", "--no-load-optim", "--no-load-rng", "--finetune")
"""Megatron's parser asks for a micro-batch size; a checkpoint is loaded for its weights alone."""

DATA_FIX, CHECKPOINT_FIX = "correct the data or the flag", "correct the path, or run the job that writes it"
FILE_FIX = (
    "run the job that writes it (ramoe taxonomy, ramoe profile) on this model and data, or correct the path"
)


@dataclass(frozen=True)
class Job:
    """A job that runs Megatron."""

    options: Callable[[], tuple[type, ...]]
    """Gives the option classes whose flags the job takes."""
    read: Callable[[Start, Any], Callable[[], None]]
    """Reads and checks, in steps of the start, all that the job needs beside the weights, from the validated
    arguments; returns the work."""
    trains: bool = False

    @property
    def flags(self) -> Sequence[str]:
        """Flags that the job itself sets, after the user's."""
        return () if self.trains else FORWARD_ONLY_FLAGS

    def main(self) -> None:
        """Run the job on the command line's arguments, or check it. Raises RamoeError for what stops it."""
        from ramoe_megatron.mcore.arguments import CHECK, job_arguments
        from ramoe_megatron.mcore.launch import megatron_arguments

        if CHECK in sys.argv[1:]:
            self._check_alone()
            return
        start, options = Start(), self.options()
        with megatron_arguments(job_arguments(*options), self.flags, self.trains, options, start) as args:
            self.read(start, args)()

    def check(
        self,
        words: Sequence[str],
        on_cpu: bool,
        coming: Mapping[str, str] | None = None,
        kept: dict[str, Any] | None = None,
    ) -> list[Finding]:
        """What would stop the job with this command line, and what is in order. Nothing is started, nothing
        is written.

        Args:
            on_cpu: whether the CPU backend is on.
            coming, kept: as `Start` takes them.
        """
        from ramoe_megatron.mcore.arguments import job_arguments
        from ramoe_megatron.mcore.launch import command_line, take_arguments

        start, options = Start(True, coming, kept), self.options()
        with command_line([*words, *self.flags], on_cpu) as left_out, contextlib.suppress(Absent):
            args = take_arguments(start, job_arguments(*options), left_out, self.trains, options)
            self.read(start, args)
        return start.findings

    def _check_alone(self) -> None:
        """Print the findings about the command line on rank 0. Raises RamoeError that lists the fatal ones."""
        from ramoe_megatron.artifacts.files import refuse_unwritable
        from ramoe_megatron.mcore.cpu.backend import cpu_backend
        from ramoe_megatron.mcore.launch import is_rank_0

        refuse_unwritable(sys.argv[1:], "command line")
        with (
            cpu_backend() as on_cpu,
            contextlib.redirect_stdout(io.StringIO()),
        ):  # Megatron prints all its arguments
            findings = self.check(sys.argv[1:], on_cpu)
        if is_rank_0():
            width = max(len(finding.check) for finding in findings)
            for finding in findings:
                found = finding.found.replace("\n", "; ")
                print(f"ramoe: {finding.state:<7}  {finding.check:<{width}}  {found}", flush=True)
        fatal = [f"{f.check}: {f.found} ({f.advice})" for f in findings if f.state == "fatal"]
        if fatal:
            raise RamoeError("\n  ".join(fatal))
