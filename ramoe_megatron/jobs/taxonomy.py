"""Stage 1: score each parallel example in English and in the target language (arXiv 2605.28306).

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.taxonomy MEGATRON_FLAGS --load DIR --ramoe-data FILE \\
        --ramoe-output DIR

Each pair gets a category: cc, ci, ic or ii. The first letter says whether the English answer is correct (c)
or incorrect (i), and the second letter says the same for the target language.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from ramoe_megatron.artifacts.files import package_version, save_document
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.jobs.entry import Job
from ramoe_megatron.jobs.offline_job import (
    OfflineInputs,
    OfflineOptions,
    ProgressLines,
    checkpoint_name,
    data_digests,
    read_offline,
    write_on_rank_0,
)
from ramoe_megatron.jobs.shards import Shards, depends_on
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.mcore.start import Start
from ramoe_megatron.method.categories import TaxonomyRow, summarise


def main() -> None:
    """Write `taxonomy.jsonl` and `taxonomy.json` to the output folder."""
    JOB.main()


def _read(start: Start, args: Any) -> Callable[[], None]:
    """Read the examples, their pairs and the token limits of answers."""
    from ramoe_megatron.jobs.scores import by_id

    inputs = read_offline(start, args)
    pairs = inputs.pairs(start)
    limits = inputs.limits(start, lambda: list(chain.from_iterable(by_id(inputs.examples.value))))
    return lambda: score_and_write(inputs, pairs.value, limits.value)


def score_and_write(
    inputs: OfflineInputs, pairs: Sequence[tuple[Example, Example]], limits: Sequence[int]
) -> None:
    """Score the examples and write the taxonomy.

    Args:
        limits: maximum number of new tokens of each example, in the order of `by_id`.
    """
    from ramoe_megatron.jobs.scores import answers, by_id, score_parts
    from ramoe_megatron.mcore.offline.model import OfflineModel

    args, data, examples, output = inputs.args, inputs.data, inputs.examples.value, inputs.output.value
    parts = by_id(examples)
    model = OfflineModel(args, inputs.options.batch_tokens)
    with Shards(output, "taxonomy", len(parts), lambda: depends_on(args, data.data, examples)) as shards:
        progress = ProgressLines(answers(examples), "answers")
        correct = score_parts(model, parts, limits, shards, progress)
        rows = [
            TaxonomyRow(
                target.id,
                target.task,
                target.language,
                target.split,
                english_correct=correct[english.id, english.language],
                target_correct=correct[target.id, target.language],
            )
            for english, target in pairs
        ]

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


JOB = Job(lambda: (DataOptions, OfflineOptions), _read)

if __name__ == "__main__":
    run_job(main)
