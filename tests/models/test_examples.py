"""The files of examples/models/ have the flags that `ramoe convert` writes for the published models."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers

from ramoe_megatron.models.families import FAMILIES
from ramoe_megatron.recipe.megatron_flags import render

EXAMPLES = Path(__file__).parents[2] / "examples/models"
# What the published config.json says where it differs from the class's default.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("Qwen3Moe", {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    }),
    "olmoe-1b-7b": ("Olmoe", {
        "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    }),
    "phi-3.5-moe": ("Phimoe", {
        "vocab_size": 32064, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 6400, "num_local_experts": 16,
        "num_experts_per_tok": 2, "max_position_embeddings": 131072, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "attention_bias": True, "lm_head_bias": True, "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": False, "sliding_window": 131072,
    }),
    "gpt-oss-20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32}),
}  # fmt: skip
CHOSEN = {"tokenizer-type", "tokenizer-model", "moe-aux-loss-coeff"}
"""Flags that the files choose themselves, with a comment."""


def flags_of(words: list[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = ()
        else:
            found[name] = (*found[name], word)
    return {name: values for name, values in found.items() if name not in CHOSEN}


def as_numbers(values: tuple[str, ...]) -> tuple[object, ...]:
    def number(text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return text

    return tuple(map(number, values))


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_example_has_the_flags_of_the_conversion(name: str) -> None:
    kind, values = PUBLISHED[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    family = next(found for found in FAMILIES if found.architecture == f"{kind}ForCausalLM")
    expected = flags_of(render(family.flags(config)))
    said = subprocess.run(
        ["bash", "-c", f'GPUS=8 source {EXAMPLES / name}.sh && printf "%s\\n" "${{MODEL_ARGS[@]}}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = flags_of(said.stdout.splitlines())
    assert found.keys() == expected.keys()
    for flag, values_ in expected.items():
        assert as_numbers(found[flag]) == as_numbers(values_), flag
