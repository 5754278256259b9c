"""A job for the tests: writes the routing of every training example, from which a test computes the loss."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from ramoe_megatron.data.encode import encode
from ramoe_megatron.jobs.offline_job import examples_with_anchor, offline_job


def main() -> None:
    with offline_job() as (args, data, options):
        from ramoe_megatron.mcore.observe import TOKEN_CHOICES
        from ramoe_megatron.mcore.offline.model import MicroBatch, OfflineModel
        from ramoe_megatron.mcore.offline.routing import Transplant, last_prompt_logits, sequence_routing
        from ramoe_megatron.mcore.offline.scoring import greedy, log_likelihoods

        model = OfflineModel(args, options.batch_tokens)
        examples = examples_with_anchor(data)
        encoded = [encode(example, model.tokenizer) for example in examples]
        routing = sequence_routing(model, encoded, counted=TOKEN_CHOICES)
        logits = last_prompt_logits(model, encoded)

        def own_routing(micro: MicroBatch) -> Transplant:
            return Transplant(micro, logits, range(1, 3))

        def other_routing(micro: MicroBatch) -> Transplant:
            return Transplant(micro, logits.roll(1, dims=0), range(1, 3))

        prompts = [sequence.ids[: sequence.prompt_length] for sequence in encoded]
        answers = greedy(model, prompts, 4)
        small = OfflineModel.__new__(OfflineModel)
        small.__dict__ = {**model.__dict__, "batch_tokens": 40}
        found = {
            **{f"frequency.{choice}": frequency for choice, frequency in routing.frequency_NLE.items()},
            "logits": logits,
            "likelihood": log_likelihoods(model, encoded),
            "likelihood.small_batches": log_likelihoods(small, encoded),
            "likelihood.own_routing": log_likelihoods(model, encoded, own_routing),
            "likelihood.other_routing": log_likelihoods(model, encoded, other_routing),
            "answers": torch.tensor([answer + [-1] * (4 - len(answer)) for answer in answers]),
            "answers.own_routing": torch.tensor(
                [a + [-1] * (4 - len(a)) for a in greedy(model, prompts, 4, own_routing)]
            ),
            "loss_tokens": torch.tensor([len(e.ids) - e.prompt_length for e in encoded]),
            **{f"pooled.{choice}": pooled for choice, pooled in routing.pooled_NLE.items()},
        }
        if torch.distributed.get_rank() == 0:
            out = Path(str(options.output))
            out.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in found.items()}, out / "reference.safetensors"
            )
