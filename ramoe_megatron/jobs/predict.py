"""Go or no-go before any training: ci share, divergence, and the transplant test run on the model.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.predict MEGATRON_FLAGS --load DIR --ramoe-data FILE --ramoe-taxonomy FILE
        --ramoe-experts FILE --ramoe-divergence-file FILE --ramoe-output DIR

The transplant test answers each target-language prompt twice: as it is, and with its last prompt token routed, in the zone, by the
router logits that the model had at the last token of the parallel English prompt (our own test: no paper has it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy
from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import Example, pair_with_anchor
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.offline_job import Progress, examples_with_anchor, offline_job, write_on_rank_0
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import refuse_conversations, run_job
from ramoe_megatron.method.layers import parse_layers
from ramoe_megatron.method.predict import TransplantOutcome, predict
from ramoe_megatron.method.taxonomy import summarise

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel


@dataclass(frozen=True)
class PredictOptions:
    """Options of the go/no-go estimate."""

    taxonomy: str | None = None
    """taxonomy.jsonl, with the split that `--ramoe-split` names."""

    experts: str | None = None
    """experts.safetensors, for the zone and the check of the model."""

    divergence_file: str | None = None
    """divergence.csv of the profile."""

    layers: str = "auto"
    """Layers whose routing is transplanted: auto (the zone in the expert file), FIRST-LAST or FRACTION-FRACTION."""


def main() -> None:
    """Write `predict.json` to the output folder."""
    with offline_job(PredictOptions) as (args, data, options):
        from ramoe_megatron.mcore.offline.model import OfflineModel, start

        own = options_from_args(PredictOptions, args)
        for flag, value in (("taxonomy", own.taxonomy), ("experts", own.experts), ("divergence-file", own.divergence_file)):
            if value is None:
                raise RamoeError(f"--ramoe-{flag} is missing: expected the file that `ramoe taxonomy` or `ramoe profile` wrote")
        experts = ExpertFile.load(str(own.experts))
        zone = parse_layers(own.layers, experts.shape.num_moe_layers, experts.zone)
        taxonomy = summarise(read_taxonomy(str(own.taxonomy)))
        divergence = read_divergence(str(own.divergence_file))
        examples = examples_with_anchor(data)
        refuse_conversations(examples)
        pairs = pair_with_anchor(examples, data.anchor)
        limits = options.limits(args, [target for _, target in pairs], start(args))
        model = OfflineModel(args, options.batch_tokens)
        model.check(experts)
        outcomes = transplant(model, pairs, range(zone[0], zone[1] + 1), limits)
        prediction = predict(taxonomy, divergence, zone, outcomes, data.split)

        def write() -> None:
            save_document(Path(str(options.output)) / "predict.json", "ramoe-prediction", prediction.document())

        write_on_rank_0(model, write)


def transplant(
    model: "OfflineModel",
    pairs: Sequence[tuple[Example, Example]],
    layers: range,
    limits: Sequence[int],
) -> list[TransplantOutcome]:
    """Both answers to each target-language example: with its own routing, and with that of its English view.

    Args:
        limits: new tokens of each target, in the order of the pairs.
    """
    import torch

    from ramoe_megatron.mcore.offline.model import ContextMaker, MicroBatch
    from ramoe_megatron.mcore.offline.routing import Transplant, last_prompt_logits
    from ramoe_megatron.mcore.offline.scoring import score

    english = list({anchor.id: anchor for anchor, _ in pairs}.values())
    row = {example.id: number for number, example in enumerate(english)}
    logits_NLE = last_prompt_logits(model, [encode(example, model.tokenizer) for example in english])
    targets = [target for _, target in pairs]

    def context_for(places: Sequence[int]) -> ContextMaker:
        english_N = torch.tensor([row[targets[place].id] for place in places], device=logits_NLE.device)

        def context(micro: MicroBatch) -> Transplant:
            # rows of the English logits, not a copy of them for every choice of every language
            return Transplant(MicroBatch(micro.batch, english_N[micro.places.clamp(min=0)]), logits_NLE, layers)

        return context

    progress = Progress(2 * sum(len(target.choices or (target,)) for target in targets), "answers")
    plain = score(model, targets, limits, progress=progress)
    moved = score(model, targets, limits, context_for, progress)
    return [
        TransplantOutcome(target.id, target.task, target.language, before, after)
        for target, before, after in zip(targets, plain, moved, strict=True)
    ]


if __name__ == "__main__":
    run_job(main)
