"""Log-likelihoods and greedy continuations of token sequences, as lm-evaluation-harness asks for them.

A log-likelihood is of the tokens that are given, without an end token. With `with_whole_vocabulary`, softmax
and greedy decoding see all tokens that transformers sees, also those that the tokenizer does not have.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.data.stops import StopStrings
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.families import note_of
from ramoe_megatron.mcore.offline.generation import NOT_FINITE, OnProgress, greedy
from ramoe_megatron.mcore.offline.model import MicroBatch, OfflineModel

POSITIONS = 512
"""Number of positions whose logits are in float32 at once, since a vocabulary is large."""


def continuation_likelihoods(
    model: OfflineModel,
    sequences: Sequence[tuple[Sequence[int], int]],
    progress: OnProgress | None = None,
) -> list[tuple[float, bool]]:
    """Natural log-likelihood of each continuation, and whether greedy decoding gives it, on every rank.

    Sequences that differ in their last token alone run once.

    Args:
        sequences: ids of context and continuation, and the number of ids of the context; neither is empty.

    Raises:
        RamoeError: on every rank, if a log-likelihood is not finite.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    members: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(sequences):
        members.setdefault(tuple(ids[:-1]), []).append(number)
    of_run = list(members.values())
    encoded = [Encoded([*inputs, model.tokenizer.eod], len(inputs)) for inputs in members]
    scores = torch.zeros(len(sequences), dtype=torch.float64, device=model.device)
    others = torch.zeros(len(sequences), dtype=torch.int64, device=model.device)

    def read(micro: MicroBatch, logits: Tensor) -> None:
        found = [
            (row, place, ids[place + 1], number)
            for row, run in enumerate(micro.places.tolist())
            if run >= 0
            for number in of_run[run]
            for ids, context in [sequences[number]]
            for place in range(context - 1, len(ids) - 1)
        ]
        index = torch.tensor(found, dtype=torch.int64, device=model.device).view(len(found), 4)
        for part in index.split(POSITIONS):
            row, place, label, owner = part.T
            whole = gather_from_tensor_model_parallel_region(logits[row, place])
            if model.reports:
                terms_RV = whole[:, : model.vocabulary].float().log_softmax(dim=-1)
                scores.index_add_(0, owner, terms_RV.gather(1, label[:, None]).squeeze(1).double())
                others.index_add_(0, owner, (terms_RV.argmax(dim=-1) != label).long())

    for group in model.groups([len(each.ids) for each in encoded]):
        model.run(encoded, group, read)
        if progress:
            progress(sum(len(of_run[run]) for run in group))
    shared = list(zip(model.share(scores).tolist(), model.share(others).tolist(), strict=True))
    _refuse_not_finite([not torch.tensor(score).isfinite() for score, _ in shared])
    return [(score, count == 0) for score, count in shared]


def continuations(
    model: OfflineModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    until: Sequence[Sequence[str]],
    progress: OnProgress | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, on every rank.

    It ends before the end token, at the limit, or with the token that completes one of its texts in `until`.

    Raises:
        RamoeError: on every rank, if logits are not finite.
    """
    stops = [StopStrings(tuple(texts)) if texts else None for texts in until]
    ids = greedy(model, prompts, list(limits), None, progress, until=stops)
    _refuse_not_finite([NOT_FINITE in each for each in ids])
    return ids


def with_whole_vocabulary(model: OfflineModel) -> OfflineModel:
    """The model, with the vocabulary of its Hugging Face folder, which may be larger than the tokenizer's.

    Without a note beside the checkpoint, the vocabulary stays the tokenizer's.
    """
    if note := note_of(model.args):
        model.vocabulary = note.config().vocab_size
    return model


def _refuse_not_finite(broken: Sequence[bool]) -> None:
    if any(broken):
        raise RamoeError(
            f"the model's logits hold NaN or infinity in {sum(broken)} of {len(broken)} requests. Its "
            "weights are not finite, or overflow in this precision: load another checkpoint, or use bfloat16"
        )
