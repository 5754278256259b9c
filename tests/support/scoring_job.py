"""A job for the tests: scores the model, also with weights that make all logits equal, NaN or infinite."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline_job import examples_with_anchor, offline_job


def main() -> None:
    with offline_job() as (args, data, options):
        from ramoe_megatron.mcore.offline.model import OfflineModel, start
        from ramoe_megatron.mcore.offline.scoring import score

        examples = examples_with_anchor(data)
        limits = options.limits(args, examples, start(args))
        model = OfflineModel(args, options.batch_tokens)
        found: dict[str, Any] = {"plain": score(model, examples, limits)}
        chunks = [chunk.named_parameters() for chunk in model.chunks]
        last = [
            parameter
            for chunk in chunks
            for name, parameter in chunk
            if name.endswith("final_layernorm.weight")
        ]
        for name, value in (("equal", 0.0), ("nan", math.nan), ("infinite", math.inf)):
            for parameter in last:
                parameter.data.fill_(value)
            try:
                found[name] = score(model, examples, limits)
            except RamoeError as error:
                found[name] = str(error)
            if name == "equal":  # the first token of the vocabulary is then the next one, without end
                endless = [
                    replace(example, choices=None, answer=model.tokenizer.detokenize([0] * limit))
                    for example, limit in zip(examples, limits, strict=True)
                    if limit
                ]
                found["cut"] = score(model, endless, [limit for limit in limits if limit])
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, found)
        if torch.distributed.get_rank() == 0:
            out = Path(str(options.output))
            out.mkdir(parents=True, exist_ok=True)
            (out / "scores.json").write_text(json.dumps(ranks))
