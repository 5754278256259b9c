"""Scoring examples with a model run forward only: log-likelihood of choices, and greedy decoding."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ramoe_megatron.data.answers import is_correct
from ramoe_megatron.data.encode import Encoded, decoding, encode_choices
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.offline import ContextMaker, MicroBatch, OfflineModel

Progress = Callable[[int], None]
ContextFor = Callable[[Sequence[int]], ContextMaker]
"""From the example that each scored sequence belongs to, to the maker of its routing contexts."""


def score(
    model: OfflineModel,
    examples: Sequence[Example],
    max_new_tokens: int | Sequence[int],
    context_for: ContextFor | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """Whether the model answers each example correctly, on every rank; `max_new_tokens`: of all, or of each example.

    With choices: the choice of the highest log-likelihood as response (sum over its tokens and the end token) is the answer. Without:
    the greedy continuation of the prompt equals the answer after normalising (`data.answers`).
    """
    correct = [False] * len(examples)
    with_choices = [place for place, example in enumerate(examples) if example.choices]
    generated = [place for place, example in enumerate(examples) if not example.choices]
    if with_choices:
        encoded, owner = [], []
        for place in with_choices:
            choices = encode_choices(examples[place], model.tokenizer)
            encoded += choices
            owner += [place] * len(choices)
        likelihood = log_likelihoods(model, encoded, context_for(owner) if context_for else None, progress).tolist()
        start = 0
        for place in with_choices:
            options = examples[place].choices or ()
            scores = likelihood[start : start + len(options)]
            correct[place] = options[scores.index(max(scores))] == examples[place].answer
            start += len(options)
    if generated:
        asked = [decoding(examples[place], model.tokenizer) for place in generated]
        prompts, stops = [each.prompt for each in asked], [each.stops for each in asked]
        context = context_for(generated) if context_for else None
        most = max_new_tokens if isinstance(max_new_tokens, int) else [max_new_tokens[place] for place in generated]
        answers = greedy(model, prompts, most, context, progress, stops)
        for place, each, ids in zip(generated, asked, answers, strict=True):
            correct[place] = is_correct(each.answer(ids, model.tokenizer), examples[place].answer)
    return correct


def log_likelihoods(
    model: OfflineModel,
    encoded: Sequence[Encoded],
    context: ContextMaker | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Natural log-likelihood of each response given its prompt, end token included. [N], float64, on every rank"""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    scores = torch.zeros(len(encoded), dtype=torch.float64, device=model.device)

    def read(micro: MicroBatch, logits: Tensor) -> None:
        # of the response's positions alone: a softmax over the vocabulary at every token of the prompt costs more than the model
        row, column = micro.batch["loss_mask"].nonzero(as_tuple=True)
        whole = gather_from_tensor_model_parallel_region(logits[row, column])
        if model.reports:
            label = micro.batch["labels"][row, column].unsqueeze(1)
            terms = whole.float().log_softmax(dim=-1).gather(1, label).squeeze(1).double()
            sums = torch.zeros(len(logits), dtype=torch.float64, device=model.device).index_add_(0, row, terms)
            scores[micro.places[micro.real]] = sums[micro.real]

    _refuse_long(model, [len(sequence.ids) - 1 for sequence in encoded])
    for group in model.groups([len(sequence.ids) for sequence in encoded]):
        model.run(encoded, group, read, context=context)
        if progress:
            progress(len(group))
    return model.share(scores)


def greedy(
    model: OfflineModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    context: ContextMaker | None = None,
    progress: Progress | None = None,
    stops: Sequence[Collection[int]] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, on every rank: up to its first stop (left out), or `max_new_tokens` (of all, or of each).

    `stops`: the tokens that end the continuation of each prompt; by default the tokenizer's end of document.

    Each step runs the whole sequence again: right in every layout, and quick where answers are short.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    lengths = [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)]
    _refuse_long(model, lengths)
    ends = stops or [[model.tokenizer.eod]] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    for group in model.groups(lengths):
        unfinished = [place for place in group if most[place] > 0]
        while unfinished:
            # one id more than is run: the last one is only ever a label
            current = [Encoded([*prompts[p], *answers[p], model.tokenizer.eod], len(prompts[p])) for p in unfinished]
            tokens = _next_tokens(model, current, unfinished, context)
            for place, token in zip(unfinished, tokens, strict=True):
                answers[place].append(token)
            unfinished = [p for p in unfinished if answers[p][-1] not in ends[p] and len(answers[p]) < most[p]]
        if progress:
            progress(len(group))
    return [answer[:-1] if answer and answer[-1] in end else answer for answer, end in zip(answers, ends, strict=True)]


def _next_tokens(
    model: OfflineModel, sequences: Sequence[Encoded], owners: Sequence[int], context: ContextMaker | None
) -> list[int]:
    """The most likely next token of each sequence (lowest id among equals)."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = torch.zeros(len(sequences), dtype=torch.int64, device=model.device)
    owner = torch.tensor(owners, device=model.device)

    def read(micro: MicroBatch, logits: Tensor) -> None:
        rows = torch.arange(len(logits), device=logits.device)
        last = gather_from_tensor_model_parallel_region(logits[rows, micro.batch["length"] - 1])
        if model.reports:
            best = last[:, : model.tokenizer.vocab_size].float().argmax(dim=-1)
            tokens[micro.places[micro.real]] = best[micro.real]

    def with_owner(micro: MicroBatch) -> object:
        # contexts are made for the job's own places, not for those of the unfinished rest
        places = torch.where(micro.real, owner[micro.places.clamp(min=0)], micro.places)
        return context(MicroBatch(micro.batch, places)) if context else None

    for part in model.groups([len(sequence.ids) for sequence in sequences]):
        model.run(sequences, part, read, context=with_owner if context else None)  # type: ignore[arg-type]
    return model.share(tokens).tolist()


def _refuse_long(model: OfflineModel, lengths: Sequence[int]) -> None:
    limit = model.args.max_position_embeddings
    if lengths and max(lengths) > limit:
        raise RamoeError(
            f"{sum(length > limit for length in lengths)} sequences are longer than --max-position-embeddings {limit} (the longest: "
            f"{max(lengths)} tokens with its answer); shorten --ramoe-max-new-tokens, or drop those examples in every language"
        )
