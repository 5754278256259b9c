"""Scores examples with a forward-only model, by the log-likelihood of choices or by greedy decoding."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ramoe_megatron.data.answers import is_correct
from ramoe_megatron.data.encode import Encoded, decoding, encode_choices
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.launch import is_rank_0
from ramoe_megatron.mcore.offline.model import ContextMaker, MicroBatch, OfflineModel

OnProgress = Callable[[int], None]
ContextFor = Callable[[Sequence[int]], ContextMaker]
"""Makes the routing contexts of scored sequences, from the index of the example of each sequence."""

OnAnswer = Callable[[int, "list[float] | str"], None]
"""Receives the index of an example, and the log-likelihood of each choice or the generated text."""

NOT_FINITE = -1
"""Stands for a token id when the logits have NaN or infinity."""


def score(
    model: OfflineModel,
    examples: Sequence[Example],
    limits: Sequence[int],
    context_for: ContextFor | None = None,
    progress: OnProgress | None = None,
    answered: OnAnswer | None = None,
) -> list[bool]:
    """Whether the model answers each example correctly, on every rank.

    With choices, the answer is correct if the gold choice as response has a higher log-likelihood (sum over
    its tokens and the end token) than every other choice. A tie is wrong, because the model does not prefer
    the gold choice; rank 0 prints the number of ties. Without choices, the answer is correct if the greedy
    continuation of the prompt ends within the limit and equals the gold answer after normalising
    (`data.answers`). An answer that the limit cuts is wrong, because its end is unknown.

    Args:
        limits: maximum new tokens of each example, from `data.answers.new_token_limits`, which rejects
            examples that cannot be scored.
        answered: called once for each example, with what the decision is made from.

    Raises:
        RamoeError: on every rank, if logits are not finite. The message counts the examples and names five.
    """
    correct, broken, ties = [False] * len(examples), set[int](), 0
    with_choices = [place for place, example in enumerate(examples) if example.choices]
    generated = [place for place, example in enumerate(examples) if not example.choices]
    if with_choices:
        encoded, owner = [], []
        for place in with_choices:
            choices = encode_choices(examples[place], model.tokenizer)
            encoded += choices
            owner += [place] * len(choices)
        likelihood = log_likelihoods(
            model, encoded, context_for(owner) if context_for else None, progress
        ).tolist()
        start = 0
        for place in with_choices:
            options = examples[place].choices or ()
            scores = likelihood[start : start + len(options)]
            if answered:
                answered(place, list(scores))
            gold = scores.pop(options.index(examples[place].answer))
            if not all(map(math.isfinite, [gold, *scores])):
                broken.add(place)
            correct[place], ties = gold > max(scores), ties + (gold == max(scores))
            start += len(options)
    if generated:
        asked = [decoding(examples[place], model.tokenizer) for place in generated]
        prompts, stops = [each.prompt for each in asked], [each.stops for each in asked]
        context = context_for(generated) if context_for else None
        answers = greedy(model, prompts, [limits[place] for place in generated], context, progress, stops)
        for place, each, ids in zip(generated, asked, answers, strict=True):
            if NOT_FINITE in ids:
                broken.add(place)
                continue
            example, text = examples[place], each.answer(ids, model.tokenizer)
            if answered:
                answered(place, text)
            if len(ids) < limits[place]:  # its end was generated, and is left out
                correct[place] = is_correct(text, example.answer, example.language)
    if broken:
        names = [f"{examples[place].id} ({examples[place].language})" for place in sorted(broken)]
        raise RamoeError(
            f"the model's logits hold NaN or infinity in {len(names)} of {len(examples)} examples: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. "
            "Its weights are not finite, or overflow in this precision: "
            "load an earlier checkpoint, or use --bf16 instead of --fp16."
        )
    if ties and is_rank_0():
        print(
            f"ramoe: {ties} of {len(with_choices)} examples counted wrong: "
            "another choice is as likely as the gold one",
            flush=True,
        )
    return correct


def log_likelihoods(
    model: OfflineModel,
    encoded: Sequence[Encoded],
    context: ContextMaker | None = None,
    progress: OnProgress | None = None,
) -> Tensor:
    """Natural log-likelihood of each response and its end token, given its prompt. [N], float64, on every
    rank

    The softmax is over the tokenizer's vocabulary, without the rows that pad it, because their values depend
    on the layout. NaN if a logit is not finite.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    scores = torch.zeros(len(encoded), dtype=torch.float64, device=model.device)

    def read(micro: MicroBatch, logits: Tensor) -> None:
        # Only the response's positions: a softmax over the vocabulary at every prompt token costs more than
        # the model.
        row, column = micro.batch["loss_mask"].nonzero(as_tuple=True)
        whole = gather_from_tensor_model_parallel_region(logits[row, column])
        if model.reports:
            label = micro.batch["labels"][row, column].unsqueeze(1)
            logits_RV = _of_vocabulary(model, whole)
            terms = logits_RV.log_softmax(dim=-1).gather(1, label).squeeze(1).double()
            sums = torch.zeros(len(logits), dtype=torch.float64, device=model.device).index_add_(
                0, row, terms
            )
            scores[micro.places[micro.real]] = sums[micro.real]

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
    progress: OnProgress | None = None,
    stops: Sequence[Collection[int]] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to its first stop token, on every rank.

    The stop token is left out. If a logit is not finite, the continuation ends in `NOT_FINITE`. Each step
    runs the whole sequence again, which is correct in every layout, and fast for short answers.

    Args:
        max_new_tokens: the limit of all prompts, or a limit for each prompt.
        stops: for each prompt, the tokens that end its continuation; by default the tokenizer's end of
            document.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    lengths = [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)]
    ends = [frozenset(stop) for stop in stops] if stops else [frozenset([model.tokenizer.eod])] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    for group in model.groups(lengths):
        unfinished = [place for place in group if most[place] > 0]
        while unfinished:
            # one more id than the input: the last id is only a label
            current = [
                Encoded([*prompts[p], *answers[p], model.tokenizer.eod], len(prompts[p])) for p in unfinished
            ]
            tokens = _next_tokens(model, current, unfinished, context)
            for place, token in zip(unfinished, tokens, strict=True):
                answers[place].append(token)
            unfinished = [
                p
                for p in unfinished
                if answers[p][-1] not in {*ends[p], NOT_FINITE} and len(answers[p]) < most[p]
            ]
        if progress:
            progress(len(group))
    return [
        answer[:-1] if answer and answer[-1] in end else answer
        for answer, end in zip(answers, ends, strict=True)
    ]


