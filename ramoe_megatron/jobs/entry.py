"""The entry point of every job: parse the arguments, read the inputs, do the work. --check skips the work.

This module is cheap to import on purpose: at a rank's first checkpoint Megatron starts a process that imports
the job's module again.
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
"""Megatron's parser requires a micro-batch size. The other flags load only the weights of a checkpoint."""

DATA_FIX, CHECKPOINT_FIX = "correct the data or the flag", "correct the path, or run the job that writes it"
FILE_FIX = (
    "run the job that writes it (ramoe taxonomy, ramoe profile) on this model and data, or correct the path"
)


@dataclass(frozen=True)
class Job:
    """A job that runs Megatron."""

    options: Callable[[], tuple[type, ...]]
    """Returns the option classes whose flags the job accepts."""
    read: Callable[[Start, Any], Callable[[], None]]
    """Reads and checks every input of the job except the weights, in steps of the `Start`. Takes the `Start`
    and the validated arguments. Returns the function that does the work."""
    trains: bool = False

    @property
    def flags(self) -> Sequence[str]:
        """Flags that the job appends to the user's flags."""
        return () if self.trains else FORWARD_ONLY_FLAGS

    def main(self) -> None:
        """Run the job, or check it under --check.

        Raises:
            RamoeError: Megatron is too old for the jobs, or a flag or an input is wrong.
        """
        from ramoe_megatron.mcore.compat import refuse_other_megatron

        refuse_other_megatron()
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
        """Check the job's command line without starting or writing anything. Returns all findings.

        Args:
            words: the command line.
            on_cpu: whether the CPU backend is on.
            coming, kept: arguments of `Start`.
        """
        from ramoe_megatron.mcore.arguments import job_arguments
        from ramoe_megatron.mcore.launch import command_line, take_arguments

        start, options = Start(True, coming, kept), self.options()
        with command_line([*words, *self.flags], on_cpu) as left_out, contextlib.suppress(Absent):
            args = take_arguments(start, job_arguments(*options), left_out, self.trains, options)
            self.read(start, args)
        return start.findings

    def _check_alone(self) -> None:
        """Print the findings on rank 0. Raises RamoeError with all fatal findings."""
        from ramoe_megatron.artifacts.files import refuse_unwritable
        from ramoe_megatron.mcore.cpu.backend import cpu_backend
        from ramoe_megatron.mcore.launch import is_rank_0

        refuse_unwritable(sys.argv[1:], "command line")
        # Megatron prints all its arguments
        with cpu_backend() as on_cpu, contextlib.redirect_stdout(io.StringIO()):
            findings = self.check(sys.argv[1:], on_cpu)
        if is_rank_0():
            width = max(len(finding.check) for finding in findings)
            for finding in findings:
                found = finding.found.replace("\n", "; ")
                print(f"ramoe: {finding.state:<7}  {finding.check:<{width}}  {found}", flush=True)
        fatal = [f"{f.check}: {f.found} ({f.advice})" for f in findings if f.state == "fatal"]
        if fatal:
            raise RamoeError("\n  ".join(fatal))
