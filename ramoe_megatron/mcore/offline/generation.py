"""Greedy decoding with a forward-only model, with a key/value cache, in every layout.

The prompts of a group run once. Then each step runs the new token of each sequence. All data-parallel ranks
run the same steps, because expert parallelism needs this. A rank whose sequences have ended runs fillers.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ramoe_megatron.data.dataset import pad
from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.data.stops import StopStrings
from ramoe_megatron.mcore.offline.model import ContextMaker, MicroBatch, OfflineModel
from ramoe_megatron.mcore.offline.rows import RowCache

OnProgress = Callable[[int], None]

NOT_FINITE = -1
"""Stands for a token id when the logits have NaN or infinity."""
CROWDED = 0.75
"""Rows leave a micro-batch when at most this share of them is unfinished: moving a cache takes time too."""


def greedy(
    model: OfflineModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    context: ContextMaker | None = None,
    progress: OnProgress | None = None,
    stops: Sequence[Collection[int]] | None = None,
    until: Sequence[StopStrings | None] | None = None,
    cached: bool = True,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to its first stop token or stop string, on every rank.

    A stop token is left out. The token that completes a stop string is kept (`StopStrings.before`). If a
    logit is not finite, the continuation ends in `NOT_FINITE`.

    Args:
        max_new_tokens: the limit of all prompts, or a limit for each prompt.
        context: makes routing contexts. With the cache, a context sees the whole prompt in one forward pass,
            and then each new token in a pass of its own (`MicroBatch`).
        stops: for each prompt, the tokens that end its continuation; by default the tokenizer's end of
            document.
        until: for each prompt, the strings that end its continuation.
        cached: False for a context that must see whole sequences. Each step then runs the whole sequence.
            So does each step of a model without `OfflineModel.has_rows`.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    lengths = [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)]
    answers = _Answers(model, prompts, most, stops, until)
    decode = _with_cache if cached and model.has_rows else _without_cache
    for group in model.groups(lengths):
        decode(model, answers, group, context)
        if progress:
            progress(len(group))
    return answers.without_stops()


class _Answers:
    """The continuations so far, and which of them have ended. The same on every rank."""

    def __init__(
        self,
        model: OfflineModel,
        prompts: Sequence[Sequence[int]],
        most: Sequence[int],
        stops: Sequence[Collection[int]] | None,
        until: Sequence[StopStrings | None] | None,
    ) -> None:
        ends = stops or [[model.tokenizer.eod]] * len(prompts)
        self.prompts, self.most = prompts, most
        self.ends = [frozenset([*end, NOT_FINITE]) for end in ends]
        self.watches = [strings.watch(model.tokenizer) if strings else None for strings in until or ()]
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.ended = [new < 1 for new in most]

    def __getitem__(self, place: int) -> list[int]:
        """The prompt and its continuation."""
        return [*self.prompts[place], *self.ids[place]]

    def length(self, place: int) -> int:
        """Number of tokens of the prompt and its continuation so far."""
        return len(self.prompts[place]) + len(self.ids[place])

    def room(self, place: int) -> int:
        """Largest number of tokens of the prompt and its continuation that are inputs. The last is none."""
        return len(self.prompts[place]) + self.most[place] - 1

    def add(self, place: int, token: int) -> None:
        """Append a token."""
        ids = self.ids[place]
        ids.append(token)
        ended = token in self.ends[place] or len(ids) >= self.most[place]
        if not ended and self.watches and (watch := self.watches[place]):
            ended = watch(token)
        self.ended[place] = ended

    def unfinished(self, places: Sequence[int]) -> list[int]:
        """Those of the places whose continuation has not ended."""
        return [place for place in places if place >= 0 and not self.ended[place]]

    def without_stops(self) -> list[list[int]]:
        """The continuations without the stop tokens."""
        return [
            ids[:-1] if ids and ids[-1] in end and ids[-1] != NOT_FINITE else ids
            for ids, end in zip(self.ids, self.ends, strict=True)
        ]


def _without_cache(
    model: OfflineModel, answers: _Answers, group: Sequence[int], context: ContextMaker | None
) -> None:
    while unfinished := answers.unfinished(group):
        # one more id than the input: the last id is only a label
        current = [
            Encoded([*answers[place], model.tokenizer.eod], len(answers.prompts[place]))
            for place in unfinished
        ]
        owner = torch.tensor(unfinished, device=model.device)

        def with_owner(micro: MicroBatch, owner: Tensor = owner) -> object:
            # contexts need indices into the job's input, not into the unfinished sequences
            places = torch.where(micro.real, owner[micro.places.clamp(min=0)], micro.places)
            return context(MicroBatch(micro.batch, places)) if context else None

        step = _Step(model, len(current))
        for part in model.groups([len(sequence.ids) for sequence in current]):
            model.run(current, part, step.read, context=with_owner if context else None)  # type: ignore[arg-type]
        for place, token in zip(unfinished, step.tokens(range(len(current))), strict=True):
            answers.add(place, token)


def _with_cache(
    model: OfflineModel, answers: _Answers, group: Sequence[int], context: ContextMaker | None
) -> None:
    group = answers.unfinished(group)
    if not group:
        return
    ranks, own = list(chain.from_iterable(model.all_places(group))), model.own_places(group)
    length = model.padded(max(len(answers.prompts[place]) for place in group))
    room = max(length, *(answers.room(place) for place in group))
    caches = [RowCache(len(places), room) for places in own]
    batches = _whole_prompts(model, answers, own, caches, length)
    while True:
        step = _Step(model, len(answers.ids))
        model.forward(batches, step.read, context)
        for place, token in zip(group, step.tokens(group), strict=True):
            answers.add(place, token)
        group = answers.unfinished(group)
        if not group:
            return
        own = [[-1 if answers.ended[place] else place for place in places] for places in own]
        rows = max(len(answers.unfinished(places)) for places in ranks)
        if rows <= CROWDED * len(own[0]):
            own = [_kept(cache, places, rows, model) for cache, places in zip(caches, own, strict=True)]
        batches = [_new_tokens(model, answers, *each) for each in zip(own, caches, strict=True)]


def _whole_prompts(
    model: OfflineModel,
    answers: _Answers,
    own: Sequence[Sequence[int]],
    caches: Sequence[RowCache],
    length: int,
) -> list[MicroBatch]:
    """This rank's micro-batches of prompts, padded to a length, one for each cache."""
    eod = model.tokenizer.eod
    samples = {-1: pad(Encoded([eod, eod], 1), length, eod)}
    for place in {*chain.from_iterable(own)} - {-1}:
        prompt = answers.prompts[place]
        samples[place] = pad(Encoded([*prompt, eod], len(prompt)), length, eod)
    batches = [model.micro_batch(samples, places) for places in own]
    for cache in caches:
        cache.prompts(length, model.device)
    return [replace(micro, rows=cache) for micro, cache in zip(batches, caches, strict=True)]


