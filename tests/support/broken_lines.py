"""Command lines of every job: valid ones, and ones with a single fault that ends the job at its start."""

from collections.abc import Mapping
from pathlib import Path

from small_run import load_flags, offline_flags, profile_flags, training_flags, without_value

from ramoe_megatron.mcore.findings import Line


def alignment(world: Path, experts: str = "experts.safetensors") -> list[str]:
    flags = [
        "--ramoe-coeff",
        "1",
        "--ramoe-experts",
        str(world / experts),
        "--ramoe-taxonomy",
        str(world / "taxonomy.jsonl"),
    ]
    return [*load_flags(world), *flags, "--save", str(world / "tuned"), "--save-interval", "2"]


# name -> job, further flags, ranks, the check that fails, what is told of it
FATAL: dict[str, tuple[str, str, int, str, list[str]]] = {
    "tp 3": ("finetune", "--tensor-model-parallel-size 3", 2, "layout",
             ["2 ranks, but TP 3 x PP 1 x CP 1", "multiple of 3"]),
    "ep": ("finetune", "--expert-model-parallel-size 4", 2, "layout", ["EP 4", "multiple of 4"]),
    "experts": ("finetune", "--expert-model-parallel-size 2 --num-experts 5", 2, "layout",
                ["does not divide --num-experts 5"]),
    "batch": ("finetune", "--global-batch-size 18", 2, "layout", ["18 is no multiple", "4 x DP 2 = 8"]),
    "cp": ("taxonomy", "--context-parallel-size 2", 2, "layout",
           ["--context-parallel-size 2", "whole sequences"]),
    "flag": ("finetune", "--tensor-model-paralel-size 2", 1, "flags",
             ["unrecognized arguments: --tensor-model-paralel-size 2"]),
    "value": ("finetune", "--micro-batch-size many", 1, "flags", ["--micro-batch-size", "'many'"]),
    "interval": ("finetune", "--save there", 1, "flags", ["save_interval"]),
    "heads": ("finetune", "--num-attention-heads 3", 1, "flags", ["hidden_size % args.num_attention_heads"]),
    "warm-up": ("finetune", "--lr-warmup-iters 5", 1, "flags",
                ["self.lr_warmup_steps < self.lr_decay_steps, "
                 "where self.lr_warmup_steps is 80, self.lr_decay_steps is 32 "
                 "(AssertionError in megatron/core/optimizer_param_scheduler.py, line "]),
    "unevaluated": ("unevaluated", "", 1, "flags",
                    ["// args.eval_interval", "eval_interval is None",
                     "(TypeError in megatron/training/training.py, line "]),
    "together": ("finetune", "--ramoe-coeff 1", 1, "flags", ["--ramoe-coeff 1.0 without --ramoe-experts"]),
    "tokenizer": ("finetune", "--tokenizer-model absent.model", 1, "tokenizer", ["absent.model"]),
    "tokenizer offline": ("evaluate", "--tokenizer-model absent.model", 1, "tokenizer", ["absent.model"]),
    "data": ("finetune", "--ramoe-data {world}/broken.jsonl", 1, "data", ["broken.jsonl, line 5"]),
    "data offline": ("evaluate", "--ramoe-data {world}/broken.jsonl", 1, "data", ["broken.jsonl, line 5"]),
    "split": ("finetune", "--ramoe-split dev", 1, "data", ["empty split 'dev'"]),
    "languages": ("taxonomy", "--ramoe-languages en", 1, "data", ["only 'en' rows"]),
    "weights": ("finetune", "--ramoe-weights even/*=1", 1, "data", ["no pattern matches", "odd/en"]),
    "long": ("finetune", "--seq-length 24", 1, "data", ["longer than --seq-length 24", "needs 28"]),
    "base": ("finetune", "--pretrained-checkpoint {world}/absent", 1, "checkpoint",
             ["--pretrained-checkpoint", "no checkpoint there"]),
    "load": ("predict", "--load {world}/absent", 1, "checkpoint", ["--load", "no checkpoint there"]),
    "foreign": ("aligned", "--ramoe-experts {world}/foreign.safetensors", 1, "expert file",
                ["num_moe_layers is 6", "4 in the model"]),
    "frequency": ("aligned", "--moe-layer-freq [1,0,1,0]", 1, "expert file",
                  ["num_moe_layers is 4", "2 in the model"]),
    "evaluation": ("evaluate", "--ramoe-experts {world}/foreign.safetensors", 1, "expert file",
                   ["num_moe_layers is 6"]),
    "steering": ("evaluate", "--ramoe-steer soft", 1, "steering", ["--ramoe-experts is missing"]),
    "steering file": (
        "evaluate", "--ramoe-method x --ramoe-steering no.json --ramoe-experts {world}/experts.safetensors",
        1, "steering", ["no.json"]
    ),
    "steering hard": (
        "evaluate",
        "--ramoe-method x --ramoe-steer hard --ramoe-experts {world}/later.safetensors "
        "--moe-router-score-function sigmoid",
        1,
        "steering", ["--moe-router-score-function sigmoid", "--ramoe-steer soft"],
    ),
    "search hard": (
        "steer", "--moe-router-num-groups 4 --moe-router-group-topk 2", 1, "settings",
        ["--moe-router-group-topk 2", "--ramoe-kinds soft"]
    ),
    "settings": ("steer", "--ramoe-taus best", 1, "settings", ["'best'"]),
    "steer foreign": ("steer", "--ramoe-experts {world}/foreign.safetensors", 1, "expert file",
                      ["num_moe_layers is 6"]),
    "zone": ("aligned", "--ramoe-experts {world}/zoneless.safetensors", 1, "expert file",
             ["--ramoe-layers auto", "the curve is flat"]),
    "layers": ("aligned", "--ramoe-layers 2-7", 1, "expert file", ["2-7", "0 to 3"]),
    "labels": ("aligned", "--ramoe-taxonomy {world}/short.jsonl", 1, "labels", ["have no category"]),
    "forced": ("aligned", "--moe-router-force-load-balancing", 1, "alignment",
               ["--moe-router-force-load-balancing"]),
    "usage": ("finetune",
              "--ramoe-train esft-gate --ramoe-train-top-p 0.3 --ramoe-usage {world}/no.safetensors", 1,
              "selection",
              ["no.safetensors", "no such file"]),
    "usage of another": ("finetune",
                         "--ramoe-train rise --ramoe-train-budget 3 --ramoe-usage {world}/usage.safetensors",
                         1, "selection",
                         ["num_moe_layers is 6", "4 in the model"]),
    "budget": ("finetune", "--ramoe-train rise", 1, "flags", ["without --ramoe-usage"]),
    "rule": ("profile", "--ramoe-select best", 1, "expert rule", ["'best'"]),
    "general": ("profile", "--ramoe-general {world}/absent.jsonl", 1, "general text", ["absent.jsonl"]),
    "taxonomy": ("profile", "--ramoe-taxonomy {world}/general.jsonl", 1, "taxonomy", ["general.jsonl:1"]),
    "divergence": ("predict", "", 1, "divergence", ["--ramoe-divergence-file is missing"]),
}  # fmt: skip
SOUND = {"finetune": 2, "aligned": 1, "taxonomy": 2, "profile": 1, "evaluate": 1, "steer": 1}