def _next_tokens(
    model: OfflineModel, sequences: Sequence[Encoded], owners: Sequence[int], context: ContextMaker | None
) -> list[int]:
    """The most likely next token of each sequence; the lowest id if several are equally likely."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens = torch.zeros(len(sequences), dtype=torch.int64, device=model.device)
    owner = torch.tensor(owners, device=model.device)

    def read(micro: MicroBatch, logits: Tensor) -> None:
        rows = torch.arange(len(logits), device=logits.device)
        last = gather_from_tensor_model_parallel_region(logits[rows, micro.batch["length"] - 1])
        if model.reports:
            logits_BV = _of_vocabulary(model, last)
            best = torch.where(logits_BV.isnan().any(dim=-1), NOT_FINITE, logits_BV.argmax(dim=-1))
            tokens[micro.places[micro.real]] = best[micro.real]

    def with_owner(micro: MicroBatch) -> object:
        # contexts need indices into the job's input, not into the unfinished sequences
        places = torch.where(micro.real, owner[micro.places.clamp(min=0)], micro.places)
        return context(MicroBatch(micro.batch, places)) if context else None

    for part in model.groups([len(sequence.ids) for sequence in sequences]):
        model.run(sequences, part, read, context=with_owner if context else None)  # type: ignore[arg-type]
    return model.share(tokens).tolist()


def _of_vocabulary(model: OfflineModel, logits: Tensor) -> Tensor:
    """Logits of the tokenizer's tokens, without the rows that pad the vocabulary. [..., V], float32

    A row with a logit that is not finite becomes NaN.
    """
    own = logits[..., : model.vocabulary].float()
    return own.masked_fill(~own.isfinite().all(dim=-1, keepdim=True), torch.nan)