def _kept(cache: RowCache, places: Sequence[int], rows: int, model: OfflineModel) -> list[int]:
    """The unfinished places, filled up to `rows`. The cache then has these rows."""
    kept = [row for row, place in enumerate(places) if place >= 0]
    filler = rows - len(kept)
    cache.keep(torch.tensor(kept + [0] * filler, device=model.device))
    return [places[row] for row in kept] + [-1] * filler


def _new_tokens(model: OfflineModel, answers: _Answers, places: Sequence[int], cache: RowCache) -> MicroBatch:
    """The micro-batch of the newest token of each place, which the cache does not have yet."""
    eod = model.tokenizer.eod
    token_B = torch.tensor([answers.ids[place][-1] if place >= 0 else eod for place in places])
    position_B = torch.tensor([answers.length(place) - 1 if place >= 0 else 0 for place in places])
    # Sequence parallelism needs a token for each rank.
    tokens = model.tp if model.config.sequence_parallel else 1
    ids_BS = torch.full((len(places), tokens), eod)
    ids_BS[:, 0] = token_B
    last = int(position_B.max())
    position_B = position_B.to(model.device)
    cache.step(position_B, last, tokens)
    batch = {
        "tokens": ids_BS.to(model.device),
        "position_ids": position_B[:, None].repeat(1, tokens),
        "prompt_length": torch.zeros_like(position_B),
        "length": torch.ones_like(position_B),
    }
    return MicroBatch(batch, torch.tensor(places, device=model.device), cache)


class _Step:
    """Reads the most likely next token of each sequence; the lowest id if several are equally likely."""

    def __init__(self, model: OfflineModel, sequences: int) -> None:
        self.model = model
        self._tokens = torch.zeros(sequences, dtype=torch.int64, device=model.device)

    def read(self, micro: MicroBatch, logits: Tensor) -> None:
        """Read the logits after each sequence's last token."""
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        rows = torch.arange(len(logits), device=logits.device)
        last = gather_from_tensor_model_parallel_region(logits[rows, micro.batch["length"] - 1])
        if self.model.reports:
            logits_BV = of_vocabulary(self.model, last)
            best = torch.where(logits_BV.isnan().any(dim=-1), NOT_FINITE, logits_BV.argmax(dim=-1))
            self._tokens[micro.places[micro.real]] = best[micro.real]

    def tokens(self, places: Sequence[int]) -> list[int]:
        """The tokens of some sequences, on every rank."""
        shared = self.model.share(self._tokens)
        return shared[torch.tensor(places, device=shared.device)].tolist()


def of_vocabulary(model: OfflineModel, logits: Tensor) -> Tensor:
    """Logits of the tokenizer's tokens, without the rows that pad the vocabulary. [..., V], float32

    A row with a logit that is not finite becomes NaN.
    """
    own = logits[..., : model.vocabulary].float()
    return own.masked_fill(~own.isfinite().all(dim=-1, keepdim=True), torch.nan)
