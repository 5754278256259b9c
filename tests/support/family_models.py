"""The tiny models of all families as Megatron checkpoints, and what transformers computes with them."""

from pathlib import Path
from typing import Any

import torch
import yaml
from family_job import sequences
from small_run import ALONE, SEQUENCE
from tiny_models import make_model

from ramoe_megatron.mcore.cpu.backend import cpu_command_line
from ramoe_megatron.models.convert import convert_folder, plan_conversion
from ramoe_megatron.models.note import FLAGS
from ramoe_megatron.recipe.megatron_flags import render

VOCABULARY = 386  # at least the tokens of small_run's tokenizer; not a multiple of 128


def write_checkpoint(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint folder/NAME. Returns what transformers computes, as `family_job` does."""
    model = make_model(name, vocab_size=VOCABULARY)
    model.set_attn_implementation("eager")
    model.save_pretrained(folder / f"{name}-hf")
    convert_folder(plan_conversion(folder / f"{name}-hf"), folder / name)
    return computed(model)


def computed(model: Any) -> dict[str, torch.Tensor]:
    """Logits, choices and weights of the experts. [S, V] and [S, E]"""
    found: dict[str, torch.Tensor] = {}
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    seen: list[Any] = []
    hooks = [
        router.register_forward_hook(lambda *args, layer=layer: seen.append((layer, args[-1])))
        for layer, router in enumerate(routers)
    ]
    with torch.no_grad():
        for place, ids in enumerate(sequences()):
            seen.clear()
            found[f"logits.{place}"] = model(torch.tensor([ids[:-1]])).logits[0]
            for layer, (logits, weights, chosen) in seen:
                rows = chosen.shape[0]
                empty = torch.zeros(rows, logits.shape[-1])
                found[f"choice.{layer}.{place}"] = empty.scatter(1, chosen, 1.0).int()
                found[f"weight.{layer}.{place}"] = empty.scatter(1, chosen, weights)
    for hook in hooks:
        hook.remove()
    return found


def family_flags(folder: Path, name: str) -> list[str]:
    """Flags of the checkpoint folder/NAME, as a user has them: from its model_args.yaml."""
    flags = yaml.safe_load((folder / name / FLAGS).read_text())
    more = ["--seq-length", str(SEQUENCE), "--tokenizer-type", "SentencePieceTokenizer"]
    more += ["--tokenizer-model", str(folder / "tokenizer.model"), "--moe-token-dispatcher-type", "alltoall"]
    return cpu_command_line([*render(flags), *more])[0]


def finetune_flags(folder: Path, name: str) -> list[str]:
    """Flags of a fine-tuning of the checkpoint folder/NAME, without its data and its number of steps.

    Megatron adds no loss at the routers, because its value depends on how the batch is split.
    """
    steps = "--lr 1e-3 --seed 7 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1"
    waits = ["--distributed-timeout-minutes", "3"]
    return [*family_flags(folder, name), *ALONE, "--moe-aux-loss-coeff", "0", *steps.split(), *waits]
