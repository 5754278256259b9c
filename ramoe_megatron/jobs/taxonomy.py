"""Stage 1: score every parallel example in English and in the target language; sort into cc, ci, ic, ii (arXiv 2605.28306).

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.taxonomy MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-output DIR
"""

from dataclasses import asdict
from itertools import chain
from pathlib import Path

from ramoe_megatron.artifacts.files import package_version, save_document
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.data.parallel import pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline_job import Progress, checkpoint_name, data_digests, examples_with_anchor, offline_job, write_on_rank_0
from ramoe_megatron.jobs.shards import Shards, depends_on
from ramoe_megatron.mcore.launch import refuse_conversations, run_job
from ramoe_megatron.method.taxonomy import TaxonomyRow, summarise


def main() -> None:
    """Write `taxonomy.jsonl` and `taxonomy.json` to the output folder."""
    with offline_job() as (args, data, options):
        from ramoe_megatron.jobs.scores import answers, by_id, score_parts
        from ramoe_megatron.mcore.offline.model import OfflineModel, start

        examples = examples_with_anchor(data)
        pairs = pair_with_anchor(examples, data.anchor)
        if not pairs:
            raise RamoeError(f"{', '.join(data.data)}: only {data.anchor!r} rows in split {data.split!r}; nothing to compare")
        refuse_conversations(examples)
        output, parts = Path(str(options.output)), by_id(examples)
        limits = options.limits(args, chain.from_iterable(parts), start(args))
        model = OfflineModel(args, options.batch_tokens)
        with Shards(output, "taxonomy", len(parts), lambda: depends_on(args, data.data, examples)) as shards:
            progress = Progress(answers(examples), "answers")
            correct = score_parts(model, parts, limits, shards, progress)
            rows = [
                TaxonomyRow(
                    target.id, target.task, target.language, target.split,
                    english_correct=correct[english.id, english.language],
                    target_correct=correct[target.id, target.language],
                )
                for english, target in pairs
            ]  # fmt: skip

            def write() -> None:
                write_taxonomy(output / "taxonomy.jsonl", rows)
                body = {
                    "anchor": data.anchor,
                    "checkpoint": checkpoint_name(args.load),
                    "data": data_digests(data.data),
                    "package_version": package_version(),
                    "pairs": [asdict(pair) for pair in summarise(rows)],
                }
                save_document(output / "taxonomy.json", "ramoe-taxonomy", body)
                shards.remove()

            write_on_rank_0(model, write)


if __name__ == "__main__":
    run_job(main)
