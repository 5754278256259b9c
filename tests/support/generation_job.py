"""A job for the tests: greedy answers and log-likelihoods, with cache and shared prompts and without."""

import json
from pathlib import Path
from typing import Any

import torch

from ramoe_megatron.jobs.offline_job import offline_job

PROMPTS = (5, 23, 3, 11, 11, 17, 8)
"""Lengths: more than one group, unequal numbers of rows on the ranks, beyond the window of GPT-OSS."""
NEW = (24, 9, 30, 2, 24, 1, 17)


def prompts(vocabulary: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in PROMPTS]


def main() -> None:
    with offline_job() as (args, _, options):
        from ramoe_megatron.mcore.offline.generation import greedy
        from ramoe_megatron.mcore.offline.model import OfflineModel

        model = OfflineModel(args, options.batch_tokens)
        found: dict[str, Any] = {"rows": model.has_rows}
        # a stop token that does occur, so that sequences leave their batch at different times
        free = greedy(model, prompts(), NEW, stops=[[]] * len(NEW), cached=False)
        stops = [[max(ids, key=ids.index)] if place % 2 else [] for place, ids in enumerate(free)]
        for name, cached in (("cached", True), ("whole", False)):
            found[name] = greedy(model, prompts(), NEW, stops=stops, cached=cached)
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, found)
        if torch.distributed.get_rank() == 0:
            out = Path(str(options.output))
            out.mkdir(parents=True, exist_ok=True)
            (out / "answers.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    main()
