"""Training a SentencePiece tokenizer whose bytes depend on the texts and the size alone."""

import io
from collections.abc import Iterable

from ramoe_megatron.errors import RamoeError

EOD_ID = 2


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, whole: Iterable[str] = (), apart: str = ""
) -> bytes:
    """A SentencePiece model with byte fallback, as bytes, for Megatron's `--tokenizer-type SentencePieceTokenizer`.

    Text is kept as it is (no normalisation), so that detokenising gives it back. End of document is `</s>`, id 2.

    Args:
        texts: the training text, one sentence each.
        whole: words that should be one piece each when they stand alone (codes); they are repeated in the text.
        apart: characters that are always a piece of their own, so that a code keeps its piece beside punctuation.

    Raises:
        RamoeError: when the text cannot fill (or does not fit) the vocabulary.
    """
    import sentencepiece

    sentences = [text for text in texts if text]
    sentences += [" ".join([word] * 4) for word in whole for _ in range(len(sentences) // 100 + 8)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                sentences
            ),  # an iterator and a writer: file names would be stored in the model
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=EOD_ID,
            pad_id=3,
            user_defined_symbols=list(apart),
            num_threads=1,  # the order of the work is then the same everywhere
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise RamoeError(
            f"tokenizer: vocab_size {vocab_size} does not fit the training text: {error}"
        ) from error
    return model.getvalue()
