"""examples/models: each file's flags in Megatron's parser and validation, layouts, sizes, memory table."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.model_memory import (
    BEGIN,
    END,
    GPUS,
    flags_of,
    model_files,
    parameters,
    table,
    table_in,
    validated,
)
from ramoe_megatron.mcore import compat
from ramoe_megatron.mcore.align.refusals import refuse_unsupported
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig, add_arguments
from ramoe_megatron.mcore.cpu.backend import cpu_backend

FILES = {path.stem: path for path in model_files()}
PUBLISHED = {"qwen3-30b-a3b": 30.5e9, "phi-3.5-moe": 41.9e9, "gpt-oss-20b": 20.9e9, "olmoe-1b-7b": 6.9e9}
FINETUNE = (
    "--train-iters 10 --global-batch-size 64 --lr 1e-5 --eval-interval 100 --eval-iters 0 --ramoe-data "
    "parallel.jsonl --ramoe-coeff 1 --ramoe-experts experts.safetensors --ramoe-taxonomy taxonomy.jsonl"
).split()
SHELLCHECK = shutil.which(
    "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)

every_file = pytest.mark.parametrize("name", FILES)
every_layout = pytest.mark.parametrize(("name", "gpus"), [(name, gpus) for name in FILES for gpus in GPUS])


@functools.cache  # nobody changes them, and Megatron's parser is slow to build
def parsed(name: str, gpus: int) -> Any:
    return validated([*flags_of(FILES[name], gpus), *FINETUNE], gpus, add_arguments)


@contextlib.contextmanager
def kernels_assumed() -> Iterator[None]:
    """Megatron's model configuration needs transformer-engine once: to import the fused rotary embedding."""
    from megatron.core.models.common.embeddings import rope_utils

    with mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", "never called"):
        yield


