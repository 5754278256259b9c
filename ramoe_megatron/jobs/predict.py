"""Go or no-go before any training: ci share, divergence, and the transplant test run on the model.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.predict MEGATRON_FLAGS --load DIR --ramoe-data FILE
    --ramoe-taxonomy FILE
        --ramoe-experts FILE --ramoe-divergence-file FILE --ramoe-output DIR

The transplant test answers each target-language prompt twice: as it is, and with its last prompt token
routed, in the zone, by the router logits that the model had at the last token of the parallel English prompt
(our own test: no paper has it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.records import read_divergence, read_taxonomy
from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.jobs.entry import FILE_FIX, Job
from ramoe_megatron.jobs.offline_job import (
    OfflineOptions,
    ProgressLines,
    fitting_experts,
    given,
    read_offline,
    write_on_rank_0,
)
from ramoe_megatron.mcore.arguments import DataOptions
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.launch import run_job
from ramoe_megatron.mcore.start import Start
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
    JOB.main()


def _read(start: Start, args: Any) -> Callable[[], None]:
    """The pairs, how many tokens an answer may take, the taxonomy, the divergence curve and the zone."""
    own = options_from_args(PredictOptions, args)
    inputs = read_offline(start, args)
    pairs = inputs.pairs(start)
    limits = inputs.limits(start, lambda: [target for _, target in pairs.value])

    def zone() -> tuple[int, int, int]:
        experts = fitting_experts(start, args, own.experts)
        layers = experts.shape.num_moe_layers
        return *parse_layers(own.layers, layers, experts.zone), layers

    rows = start.step(
        "taxonomy",
        lambda: read_taxonomy(given(own.taxonomy, "taxonomy")),
        lambda found: f"{len(found)} rows",
        FILE_FIX,
        [own.taxonomy],
    )
    divergence = start.step(
        "divergence", lambda: read_divergence(given(own.divergence_file, "divergence-file")), lambda found: f"{len(found)} rows",
        FILE_FIX, [own.divergence_file],
    )  # fmt: skip
    layers = start.step(
        "expert file", zone, lambda found: "MoE layers {}-{} of {}".format(*found), FILE_FIX, [own.experts]
    )

    def work() -> None:
        from ramoe_megatron.mcore.offline.model import OfflineModel

        first, last, _ = layers.value
        model = OfflineModel(args, inputs.options.batch_tokens)
        outcomes = transplant_outcomes(model, pairs.value, range(first, last + 1), limits.value)
        prediction = predict(
            summarise(rows.value), divergence.value, (first, last), outcomes, inputs.data.split
        )

        def write() -> None:
            save_document(inputs.output.value / "predict.json", "ramoe-prediction", prediction.document())

        write_on_rank_0(model, write)

    return work


def transplant_outcomes(
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
            return Transplant(
                MicroBatch(micro.batch, english_N[micro.places.clamp(min=0)]), logits_NLE, layers
            )

        return context

    progress = ProgressLines(2 * sum(len(target.choices or (target,)) for target in targets), "answers")
    plain = score(model, targets, limits, progress=progress)
    moved = score(model, targets, limits, context_for, progress)
    return [
        TransplantOutcome(target.id, target.task, target.language, before, after)
        for target, before, after in zip(targets, plain, moved, strict=True)
    ]


JOB = Job(lambda: (DataOptions, OfflineOptions, PredictOptions), _read)

if __name__ == "__main__":
    run_job(main)
