"""A job for the tests: likelihoods, answers and top-k shares of every example, with and without steering."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.data.encode import encode
from ramoe_megatron.jobs.evaluate import EvaluateOptions
from ramoe_megatron.jobs.offline_job import examples_with_anchor, offline_job
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.method.experts import TopM
from ramoe_megatron.method.steering import Steering

LAYERS = (1, 2)


def main() -> None:
    with offline_job(EvaluateOptions) as (args, data, options):
        from ramoe_megatron.mcore.offline.model import OfflineModel
        from ramoe_megatron.mcore.offline.routing import sequence_routing
        from ramoe_megatron.mcore.offline.scoring import greedy, log_likelihoods
        from ramoe_megatron.mcore.steer.contexts import steering_contexts

        file = ExpertFile.load(str(options_from_args(EvaluateOptions, args).experts))
        two, three = (replace(file, expert_mask=TopM(m).choose(file.delta)) for m in (2, 3))
        soft, hard = Steering("soft", 0.5, None, LAYERS), Steering("hard", None, None, LAYERS)
        cases = {
            "none": None,
            "soft-0": (two, replace(soft, strength=0.0)),
            "empty": (replace(two, expert_mask=torch.zeros_like(two.expert_mask)), hard),
            "other-tasks": (replace(two, tasks=("a", "b")), hard),
            "one-task": (replace(two, tasks=("a", "odd")), hard),
            "soft": (two, soft),
            "minus": (two, replace(soft, strength=-2.0)),
            "hard": (two, hard),
            "full": (three, hard),
        }
        model = OfflineModel(args, options.batch_tokens)
        examples = examples_with_anchor(data)
        encoded = [encode(example, model.tokenizer) for example in examples]
        prompts = [sequence.ids[: sequence.prompt_length] for sequence in encoded]
        row = torch.tensor([file.task_index(example.task) for example in examples])
        found = {
            "chosen": two.expert_mask[row].float(),
            "chosen.full": three.expert_mask[row].float(),
            "row": row,
        }
        for name, case in cases.items():
            context = steering_contexts(model, *case)(examples)(range(len(examples))) if case else None
            found[f"likelihood.{name}"] = log_likelihoods(model, encoded, context)
            found[f"frequency.{name}"] = sequence_routing(model, encoded, (), steered=context).frequency_NLE[
                "all"
            ]
            answers = greedy(model, prompts, 3, context)
            found[f"answers.{name}"] = torch.tensor([answer + [-1] * (3 - len(answer)) for answer in answers])
        if torch.distributed.get_rank() == 0:
            out = Path(str(options.output))
            out.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in found.items()}, out / "steered.safetensors"
            )