def source(name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    script = 'set -u; source "$1" || exit 7; echo "went on"'
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        ["bash", "-c", script, "bash", str(FILES[name])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_is_a_file_for_each_published_model() -> None:
    assert set(FILES) == set(PUBLISHED)


@every_layout
def test_megatron_accepts_the_flags_and_the_layout_fills_the_gpus(name: str, gpus: int) -> None:
    args = parsed(name, gpus)
    tensor, pipeline, context = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    expert_ranks = args.expert_model_parallel_size * args.expert_tensor_parallel_size * pipeline
    assert args.data_parallel_size * tensor * pipeline * context == gpus
    assert gpus % expert_ranks == 0
    assert args.num_experts % args.expert_model_parallel_size == 0
    assert args.num_layers % pipeline == 0
    assert args.padded_vocab_size % tensor == 0
    assert (args.seq_length, args.micro_batch_size, args.bf16) == (4096, 1, True)
    assert args.use_distributed_optimizer
    assert args.moe_grouped_gemm
    assert args.moe_token_dispatcher_type == "alltoall"
    assert RoutingAlignmentConfig.from_args(args).coeff == 1


@every_layout
def test_megatron_builds_the_configuration_and_alignment_runs_under_it(name: str, gpus: int) -> None:
    args = parsed(name, gpus)
    with kernels_assumed():
        config = compat.model_config_from_args(args)
    assert config.vocab_size == args.padded_vocab_size
    assert not config.should_pad_vocab
    refuse_unsupported(config.transformer)


@every_file
def test_the_size_is_the_published_one(name: str) -> None:
    assert parameters(parsed(name, 8)) == pytest.approx(PUBLISHED[name], rel=0.02)


@every_file
def test_the_flags_are_transformers_configuration(name: str) -> None:
    """The values that both name. transformers' defaults are the published values, unless given here."""
    from transformers import GptOssConfig, OlmoeConfig, PhimoeConfig, Qwen3MoeConfig

    published = {
        "qwen3-30b-a3b": Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, norm_topk_prob=True),
        "phi-3.5-moe": PhimoeConfig(head_dim=128, router_aux_loss_coef=0.0),
        "gpt-oss-20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32, router_aux_loss_coef=0.0),
        "olmoe-1b-7b": OlmoeConfig(intermediate_size=1024, head_dim=128),
    }[name]
    args = parsed(name, 8)
    assert (args.padded_vocab_size, args.hidden_size, args.num_layers) == (
        published.vocab_size,
        published.hidden_size,
        published.num_hidden_layers,
    )
    assert (args.num_attention_heads, args.kv_channels) == (published.num_attention_heads, published.head_dim)
    assert (
        args.num_query_groups if args.group_query_attention else args.num_attention_heads
    ) == published.num_key_value_heads
    assert args.moe_ffn_hidden_size == getattr(
        published, "moe_intermediate_size", published.intermediate_size
    )
    assert (args.num_experts, args.moe_router_topk) == (
        published.num_local_experts,
        published.num_experts_per_tok,
    )
    assert args.layernorm_epsilon == published.rms_norm_eps
    assert args.untie_embeddings_and_output_weights is not published.tie_word_embeddings
    assert args.moe_aux_loss_coeff == published.router_aux_loss_coef
    # softmax over all experts without renormalising the chosen ones: OLMoE alone
    assert args.moe_router_pre_softmax is (getattr(published, "norm_topk_prob", True) is False)
    assert (args.attention_dropout, args.hidden_dropout) == (0, 0)


def test_gpt_oss_keeps_its_window_activation_and_positions() -> None:
    import torch
    from transformers import GptOssConfig
    from transformers.masking_utils import sliding_window_overlay

    args, published = parsed("gpt-oss-20b", 8), GptOssConfig(num_hidden_layers=24)
    with kernels_assumed():
        config = compat.model_config_from_args(args).transformer
    left, right = config.window_size
    sees = [sliding_window_overlay(published.sliding_window)(0, 0, 500, key) for key in range(501)]
    assert [key for key in range(501) if sees[key]] == list(range(500 - left, 501 + right))
    layers = [
        "sliding_attention" if layer % config.window_attn_skip_freq else "full_attention"
        for layer in range(1, 25)
    ]
    assert layers == published.layer_types
    assert config.softmax_type == "learnable"
    gate, up = torch.linspace(-20, 20, 41), torch.linspace(9, -9, 41)
    clamp = config.activation_func_clamp_value
    ours = config.activation_func(gate.clamp(max=clamp)) * (
        up.clamp(-clamp, clamp) + config.glu_linear_offset
    )
    limit = published.swiglu_limit
    clamped = gate.clamp(max=limit)
    theirs = (up.clamp(-limit, limit) + 1) * clamped * torch.sigmoid(clamped * published.swiglu_alpha)
    torch.testing.assert_close(ours, theirs)
    assert config.gated_linear_unit
    assert config.add_bias_linear


def test_gpt_oss_has_the_published_rotary_frequencies() -> None:
    import torch
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    args = parsed("gpt-oss-20b", 8)
    with kernels_assumed():
        config = compat.model_config_from_args(args).transformer
    with cpu_backend():
        from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

        rotary = YarnRotaryEmbedding(
            kv_channels=args.kv_channels,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            scaling_factor=config.yarn_rotary_scaling_factor,
            original_max_position_embeddings=config.yarn_original_max_position_embeddings,
            beta_fast=config.yarn_beta_fast,
            beta_slow=config.yarn_beta_slow,
            mscale=config.yarn_mscale,
            mscale_all_dim=config.yarn_mscale_all_dim,
            correction_range_round_to_int=config.yarn_correction_range_round_to_int,
        )
        angles, scale = rotary.get_emb(3)
    published = GptOssConfig()
    frequencies, published_scale = ROPE_INIT_FUNCTIONS["yarn"](published, device=torch.device("cpu"))
    torch.testing.assert_close(angles[1, 0, 0, :32].float().cpu(), frequencies, rtol=1e-5, atol=0)
    assert scale == pytest.approx(published_scale)
    assert not args.apply_rope_fusion


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "olmoe-1b-7b"])
def test_the_experts_are_weighted_as_in_transformers(name: str) -> None:
    """Except Phi-3.5-MoE, whose header says that Megatron has no SparseMixer."""
    import torch
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    args = parsed(name, 8)
    size: Any = {"hidden_size": args.num_experts, "num_experts_per_tok": args.moe_router_topk}
    router = {
        "qwen3-30b-a3b": lambda: Qwen3MoeTopKRouter(
            Qwen3MoeConfig(num_local_experts=args.num_experts, norm_topk_prob=True, **size)
        ),
        "gpt-oss-20b": lambda: GptOssTopKRouter(GptOssConfig(num_local_experts=args.num_experts, **size)),
        "olmoe-1b-7b": lambda: OlmoeTopKRouter(OlmoeConfig(num_experts=args.num_experts, **size)),
    }[name]()
    logits = torch.randn(50, args.num_experts, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        router.weight.copy_(torch.eye(args.num_experts))
        if name == "gpt-oss-20b":
            router.bias.zero_()
        _, weights, experts = router(logits)
    ours, chosen = topk_routing_with_score_function(
        logits,
        args.moe_router_topk,
        use_pre_softmax=args.moe_router_pre_softmax,
        score_function=args.moe_router_score_function,
    )
    torch.testing.assert_close(ours, torch.zeros_like(logits).scatter(1, experts, weights))
    assert (chosen.sum(1) == args.moe_router_topk).all()


@every_file
def test_seq_length_and_tokenizer_come_from_the_environment(name: str) -> None:
    flags = flags_of(FILES[name], 16, SEQ_LENGTH="2048", TOKENIZER="/a folder/tokenizer")
    args = validated([*flags, *FINETUNE], 16, add_arguments)
    assert (args.seq_length, args.tokenizer_type, args.tokenizer_model) == (
        2048,
        "HuggingFaceTokenizer",
        "/a folder/tokenizer",
    )


@every_file
@pytest.mark.parametrize("variables", [{}, {"GPUS": "32"}, {"GPUS": "eight"}, {"GPUS": ""}])
def test_another_number_of_gpus_is_refused(name: str, variables: dict[str, str]) -> None:
    done = source(name, **variables)
    assert done.returncode == 7
    assert done.stdout == ""
    assert "expected 8, 16 or 64" in done.stderr
    assert f"GPUS='{variables.get('GPUS', '')}'" in done.stderr


@every_file
def test_nothing_but_the_two_arrays_is_left_behind(name: str) -> None:
    script = f'before=$(compgen -v); source "{FILES[name]}"; '
    script += 'comm -13 <(echo "$before" | sort) <(compgen -v | sort)'
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"], "GPUS": "8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) - {"before", "PIPESTATUS"} == {"MODEL_ARGS", "PARALLEL_ARGS"}


@every_file
def test_the_memory_table_is_what_the_command_prints(name: str) -> None:
    path = FILES[name]
    assert path.read_text().count(BEGIN) == path.read_text().count(END) == 1
    assert table_in(path) == table(path), "python -m benchmarks.model_memory --write"


@every_file
def test_our_estimate_leaves_room_on_80_gb(name: str) -> None:
    totals = [float(line.split()[-1]) for line in table_in(FILES[name]).splitlines()[2:]]
    assert len(totals) == len(GPUS)
    assert max(totals) < 70


@every_file
def test_bash_and_shellcheck_have_nothing_to_say(name: str) -> None:
    subprocess.run(["bash", "-n", str(FILES[name])], check=True)
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed (the dev extra has it)")
    done = subprocess.run([SHELLCHECK, str(FILES[name])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_readme_names_every_file() -> None:
    readme = (Path(__file__).parents[2] / "examples/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(models/([\w.-]+)\.sh\)", readme)) == set(FILES)
