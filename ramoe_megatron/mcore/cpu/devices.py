"""Inert CUDA streams, events and device properties, for a device that runs everything in order."""

import types
from typing import Any, Self


class InertStream:
    """A CUDA stream whose work is already done."""

    cuda_stream = 0
    device = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or InertEvent()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None: ...


class InertEvent:
    """A CUDA event that has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def inert_device_properties(*_: Any) -> types.SimpleNamespace:
    """Properties of no GPU: compute capability 0.0, so that no kernel selects itself by it."""
    return types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1)
