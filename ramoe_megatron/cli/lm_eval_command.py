"""`ramoe lm-eval`: lm-evaluation-harness on a Megatron checkpoint, over ranks."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError

SIZES = {
    "tensor_parallel": "tensor-model-parallel-size",
    "pipeline_parallel": "pipeline-model-parallel-size",
    "expert_parallel": "expert-model-parallel-size",
    "expert_tensor_parallel": "expert-tensor-parallel-size",
}
"""Short names in --model_args, and Megatron's flags."""
PRECISION: dict[str, dict[str, bool]] = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}


def job_words(words: Sequence[str]) -> tuple[list[str], int]:
    """The words of the job `jobs.harness` from the words of lm_eval, and the number of ranks that they need.

    Raises:
        RamoeError: another model than `ramoe`, no checkpoint, a file of flags that cannot be read, or a size
            that is not a whole number.
    """
    from ramoe_megatron.recipe.megatron_flags import render

    asked = _parsed(words)
    if asked["model"] not in (None, "ramoe"):
        raise RamoeError(f"lm-eval: --model {asked['model']}: expected ramoe, or leave --model out")
    flags = model_flags(asked["model_args"])
    return [*render(flags), "--", *words[words[0] == "run" :]], ranks_of(flags)


def model_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's flags from --model_args.

    The model's flags come from model_args.yaml beside the checkpoint, its tokenizer from the folder
    `huggingface` there. Any other name is a flag of Megatron or of ours, with _ or -, and goes before them.

    Raises:
        RamoeError: as `job_words`.
    """
    from ramoe_megatron.models.note import FLAGS, ORIGINAL
    from ramoe_megatron.recipe.megatron_flags import size_of

    left = {str(name).replace("-", "_"): value for name, value in given.items()}
    folder = left.pop("checkpoint", None)
    if not folder:
        raise RamoeError(
            "lm-eval: --model_args names no checkpoint: expected checkpoint=DIR, the folder of one"
        )
    checkpoint = Path(str(folder))
    flags: dict[str, Any] = _read_flags(Path(str(left.pop("flags", checkpoint / FLAGS))))
    if (checkpoint / ORIGINAL).is_dir():
        flags |= {
            "tokenizer-type": "HuggingFaceTokenizer",
            "tokenizer-model": str(checkpoint / ORIGINAL),
        }
    precision = left.pop("dtype", "float32")
    if precision not in PRECISION:
        raise RamoeError(f"lm-eval: dtype={precision}: expected one of {', '.join(PRECISION)}")
    tokens = left.pop("batch_tokens", None)
    flags |= PRECISION[precision] | {"load": str(checkpoint), "ramoe-batch-tokens": tokens}
    flags |= {SIZES.get(name, name.replace("_", "-")): value for name, value in left.items()}
    if size_of(flags, "expert-model-parallel-size") > 1:
        flags.setdefault("expert-tensor-parallel-size", 1)
    if size_of(flags, "tensor-model-parallel-size") > 1:
        flags.setdefault("sequence-parallel", True)
    flags.setdefault("seq-length", flags.get("max-position-embeddings"))
    return flags


def ranks_of(flags: Mapping[str, Any]) -> int:
    """The smallest number of ranks with these parallel sizes."""
    from ramoe_megatron.recipe.megatron_flags import size_of

    tensor = size_of(flags, "tensor-model-parallel-size")
    experts = size_of(flags, "expert-model-parallel-size") * size_of(
        flags, "expert-tensor-parallel-size", tensor
    )
    return size_of(flags, "pipeline-model-parallel-size") * math.lcm(tensor, experts)


def _parsed(words: Sequence[str]) -> dict[str, Any]:
    """`model` and `model_args` of lm_eval's command line, and of its --config file."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    before, sys.argv = sys.argv, ["lm-eval", "run", *words[words[0] == "run" :]]
    try:
        found = vars(HarnessCLI().parse_args())
        if path := found.get("config"):
            found = {**EvaluatorConfig.load_yaml_config(path), **{k: v for k, v in found.items() if v}}
    except (ValueError, TypeError, OSError) as error:
        raise RamoeError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before
    return {"model": found.get("model"), "model_args": found.get("model_args") or {}}


def _read_flags(path: Path) -> dict[str, Any]:
    import yaml

    advice = (
        "`ramoe convert` writes it, and `ramoe finetune` copies it. For another checkpoint, write Megatron's "
        "flags of the model (num-layers: 24) to a YAML file and give it as flags=FILE"
    )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RamoeError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RamoeError(f"{path}: is not YAML ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise RamoeError(f"{path}: found {type(found).__name__}, expected names and values; {advice}")
    return found
