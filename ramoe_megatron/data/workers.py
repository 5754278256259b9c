"""What the C library does for a rank: forked processes that end with it, freed memory that it gives back."""

import ctypes
import os
import signal


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even when the parent is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def give_back_memory() -> None:
    """Return freed memory to the system. By itself glibc keeps what lies below any memory in use."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