def line(
    name: str, kind: str, more: list[str], ranks: int, world: Path, coming: Mapping[str, str] | None = None
) -> Line:
    """The command line of a kind of job with further flags, in a folder that `doctor_world` wrote."""
    flags = {
        "finetune": lambda: training_flags(world, *load_flags(world), *more),
        "aligned": lambda: training_flags(world, *alignment(world), *more),
        "unevaluated": lambda: without_value(
            training_flags(world, *load_flags(world), *more), "--eval-interval"
        ),
        "profile": lambda: profile_flags(world, "out", *more),
        "steer": lambda: offline_flags(
            world, "out", "--ramoe-experts", str(world / "experts.safetensors"), "--ramoe-taus", "file", *more
        ),
    }.get(kind, lambda: offline_flags(world, "out", *more))()
    return Line(
        name, "finetune" if kind in ("aligned", "unevaluated") else kind, flags, ranks, coming=coming or {}
    )


def sound_line(kind: str, world: Path) -> Line:
    """The line of a kind of `SOUND`."""
    return line(f"sound {kind}", kind, [], SOUND[kind], world)


def broken_line(name: str, world: Path, ranks: int | None = None) -> Line:
    """A line of `FATAL`."""
    kind, more, own, _, _ = FATAL[name]
    return line(
        name,
        kind,
        more.format(world=world).split(),
        ranks or own,
        world,
        {str(world / "later.safetensors"): "earlier"},
    )
