"""The limit of new tokens of each answer, and the examples that no model can answer correctly.

Such examples are found before any forward pass.
"""

from collections import Counter
from collections.abc import Sequence

from ramoe_megatron.data.answers import normalise_answer
from ramoe_megatron.data.encode import (
    Tokenizer,
    decoding,
    encode,
    encode_answer,
    encode_choices,
    longest_input,
)
from ramoe_megatron.data.grading import grade, ungradable
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError

NEW_TOKENS = 16  # room for an answer with more tokens than the gold answer


def new_token_limits(
    examples: Sequence[Example], tokenizer: Tokenizer, given: int | None, positions: int
) -> list[int]:
    """The maximum number of generated tokens of each example. Checks that every example can be answered.

    The limit is ``given``. Without ``given``, the limit is `NEW_TOKENS`, or more when the longest gold answer
    and its end token need more. The limit of an example is lower when ``positions`` leaves less room, and 0
    for an example with choices, which needs no generation.

    Args:
        examples: the examples to answer.
        tokenizer: the tokenizer of the model.
        given: value of --ramoe-max-new-tokens, or None.
        positions: value of --max-position-embeddings.

    Raises:
        RamoeError: no model can answer some examples correctly. The message counts them by reason and
            language. The reasons are an empty prompt, a gold answer that is not among the choices, a repeated
            choice, a gold answer without text, a gold answer that the tokenizer cannot write, a gold answer
            longer than the limit, a sequence longer than ``positions``, and an answer that its metric cannot
            grade.
    """
    faults: dict[str, list[Example]] = {}
    room, needed = [0] * len(examples), [0] * len(examples)
    longest = 0
    for place, example in enumerate(examples):
        if example.choices:
            encoded = encode_choices(example, tokenizer)
        else:
            encoded = [encode_answer(example, tokenizer)]
            if example.metric == "number":  # a response that works the answer out needs room for all of it
                encoded += [encode(example, tokenizer)]
            elif example.metric == "ifeval":
                encoded = [encode(example, tokenizer)]
                if given is None:
                    faults.setdefault(_NO_GOLD, []).append(example)
        prompt = encoded[0].prompt_length
        if fault := _fault(example, tokenizer, [tuple(e.ids[prompt:]) for e in encoded], prompt):
            faults.setdefault(fault, []).append(example)
        elif longest_input(encoded) > positions:
            longest = max(longest, longest_input(encoded))
            faults.setdefault(_TOO_LONG, []).append(example)
        elif not example.choices:
            needed[place] = max(len(e.ids) for e in encoded) - prompt
            room[place] = positions + 1 - prompt  # the last token is never an input
    most = given or max([NEW_TOKENS, *needed])
    if short := [example for example, tokens in zip(examples, needed, strict=True) if tokens > most]:
        faults[_CUT] = short
    if faults:
        values = {"longest": longest, "positions": positions, "most": most, "needed": max(needed)}
        reasons = "; ".join(
            f"{_by_language(wrong)}: {fault.format(**values)}" for fault, wrong in faults.items()
        )
        count = sum(map(len, faults.values()))
        raise RamoeError(
            f"{count} of {len(examples)} examples can never be answered right. {reasons}. "
            "Correct the rows, or drop their ids in every language."
        )
    return [min(most, tokens) for tokens in room]


_NO_GOLD = "an instruction has no gold answer whose length could be the limit: give --ramoe-max-new-tokens"
_TOO_LONG = "prompt and answer take up to {longest} tokens, more than --max-position-embeddings {positions}"
_CUT = (
    "the gold answer and its end token take up to {needed} tokens, more than --ramoe-max-new-tokens {most} "
    "(give {needed} or more, or leave the flag out)"
)


def _fault(
    example: Example, tokenizer: Tokenizer, answers: Sequence[tuple[int, ...]], prompt: int
) -> str | None:
    """Why no model can answer an example correctly, apart from limits of length; None if a model can.

    Args:
        example: the example.
        tokenizer: the tokenizer of the model.
        answers: token ids of the choices, or of the gold answer; each with the end token.
        prompt: number of prompt tokens.
    """
    if prompt == 0:
        return "the prompt has no token, so nothing predicts the answer's first token"
    if example.choices:
        if example.answer not in example.choices:
            return "the gold answer is none of the choices"
        return "two choices are the same tokens" if len(set(answers)) < len(answers) else None
    if example.metric == "ifeval":
        return ungradable(example)
    if not normalise_answer(example.answer, example.language):
        return "the gold answer has no text"
    if any(string in example.answer for string in example.stop or ()):
        return "the gold answer has a stop string in it"
    if fault := ungradable(example):
        return fault
    written = decoding(example, tokenizer).answer(list(answers[0][:-1]), tokenizer)
    return None if grade(example, written) else "the tokenizer cannot write the gold answer"


def _by_language(examples: Sequence[Example]) -> str:
    counts = ", ".join(
        f"{count} in {language}" for language, count in sorted(Counter(e.language for e in examples).items())
    )
    ids = ", ".join(dict.fromkeys(example.id for example in examples[:3]))
    return f"{counts} (ids {ids}{', ...' if len(examples) > 3 else ''})"
