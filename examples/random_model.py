"""Make a small random Mixture-of-Experts model as a Hugging Face folder, with a tokenizer for given text.

    python examples/random_model.py --out runs/random-hf --text ../shared/data/mgsm/*.tsv

The model is a Qwen3-MoE of four layers with eight experts, about a million parameters. It knows nothing: it
shows that a recipe goes from data to report, and its answers are chance.
"""

import argparse
import os
import shutil
from pathlib import Path

from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.models.convert import refuse_taken

END, PAD = "<|end|>", "<|pad|>"


def main() -> None:
    """Write the folder: configuration, weights and tokenizer."""
    parser = argparse.ArgumentParser(prog="random_model.py")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must be new")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files to train the tokenizer on")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer")
    parser.add_argument("--positions", type=int, default=1024, help="longest sequence in tokens")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights")
    options = parser.parse_args()
    refuse_taken(options.out)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(list(map(str, options.text)), trainer)
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=options.positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(options.seed)
    model = Qwen3MoeForCausalLM(config)
    unfinished = options.out.with_name(f".{options.out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(unfinished)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD).save_pretrained(
            unfinished
        )
        os.replace(unfinished, options.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {count / 1e6:.1f} million random parameters, {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    run_job(main)
