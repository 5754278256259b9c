"""Alternating measurements, their ratio with an interval, peak memory, and the machine."""

import gc
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
WARM_UP = 3
RESAMPLES = 4000


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process that imports the benchmarks and the package from this tree."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **changes}


def torchrun(module: str, ranks: int, *arguments: str) -> list[str]:
    """The command that runs a module of the benchmarks on ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*command, "-m", f"benchmarks.{module}", *arguments]


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float]) -> "Ratio":
        """The ratio of measurements from the same rounds. The interval resamples rounds (percentile
        bootstrap)."""
        pairs = np.array([numerator, denominator], dtype=np.float64)
        places = np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
        medians = np.median(pairs[:, places], axis=-1)
        low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
        return cls(float(np.median(pairs[0]) / np.median(pairs[1])), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Seconds(NamedTuple):
    """The time of an action."""

    wall: float
    """Depends on what else runs on the machine."""
    cpu: float
    """CPU time of this process, all threads together."""


def alternate[T](
    arms: Mapping[str, Callable[[], T]],
    rounds: int,
    warm_up: int = WARM_UP,
    after_round: Callable[[int], object] = lambda count: None,
) -> dict[str, list[T]]:
    """What every arm returns in every round after warm-up, such as its seconds.

    The order within a round rotates, so that no arm always follows the same one. `after_round` is called with
    1 after each round, also during warm-up.
    """
    found: dict[str, list[T]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = arms[name]()
            if number >= warm_up:
                found[name].append(taken)
        after_round(1)
    return found


def timed(action: Callable[[], Any]) -> Seconds:
    """Seconds of an action, from when all ranks are ready until this device is done."""
    torch.distributed.barrier()
    torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def peak_memory(action: Callable[[], Any], on_cpu: bool) -> int:
    """Peak bytes of the device, or of the CPU's tensors, during an action, beyond those held before it."""
    if on_cpu:
        return _cpu_peak(action)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def operations(action: Callable[[], Any], on_cpu: bool) -> int:
    """Kernels that an action starts on the device; on the CPU the operations that would start a kernel.

    Those are the operations that compute or copy and call no other such operation. Views and allocations
    start no kernel. The number is the same on any machine and does not depend on its load.
    """
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU if on_cpu else activities.CUDA]) as profile:
        action()
        if not on_cpu:
            torch.cuda.synchronize()
    if not on_cpu:
        on_device = [
            event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)
    assert profile.profiler is not None
    return innermost(
        [
            (event.start_thread_id(), event.start_ns(), event.end_ns())
            for event in profile.profiler.kineto_results.events()
            if event.name().startswith("aten::") and event.name().removeprefix("aten::") not in NO_KERNEL
        ]
    )


NO_KERNEL = frozenset(
    "_has_compatible_shallow_copy_type _reshape_alias _to_copy _unsafe_view alias as_strided chunk detach "
    "detach_ empty empty_like empty_strided expand expand_as flatten is_pinned lift_fresh narrow new_empty "
    "new_empty_strided permute promote_types reshape resize_ resolve_conj resolve_neg result_type select "
    "set_ slice split split_with_sizes squeeze t to transpose unbind unfold unsqueeze view view_as".split()
)
"""Names of torch's operations that look at a tensor in another way, allocate it, or only call others."""


def innermost(spans: Sequence[tuple[int, int, int]]) -> int:
    """Number of spans (thread, start, end) that hold no other of their thread."""
    found, starts = 0, sorted(spans, key=lambda span: (span[0], span[1], -span[2]))
    for span, following in itertools.pairwise([*starts, (-1, 0, 0)]):
        found += following[0] != span[0] or following[1] >= span[2]
    return found


def _cpu_peak(action: Callable[[], Any]) -> int:
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = np.cumsum([0, *(event.nbytes() for event in events)])
    return int(held.max())


def machine(on_cpu: bool) -> dict[str, Any]:
    """Hardware and versions, on which the figures depend."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": None if on_cpu else torch.cuda.get_device_name(),
        "ranks": torch.distributed.get_world_size(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "megatron-core", "transformer-engine")},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
