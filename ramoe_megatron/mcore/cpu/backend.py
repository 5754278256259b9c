"""Megatron's real training loop on a machine without a CUDA device.

`cpu_backend()` answers Megatron-Core's questions to CUDA for a CPU: the current device, the streams and
events, the random state. Megatron's arithmetic, schedules, optimizer and checkpoints are not replaced. Each
stand-in below has a comment with its reason. The backend is used only on a machine without a CUDA device, and
prints one line.

It is for laptops, tests and dry runs of a cluster's flags. Streams do not run in parallel, so overlap flags
have no effect, and memory figures are zero.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ramoe_megatron.mcore.cpu.attention import attention_stand_ins
from ramoe_megatron.mcore.cpu.collectives import all_gather_of_unequal, reduce_scatter_of_unequal
from ramoe_megatron.mcore.cpu.devices import InertEvent, InertStream, inert_device_properties
from ramoe_megatron.mcore.cpu.distributed_optimizer import optimizer_stand_ins
from ramoe_megatron.mcore.cpu.sequential_experts import expert_stand_ins

CPU_FLAGS = [
    *("--transformer-impl", "local"),
    *("--distributed-backend", "gloo"),
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--use-cpu-initialization",
]
"""Flags added to a CPU run, which has no transformer-engine, NCCL, fused kernels or CUDA generators."""

CUDA_ONLY_FLAGS = {
    "--moe-grouped-gemm": 0,  # grouped GEMM is a CUDA kernel; experts then run one after another
    "--tp-comm-overlap": 0,
    "--moe-permute-fusion": 0,
    "--moe-router-fusion": 0,
    "--cross-entropy-loss-fusion": 0,
    "--use-flash-attn": 0,
    "--attention-backend": 1,
    "--cross-entropy-fusion-impl": 1,
}
"""Flags that a CPU run leaves out, with their number of values. So a cluster's command line runs on a
laptop."""


def cpu_command_line(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Change a Megatron command line so that the CPU backend can run it.

    Returns:
        the arguments with `CPU_FLAGS` appended (the last value of a flag counts), and the removed flags.
    """
    kept, left_out, position = [], [], 0
    while position < len(arguments):
        flag = arguments[position].split("=")[0]
        if flag in CUDA_ONLY_FLAGS:
            left_out.append(flag)
            position += 1 + (CUDA_ONLY_FLAGS[flag] if "=" not in arguments[position] else 0)
        else:
            kept.append(arguments[position])
            position += 1
    return kept + CPU_FLAGS, left_out


def cuda_absent() -> bool:
    """Whether this machine has no CUDA device. Asks the driver, because the stand-ins do not replace it."""
    return torch._C._cuda_getDeviceCount() == 0 if hasattr(torch._C, "_cuda_getDeviceCount") else True


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Import Megatron in the body. Without a CUDA device, `torch.compile` then does not change its functions.

    The CPU backend compiles nothing, but the decorator imports torch's compiler, which takes as long as the
    rest of Megatron.
    """
    with contextlib.ExitStack() as stack:
        if cuda_absent():
            _replace(stack, torch, "compile", _not_compiled)
        yield


def _not_compiled(function: Any = None, **_: Any) -> Any:
    return _not_compiled if function is None else function


class _CudaMeansCpu(TorchFunctionMode):
    """Every request for a CUDA tensor is answered with a CPU tensor."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("cuda", "pin_memory", "record_stream") and args and isinstance(args[0], torch.Tensor):
            return args[0]  # no second device, no page-locked memory, no streams
        if name == "type" and len(args) == 1 and not kwargs:
            # the optimizer and gradient clipping compare this string
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "to" and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


@contextlib.contextmanager
def cpu_backend() -> Iterator[bool]:
    """Run the body with Megatron on the CPU if there is no CUDA device; otherwise change nothing.

    Yields:
        True when the CPU backend is on.
    """
    if not cuda_absent():
        yield False
        return
    if torch.cuda.is_available is _cuda_is_available:  # already on
        yield True
        return
    if os.environ.get("RANK", "0") == "0":
        print("ramoe: no CUDA device: Megatron runs on the CPU backend (gloo, local layers)", flush=True)
    with contextlib.ExitStack() as stack:
        # Compiling for a CPU takes longer than a small run. torch reads this when a function is decorated, so
        # it is set before Megatron is imported.
        _set_variable(stack, "TORCHDYNAMO_DISABLE", "1")
        # Megatron requires this variable with TP or CP; without CUDA it has no effect.
        _set_variable(
            stack, "CUDA_DEVICE_MAX_CONNECTIONS", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        )
        # For functions that were decorated before. Optimizers import torch._dynamo too, which must see torch
        # without the stand-ins.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(uncompiled())
        for owner, name, stand_in in [*_torch_stand_ins(), *_megatron_stand_ins()]:
            _replace(stack, owner, name, stand_in)
        stack.enter_context(_CudaMeansCpu())
        yield True


def _cuda_is_available() -> bool:
    return True


def _set_variable(stack: contextlib.ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)
    stack.callback(os.environ.pop, name, None) if before is None else stack.callback(
        os.environ.__setitem__, name, before
    )
    os.environ[name] = value


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, stand_in: Any) -> None:
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, stand_in)


