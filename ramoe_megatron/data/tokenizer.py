"""Training of a SentencePiece tokenizer. The bytes of the model depend only on the texts and the size."""

import io
from collections.abc import Iterable

from ramoe_megatron.errors import RamoeError

EOD_ID = 2


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, whole: Iterable[str] = (), apart: str = ""
) -> bytes:
    """A SentencePiece model as bytes, for Megatron's ``--tokenizer-type SentencePieceTokenizer``.

    The model has byte fallback and no normalisation, so detokenising returns the original text. The end of a
    document is ``</s>``, id 2.

    Args:
        texts: the training sentences.
        vocab_size: number of pieces.
        whole: words that should be one piece, such as codes. They are repeated in the training text.
        apart: characters that are always separate pieces, so that a code next to punctuation remains one
            piece.

    Raises:
        RamoeError: the vocabulary is too large or too small for the text.
    """
    import sentencepiece

    sentences = [text for text in texts if text]
    sentences += [" ".join([word] * 4) for word in whole for _ in range(len(sentences) // 100 + 8)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),  # no file name, because the model would store it
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
            num_threads=1,  # for the same order of work on every machine
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise RamoeError(
            f"tokenizer: vocab_size {vocab_size} does not fit the training text: {error}"
        ) from error
    return model.getvalue()
