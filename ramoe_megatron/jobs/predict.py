"""Measure before training whether alignment can help: ci share, divergence and a transplant test.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.predict MEGATRON_FLAGS --load DIR --ramoe-data FILE \\
        --ramoe-taxonomy FILE --ramoe-experts FILE --ramoe-divergence-file FILE --ramoe-output DIR

The transplant test answers each target-language prompt twice: once unchanged, and once with English routing
transplanted. For the transplant, the layers of the zone route the last prompt token by the router logits of
the last token of the parallel English prompt. The transplant test is ours and is in no paper.
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
from ramoe_megatron.method.categories import summarise
from ramoe_megatron.method.layers import parse_layers
from ramoe_megatron.method.prediction import TransplantOutcome, predict

if TYPE_CHECKING:
    from ramoe_megatron.mcore.offline.model import OfflineModel


@dataclass(frozen=True)
class PredictOptions:
    """Options of the transplant test."""

    taxonomy: str | None = None
    """Taxonomy file (taxonomy.jsonl) that covers the split of --ramoe-split. Required."""

    experts: str | None = None
    """Expert file (experts.safetensors). The job reads the alignment zone from it and checks that it fits the
    model. Required."""

    divergence_file: str | None = None
    """Divergence curve (divergence.csv) that `ramoe profile` wrote. Required."""

    layers: str = "auto"
    """MoE layers whose routing is transplanted: auto, FIRST-LAST or FRACTION-FRACTION. auto is the zone in
    the expert file."""


def main() -> None:
    """Write `predict.json` to the output folder."""
    JOB.main()


def _read(start: Start, args: Any) -> Callable[[], None]:
    """Read the pairs, the token limits of answers, the taxonomy, the divergence curve and the zone."""
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
        "divergence",
        lambda: read_divergence(given(own.divergence_file, "divergence-file")),
        lambda found: f"{len(found)} rows",
        FILE_FIX,
        [own.divergence_file],
    )
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
    """Answer each target-language example with its own routing and with the routing of its English view.

    Args:
        limits: maximum number of new tokens of each target, in the order of the pairs.
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
            # indices into the English logits, so that choices and languages share one copy of the logits
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