def _torch_stand_ins() -> list[tuple[Any, str, Any]]:
    cuda, cpu = torch.cuda, torch.device("cpu")
    init_process_group = torch.distributed.init_process_group
    loader_init = torch.utils.data.DataLoader.__init__
    run_backward = torch.autograd._engine_run_backward

    def backward_under_the_mode(*args: Any, **kwargs: Any) -> Any:
        with _CudaMeansCpu():
            return run_backward(*args, **kwargs)

    def gloo_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)  # gloo binds to no device
        return init_process_group("gloo", *args, **kwargs)

    def unpinned_loader(self: Any, *args: Any, **kwargs: Any) -> None:
        loader_init(self, *args, **{**kwargs, "pin_memory": False})

    zero = lambda *_, **__: 0  # noqa: E731 - memory figures: there is no device memory
    nothing = lambda *_, **__: None  # noqa: E731
    unpinned_loader.__wrapped__ = loader_init  # type: ignore[attr-defined]
    return [
        # Megatron asserts that there is a CUDA device and asks for the current device.
        (cuda, "is_available", _cuda_is_available),
        (cuda, "is_initialized", lambda: True),
        (cuda, "device_count", lambda: max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))),
        (cuda, "current_device", lambda: cpu),
        (cuda, "set_device", nothing),
        (cuda, "get_device_properties", inert_device_properties),
        (cuda, "get_device_capability", lambda *_: (0, 0)),
        (cuda, "get_device_name", lambda *_: "cpu"),
        # The device runs everything in order: streams, events and synchronisation do nothing.
        (cuda, "Stream", InertStream),
        (cuda, "Event", InertEvent),
        (cuda, "current_stream", lambda *_, **__: InertStream()),
        (cuda, "default_stream", lambda *_, **__: InertStream()),
        (cuda, "stream", lambda *_: contextlib.nullcontext()),
        (cuda, "set_stream", nothing),
        (cuda, "synchronize", nothing),
        (cuda, "empty_cache", nothing),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "memory_stats", lambda *_, **__: {"num_alloc_retries": 0, "allocation.all.current": 0}),
        *((cuda, name, zero) for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")),
        *((cuda, name, zero) for name in ("max_memory_reserved", "utilization", "temperature")),
        (cuda, "reset_peak_memory_stats", nothing),
        (cuda, "mem_get_info", lambda *_: (0, 0)),
        *((cuda.nvtx, name, nothing) for name in ("range_push", "range_pop", "mark")),
        (cuda.nvtx, "range", lambda *_, **__: contextlib.nullcontext()),
        # Dropout and recompute need a real random state: the CPU's generator is "the CUDA generator".
        *((owner, "get_rng_state", lambda *_, **__: torch.get_rng_state()) for owner in (cuda, cuda.random)),
        *(
            (owner, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
            for owner in (cuda, cuda.random)
        ),
        *(
            (owner, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed))
            for owner in (cuda, cuda.random)
        ),
        # torch.manual_seed calls it too
        *((owner, "manual_seed_all", nothing) for owner in (cuda, cuda.random)),
        # autograd's Function and checkpointing would otherwise look for an accelerator that matches
        # is_available().
        (torch.accelerator, "is_available", lambda: False),
        # Torch turns a mode off while its handler runs, and a backward pass runs in the handler. Code that is
        # recomputed there may request CUDA tensors, such as Megatron's causal mask.
        (torch.autograd, "_engine_run_backward", backward_under_the_mode),
        (torch.nn.Module, "cuda", lambda self, *_: self),
        (torch.utils.data.DataLoader, "__init__", unpinned_loader),
        (torch.distributed, "init_process_group", gloo_process_group),
        # gloo gathers and scatters only pieces of equal size.
        (torch.distributed, "all_gather", all_gather_of_unequal(torch.distributed.all_gather)),
        (torch.distributed, "reduce_scatter", reduce_scatter_of_unequal(torch.distributed.reduce_scatter)),
    ]


def _megatron_stand_ins() -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import token_dispatcher

    torch_norm_new = torch_norm.WrappedTorchNorm.__new__
    to_host = token_dispatcher.maybe_move_tensor_to_cpu

    def norm_with_sequence_parallel(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Build torch's norm and mark its weights, so that Megatron sums their gradients over tensor-parallel
        ranks.

        Megatron rejects torch's norms under sequence parallelism only because they lack this mark.
        """
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = torch_norm_new(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    def to_host_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The all-to-all dispatcher converts only tensors that are on a GPU.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else to_host(tensor, False, False)

    return [
        (tp_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (tp_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        (tp_random, "_lazy_call", lambda call: call()),
        (torch_norm.WrappedTorchNorm, "__new__", norm_with_sequence_parallel),
        (token_dispatcher, "maybe_move_tensor_to_cpu", to_host_as_numpy),
        *optimizer_stand_ins(),  # the distributed optimizer can resume with torch's Adam
        # context parallelism and packed samples, for which Megatron uses transformer-engine
        *attention_stand_ins(),
        *expert_stand_ins(),  # decoding: the calls of many small experts take longer than their arithmetic
    ]
