"""Scores examples with a forward-only model, by the log-likelihood of choices or by greedy decoding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ramoe_megatron.data.encode import Encoded, choice_scores, decoding, encode_choices
from ramoe_megatron.data.grading import grade
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.carrier import RoutingContext
from ramoe_megatron.mcore.launch import is_rank_0
from ramoe_megatron.mcore.offline.generation import NOT_FINITE, OnProgress, greedy, of_vocabulary
from ramoe_megatron.mcore.offline.model import ContextMaker, MicroBatch, OfflineModel
from ramoe_megatron.mcore.offline.rows import Branches

ContextFor = Callable[[Sequence[int]], ContextMaker]
"""Makes the routing contexts of scored sequences, from the index of the example of each sequence."""

OnAnswer = Callable[[int, "list[float] | str"], None]
"""Receives the index of an example, and the log-likelihood of each choice or the generated text."""


def score(
    model: OfflineModel,
    examples: Sequence[Example],
    limits: Sequence[int],
    context_for: ContextFor | None = None,
    progress: OnProgress | None = None,
    answered: OnAnswer | None = None,
) -> list[bool]:
    """Whether the model answers each example correctly, on every rank.

    With choices, the answer is correct if the gold choice as response has a higher score than every other
    choice. The score is the log-likelihood of its tokens and the end token, as `Example.choice_score` says. A
    tie is wrong, because the model does not prefer the gold choice; rank 0 prints the number of ties. Without
    choices, the answer is correct if the greedy continuation of the prompt ends within the limit, by an end
    token or a stop string, and equals the gold answer after normalising (`data.answers`). An answer that the
    limit cuts is wrong, because its end is unknown.

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
        context = context_for(owner) if context_for else None
        likelihood = log_likelihoods(model, encoded, context, progress, owner).tolist()
        start = 0
        for place in with_choices:
            options = examples[place].choices or ()
            these = slice(start, start + len(options))
            if answered:
                answered(place, likelihood[these])
            scores = choice_scores(examples[place], encoded[these], likelihood[these])
            gold = scores.pop(options.index(examples[place].answer))
            if not all(map(math.isfinite, [gold, *scores])):
                broken.add(place)
            correct[place], ties = gold > max(scores), ties + (gold == max(scores))
            start += len(options)
    if generated:
        asked = [decoding(examples[place], model.tokenizer) for place in generated]
        answers = greedy(
            model,
            [each.prompt for each in asked],
            [limits[place] for place in generated],
            context_for(generated) if context_for else None,
            progress,
            [each.stops for each in asked],
            [each.until for each in asked],
        )
        for place, each, ids in zip(generated, asked, answers, strict=True):
            if NOT_FINITE in ids:
                broken.add(place)
                continue
            text = each.answer(ids, model.tokenizer)
            if answered:
                answered(place, text)
            # an end token is left out
            if len(ids) < limits[place] or each.stopped(ids, model.tokenizer):
                correct[place] = grade(examples[place], text)
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
    owners: Sequence[int] | None = None,
) -> Tensor:
    """Natural log-likelihood of each sequence's tokens after its prompt. [N], float64, on every rank

    The softmax is over the tokenizer's vocabulary, without the rows that pad it, because their values depend
    on the layout. NaN if a logit is not finite. Sequences with the same prompt follow it as branches, in one
    forward pass, if their routing contexts are the same.

    Args:
        context: makes routing contexts. The place of several branches in a `MicroBatch` is that of the first.
        owners: sequences of the same owner have the same routing context. Default: each its own, or without
            contexts all the same.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    if owners is None:
        owners = range(len(encoded)) if context else [0] * len(encoded)
    families = _families(model, encoded, owners)
    scores = torch.zeros(len(encoded), dtype=torch.float64, device=model.device)

    def read(micro: MicroBatch, logits: Tensor) -> None:
        # Only the branches' positions: a softmax over the vocabulary at every prompt token costs more than
        # the model.
        scored = [
            (row, *label)
            for row, place in enumerate(micro.places.tolist())
            if place >= 0
            for label in labels[place]
        ]
        table = torch.tensor(scored, dtype=torch.int64, device=model.device).view(-1, 4)
        row, column, label, sequence = table.unbind(1)
        whole = gather_from_tensor_model_parallel_region(logits[row, column])
        if model.reports:
            logits_RV = of_vocabulary(model, whole)
            terms = logits_RV.log_softmax(dim=-1).gather(1, label[:, None]).squeeze(1).double()
            scores.index_add_(0, sequence, terms)

    def owned(micro: MicroBatch) -> RoutingContext | None:
        assert context is not None
        first = torch.tensor([family[0] for family in families], device=model.device)
        places = torch.where(micro.real, first[micro.places.clamp(min=0)], micro.places)
        return context(replace(micro, places=places))

    lengths = [_tokens([encoded[place] for place in family]) for family in families]
    # one more, as for sequences whose last id is only a label
    for group in model.groups([length + 1 for length in lengths]):
        length, own = model.padded(max(lengths[family] for family in group)), model.own_places(group)
        samples, labels = {}, {}
        for family in sorted({group[0], *chain.from_iterable(own)} - {-1}):
            branches = families[family]
            samples[family], labels[family] = _branched(encoded, branches, length, model.tokenizer.eod)
        batches = [model.micro_batch(samples, places) for places in own]
        if any(len(families[family]) > 1 for family in group):
            batches = [
                replace(micro, rows=Branches(micro.batch["position_ids"], micro.batch["branch"]))
                for micro in batches
            ]
        model.forward(batches, read, owned if context else None)
        if progress:
            progress(sum(len(families[family]) for family in group))
    return model.share(scores)


def _families(model: OfflineModel, encoded: Sequence[Encoded], owners: Sequence[int]) -> list[list[int]]:
    """The sequences by prompt and owner, in families no larger than a micro-batch and the positions."""
    if not model.has_rows:
        return [[place] for place in range(len(encoded))]
    most = min(model.batch_tokens, model.args.max_position_embeddings)
    families: list[list[int]] = []
    newest: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for place, (sequence, owner) in enumerate(zip(encoded, owners, strict=True)):
        key = owner, tuple(sequence.ids[: sequence.prompt_length])
        family = newest.get(key)
        fits = family and _tokens([encoded[other] for other in [*family, place]]) <= most
        if family and fits and sequence.prompt_length:
            family.append(place)
        else:
            newest[key] = [place]
            families.append(newest[key])
    return families


def _tokens(branches: Sequence[Encoded]) -> int:
    """Number of input tokens of a prompt and its branches. The last token of a branch is no input."""
    prompt = branches[0].prompt_length
    return prompt + sum(len(branch.ids) - prompt - 1 for branch in branches)


def _branched(
    encoded: Sequence[Encoded], branches: Sequence[int], length: int, eod: int
) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
    """A padded prompt with its branches, and (column, label, sequence) of each scored token."""
    prompt = encoded[branches[0]].prompt_length
    ids, position, branch = list(encoded[branches[0]].ids[:prompt]), list(range(prompt)), [0] * prompt
    labels = []
    for number, place in enumerate(branches, 1):
        own, start = encoded[place].ids, len(ids)
        ids += own[prompt:-1]
        position += range(prompt, len(own) - 1)
        branch += [number if len(branches) > 1 else 0] * (len(ids) - start)
        # the last prompt token predicts the first token of every branch
        columns = [*range(max(prompt, 1) - 1, prompt), *range(start, len(ids))]
        labels += [(*label, place) for label in zip(columns, own[max(prompt, 1) :], strict=True)]
    tokens, filler = len(ids), length - len(ids)
    sample = {
        "tokens": torch.tensor(ids + [eod] * filler),
        "position_ids": torch.tensor(position + [0] * filler),
        "branch": torch.tensor(branch + [len(branches) if len(branches) > 1 else 0] * filler),
        "prompt_length": torch.tensor(prompt),
        "length": torch.tensor(tokens),
    }
    return sample, labels
