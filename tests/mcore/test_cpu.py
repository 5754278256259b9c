"""Laws of the CPU backend: it leaves no trace, stays off with a CUDA device, and keeps the user's flags."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import attention_mask_func
from torch.utils.checkpoint import checkpoint

from ramoe_megatron.mcore.cpu import backend as cpu
from ramoe_megatron.mcore.cpu.backend import CPU_FLAGS, CUDA_ONLY_FLAGS, cpu_backend, cpu_command_line

VARIABLES = ("TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS")


def replaced() -> list[tuple[Any, str]]:
    return [(owner, name) for owner, name, _ in [*cpu._torch_stand_ins(), *cpu._megatron_stand_ins()]] + [
        (torch, "compile")
    ]


def values() -> list[Any]:
    return [vars(owner).get(name) for owner, name in replaced()] + [
        os.environ.get(name) for name in VARIABLES
    ]


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cuda_absent", lambda: True)


@pytest.mark.usefixtures("no_cuda")
def test_every_replaced_attribute_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    before = values()
    with cpu_backend() as on:
        assert on
        inside = values()
        assert all(new is not old for new, old in zip(inside[: -len(VARIABLES)], before, strict=False))
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"  # the user's own stays
    assert all(new is old or new == old for new, old in zip(values(), before, strict=True))
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(KeyError), cpu_backend():
        raise KeyError
    assert all(new is old or new == old for new, old in zip(values(), before, strict=True))


def test_never_beside_a_cuda_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "cuda_absent", lambda: False)
    before = values()
    with cpu_backend() as on:
        assert on is False
        assert all(new is old or new == old for new, old in zip(values(), before, strict=True))
        assert torch.zeros(1).type() == "torch.FloatTensor"
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_cuda")
def test_inside_itself_it_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with cpu_backend():
        outer = torch.cuda.current_stream, torch.cuda.is_available, torch.utils.data.DataLoader.__init__
        with cpu_backend() as on:
            assert on
        # leaving the inner one leaves the outer one on
        assert outer == (
            torch.cuda.current_stream,
            torch.cuda.is_available,
            torch.utils.data.DataLoader.__init__,
        )
        assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.usefixtures("no_cuda")
def test_a_request_for_cuda_is_answered_with_the_cpu() -> None:
    with cpu_backend():
        x = torch.ones(2)
        for moved in (
            x.cuda(non_blocking=True),
            x.to("cuda:3"),
            x.to(device=torch.device("cuda", 0)),
            x.pin_memory(),
        ):
            assert moved.device.type == "cpu"
            assert torch.equal(moved, x)
        assert torch.empty(3, device=torch.cuda.current_device()).device.type == "cpu"
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(4)
        torch.cuda.set_rng_state(state)
        # the state is a real one: recomputation draws the same dropout
        assert torch.equal(torch.rand(4), first)


@pytest.mark.usefixtures("no_cuda")
def test_norms_under_sequence_parallelism_carry_its_mark() -> None:
    with cpu_backend():
        for on in (True, False):
            config = TransformerConfig(
                num_layers=1,
                hidden_size=8,
                num_attention_heads=2,
                normalization="RMSNorm",
                use_cpu_initialization=True,
            )
            config.sequence_parallel = on
            norm = WrappedTorchNorm(config, 8)
            assert [parameter.sequence_parallel for parameter in norm.parameters()] == [on]
            assert config.sequence_parallel is on


ordinary = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["--lr", "--seq-length", "--distributed-backend"]),
            st.sampled_from(["1", "2e-4", "nccl"]),
        ),
        st.tuples(st.sampled_from(["--bf16", "--swiglu", "--ramoe-coeff=1"])),
    ),
    max_size=6,
)
left_out = st.lists(st.tuples(st.sampled_from(sorted(CUDA_ONLY_FLAGS)), st.booleans()), max_size=4)


@given(ordinary, left_out, st.randoms())
def test_users_flags_stay_in_order_and_cuda_only_ones_go_with_their_values(
    kept: Any, dropped: Any, random: Any
) -> None:
    groups = [(True, list(words)) for words in kept]
    for flag, joined in dropped:
        count = CUDA_ONLY_FLAGS[flag]
        words = [f"{flag}=auto"] if count and joined else [flag, *["auto"] * count]
        groups.insert(random.randint(0, len(groups)), (False, words))
    arguments, told = cpu_command_line([word for _, words in groups for word in words])
    stays = [word for stay, words in groups if stay for word in words]
    assert arguments == [*stays, *CPU_FLAGS]  # last, since the last one given counts
    assert told == [words[0].split("=")[0] for stay, words in groups if not stay]


def test_megatrons_parser_reads_the_last_of_two() -> None:
    from ramoe_megatron.mcore.arguments import known_flags

    known = known_flags()
    flags = {word for word in [*CPU_FLAGS, *CUDA_ONLY_FLAGS] if word.startswith("--")}
    assert flags <= known, flags - known  # a flag that Megatron renamed would be dropped, or added, in vain


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    "reentrant", [True, False]
)  # True: as Megatron's own recompute, a backward pass in another
@pytest.mark.parametrize("way", ["method", "function", "grad"])
def test_what_a_backward_pass_recomputes_is_answered_with_the_cpu(way: str, reentrant: bool) -> None:
    """Megatron's causal mask, which it makes on the device "cuda", anew in each recomputed layer."""
    with cpu_backend():
        softmax = FusedScaleMaskSoftmax(
            False, False, AttnMaskType.causal, False, attention_mask_func, True, None
        )

        def attention(x: torch.Tensor) -> torch.Tensor:
            return softmax(2 * x, None).square().sum()  # a tensor of its own: the mask is written into it

        x = torch.arange(16.0).view(1, 1, 4, 4).sin().requires_grad_()
        expected = torch.autograd.grad(attention(x), x)[0]
        y = checkpoint(attention, x, use_reentrant=reentrant)
        if way == "grad":
            if reentrant:
                pytest.skip("torch has no autograd.grad of reentrant checkpoints")
            found = torch.autograd.grad(y, x)[0]
        else:
            y.backward() if way == "method" else torch.autograd.backward(y)
            found = x.grad
        assert expected.any()
        assert torch.equal(found, expected)
        assert torch.zeros(1, device="cuda").device.type == "cpu"  # as before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
