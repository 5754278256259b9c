"""Stage 1: score every parallel example in English and in the target language; sort into cc, ci, ic, ii (arXiv 2605.28306).

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.taxonomy MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-output DIR
"""

from dataclasses import asdict
from pathlib import Path

from ramoe_megatron.data.parallel import Example, pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline import (
    Progress,
    Shards,
    checkpoint_name,
    checkpoint_state,
    data_digests,
    examples_with_anchor,
    offline_job,
    write_on_rank_0,
)
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.method.artefacts import package_version, save_document, write_taxonomy
from ramoe_megatron.method.taxonomy import TaxonomyRow, summarise

SHARD_IDS = 256
"""Ids that are scored, in all their languages, before a shard is written."""


def main() -> None:
    """Write `taxonomy.jsonl` and `taxonomy.json` to the output folder."""
    with offline_job() as (args, data, options):
        from ramoe_megatron.mcore.offline import OfflineModel
        from ramoe_megatron.mcore.scoring import score

        examples = examples_with_anchor(data)
        pairs = pair_with_anchor(examples, data.anchor)
        if not pairs:
            raise RamoeError(f"{', '.join(data.data)}: only {data.anchor!r} rows in split {data.split!r}; nothing to compare")
        model = OfflineModel(args, options.batch_tokens)
        output = Path(str(options.output))
        digests = data_digests(data.data)
        shards = Shards(
            output, "taxonomy", data=digests, split=data.split, languages=data.languages, anchor=data.anchor,
            columns=data.columns, max_new_tokens=options.max_new_tokens, checkpoint=checkpoint_state(args.load),
            tokenizer=[args.tokenizer_type, args.tokenizer_model],
        )  # fmt: skip
        correct: dict[tuple[str, str], bool] = {}
        progress = Progress(sum(len(e.choices or (e,)) for e in examples), "answers")
        for number, part in enumerate(_by_id(examples)):
            saved = shards.rows(number)
            if saved is None:
                saved = score(model, part, options.max_new_tokens, progress=progress)
                shards.save(number, saved)
            else:
                progress(sum(len(e.choices or (e,)) for e in part))
            correct |= {(e.id, e.language): bool(right) for e, right in zip(part, saved, strict=True)}

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
                "data": digests,
                "package_version": package_version(),
                "pairs": [asdict(pair) for pair in summarise(rows)],
            }
            save_document(output / "taxonomy.json", "ramoe-taxonomy", body)
            shards.remove()

        write_on_rank_0(model, write)


def _by_id(examples: list[Example]) -> list[list[Example]]:
    """The examples in parts of `SHARD_IDS` ids, each with all its languages."""
    ids = list(dict.fromkeys(example.id for example in examples))
    part_of = {id_: number // SHARD_IDS for number, id_ in enumerate(ids)}
    parts: list[list[Example]] = [[] for _ in range(-(-len(ids) // SHARD_IDS))]
    for example in examples:
        parts[part_of[example.id]].append(example)
    return parts


if __name__ == "__main__":
    run_job(main)
