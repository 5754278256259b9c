"""The stages of a small recipe with every method, as rows of the worker's table."""

from pathlib import Path
from typing import Any

from ramoe_megatron.mcore.cpu.backend import cpu_command_line
from ramoe_megatron.recipe.load import validate
from ramoe_megatron.recipe.methods import METHODS
from ramoe_megatron.recipe.plan import make_plan
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.stage import Stage

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pp": (2, {"pipeline-model-parallel-size": 2}),
    "tp-ep": (
        4,
        {"tensor-model-parallel-size": 2, "sequence-parallel": True, "expert-model-parallel-size": 2},
    ),
}
COMBINED = {"name": "aligned-experts", "preset": ["ra-moe", "esft-token"]}


def document(folder: Path, layout: str) -> dict[str, Any]:
    """The recipe as it is in a file, of the data and the base model in `folder`."""
    ranks, parallel = LAYOUTS[layout]
    model: dict[str, Any] = {
        "num-layers": 4, "hidden-size": 32, "init-method-std": 0.1, "num-attention-heads": 4,
        "seq-length": 32,
        "max-position-embeddings": 48, "num-experts": 8, "moe-router-topk": 2, "moe-ffn-hidden-size": 32,
        "ffn-hidden-size": 32,
        "position-embedding-type": "rope", "normalization": "RMSNorm", "swiglu": True,
        "disable-bias-linear": True,
        "attention-dropout": 0, "hidden-dropout": 0, "moe-token-dispatcher-type": "alltoall",
        "make-vocab-size-divisible-by": 64,
        "moe-router-load-balancing-type": "aux_loss", "moe-aux-loss-coeff": 0.01,
    }  # fmt: skip
    train = {
        "train-iters": 2, "micro-batch-size": 4, "global-batch-size": 16, "lr": 1e-3, "eval-iters": 0,
        "eval-interval": 1000,
        "num-workers": 0, "log-interval": 1, "weight-decay": 0.1, "save-interval": 100,
    }  # fmt: skip
    return {
        "name": "small", "model": model, "train": train, "parallel": parallel,
        "checkpoint": str(folder / "base"),
        "tokenizer": {"tokenizer-type": "SentencePieceTokenizer",
                      "tokenizer-model": str(folder / "tokenizer.model")},
        "data": {"files": [str(folder / "parallel.jsonl")], "general": [str(folder / "general.jsonl")],
                 "languages": ["es", "tr"]},
        "taxonomy": {"max-new-tokens": 4}, "profile": {"select": "top-m=3", "layers": "1-2"},
        "alignment": {"coeff": 20, "target": "example"},
        "selection": {"train-budget": 9, "train-top-p": 0.5},
        "methods": [*METHODS, COMBINED], "launch": {"ranks-per-node": ranks, "batch-tokens": 256},
    }  # fmt: skip


def recipe(folder: Path, layout: str) -> Recipe:
    return validate(document(folder, layout), "recipe")


def stages(folder: Path, layout: str) -> dict[str, Stage]:
    return {
        stage.name: stage for stage in make_plan(recipe(folder, layout), folder / f"run-{layout}", folder)
    }


def row(name: str, stage: Stage) -> dict[str, Any]:
    module, *words = stage.arguments()
    timeout = ["--distributed-timeout-minutes", "3"]
    return {"name": name, "job": module.rpartition(".")[2], "argv": cpu_command_line([*words, *timeout])[0]}


def rows(folder: Path, layout: str, *kinds: str) -> list[dict[str, Any]]:
    return [
        row(f"{layout}-{stage.name.replace('/', '-')}", stage)
        for stage in stages(folder, layout).values()
        if stage.kind in kinds
    ]
