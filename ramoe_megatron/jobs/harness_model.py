"""The model `ramoe` of lm-evaluation-harness: a Megatron checkpoint that runs over ranks."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ramoe_megatron.data.chat import render_chat, shown, tokenize, tokenize_rendered
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.harness_ranks import MODEL, Ranks

NEW_TOKENS = 256
"""Maximum number of generated tokens where a task gives none, as in lm-eval's hf model."""
WITHOUT_EFFECT = frozenset({"do_sample", "temperature", "top_p", "top_k", "min_p", "use_cache"})
"""Settings of a generation that do not change greedy decoding."""


@register_model(MODEL)
class RamoeLM(TemplateLM):
    """A Megatron checkpoint. Texts are tokenised and cut as by lm-eval's hf model."""

    started: ClassVar[Ranks | None] = None
    """The ranks that the job has started."""

    def __init__(self, ranks: Ranks) -> None:
        """Load the checkpoint, on every rank. On rank 0 only."""
        super().__init__()
        ranks.ask("load")
        self.ranks, self.tokenizer = ranks, ranks.tokenizer
        self.max_length = ranks.args.max_position_embeddings

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of the ranks that run. lm_eval's own arguments for a model are in the job's flags.

        Raises:
            RamoeError: no ranks run.
        """
        if cls.started is None:
            raise RamoeError(
                "lm-eval's model 'ramoe' needs its ranks: start it with "
                "`ramoe lm-eval --model_args checkpoint=DIR --tasks TASK`, not with `lm_eval`"
            )
        return cls(cls.started)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """As `create_from_arg_obj`."""
        return cls.create_from_arg_obj({}, additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the tokenizer's first token, else its end token."""
        first = getattr(self.tokenizer, "bos_id", None)
        return first if isinstance(first, int) and first >= 0 else self.eot_token_id

    @cached_property
    def _first(self) -> str:
        return shown(self.prefix_token_id, self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's path, for lm_eval's cache of requests."""
        return str(self.ranks.args.tokenizer_model).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. The tokenizer's first token is put before it, unless the text begins with it."""
        first = self._first
        if add_special_tokens is False or (add_special_tokens is None and first and string.startswith(first)):
            return tokenize_rendered(string, self.tokenizer)
        return tokenize(string, self.tokenizer, start=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences, cut = [], 0
        for asked, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise RamoeError(
                    f"lm-eval: a continuation has {len(continuation)} tokens, expected 1 to "
                    f"--max-position-embeddings {self.max_length}: {asked[1][:60] if asked else ''!r}"
                )
            ids = [*context, *continuation]
            kept = ids[-(self.max_length + 1) :]  # the last token is no input
            cut += len(kept) < len(ids)
            sequences.append((kept, len(kept) - len(continuation)))
        self._tell_cut(cut, len(requests))
        found: list[tuple[float, bool]] = self.ranks.ask("likelihoods", sequences)
        for (asked, _, _), answer in zip(requests, found, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's maximum length."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([(None, *window) for group in windows for window in group]))
        sums = [sum(next(scores)[0] for _ in group) for group in windows]
        for request, found in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first text that ends it.

        Raises:
            RamoeError: a task samples or searches with beams, or leaves no room for the context.
        """
        prompts, limits, ends, cut = [], [], [], 0
        end = shown(self.eot_token_id, self.tokenizer)
        for request in requests:
            text, asked = request.args
            settings = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
            self._refuse_sampling(settings, request.task_name)
            limit = settings["max_gen_toks"]
            if limit >= self.max_length:
                raise RamoeError(
                    f"lm-eval: {request.task_name} asks for {limit} new tokens, expected fewer than "
                    f"--max-position-embeddings {self.max_length}; give --gen_kwargs max_gen_toks=N"
                )
            ids = self.tok_encode(text) or [self.prefix_token_id]
            kept = ids[-(self.max_length - limit) :]
            cut += len(kept) < len(ids)
            prompts.append(kept)
            limits.append(limit)
            ends.append([stop for stop in handle_stop_sequences(settings["until"], eos=end) if stop])
        self._tell_cut(cut, len(requests))
        made: list[list[int]] = self.ranks.ask("continuations", prompts, limits, ends)
        texts = [
            postprocess_generated_text(self.tokenizer.detokenize(ids, skip_special_tokens=True), stop, None)
            for ids, stop in zip(made, ends, strict=True)
        ]
        for request, found in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, found)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's chat template writes it.

        Args:
            add_generation_prompt: whether the header of an answer follows. Otherwise the text ends with the
                content of the last message, which the model continues.
        """
        if not self.tokenizer.chat_template:
            raise RamoeError(
                "lm-eval: --apply_chat_template, but the tokenizer has no chat template; leave the flag out, "
                "or give --model_args chat_template=TEMPLATE"
            )
        text = render_chat(chat_history, self.tokenizer, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval records of the model."""
        return {"ramoe_checkpoint": self.ranks.args.load}

    def _refuse_sampling(self, settings: dict[str, Any], task: str | None) -> None:
        others = {
            name: value
            for name, value in settings.items()
            if name not in WITHOUT_EFFECT and name not in ("until", "max_gen_toks")
        }
        if settings["do_sample"] or others:
            found = others or {name: settings[name] for name in ("do_sample", "temperature")}
            raise RamoeError(
                f"lm-eval: {task} asks for {found}, but the model decodes greedily; "
                "give --gen_kwargs do_sample=False, or another task"
            )

    def _tell_cut(self, cut: int, total: int) -> None:
        if cut:
            print(
                f"ramoe: {cut} of {total} contexts do not fit into the model's maximum length of "
                f"{self.max_length} tokens and were cut on the left",
                flush=True,
            )
