"""Data and artefacts of a shape's size, in the formats of the library: random content in real files.

Shape suffixes: N examples, G tasks, L MoE layers, E experts.
"""

import random
from pathlib import Path

import torch

from benchmarks.shapes import Shape
from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.artifacts.tensors import TOKENS, ModelShape
from ramoe_megatron.data.encode import Encoded, Tokenizer, encode
from ramoe_megatron.data.parallel import Example, write_rows
from ramoe_megatron.data.tokenizer import train_tokenizer
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import Zone

LETTERS = "".join(chr(0x4E00 + number) for number in range(256))
VOCABULARY = 4 + 256 + 1 + len(LETTERS)
"""Special pieces, bytes, the space and the letters. Each letter is one token."""
TASKS = ("even", "odd")
EXAMPLES = 64


def write_world(folder: Path, shape: Shape, examples: int = EXAMPLES, score: str = "softmax") -> None:
    """Write a tokenizer, parallel examples that nearly fill a sequence, and the files of stages 1 and 2.

    Three quarters of an example are its prompt.

    Args:
        examples: number of them in each of two languages.
        score: the routers' score function.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    torch.manual_seed(0)
    texts = ["".join(generator.sample(LETTERS, len(LETTERS))) for _ in range(8)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, VOCABULARY, apart=LETTERS))

    rows, taxonomy = [], []
    for number in range(examples):
        task = TASKS[number % 2]
        for language in ("en", "xx"):
            prompt, response = (
                text(generator, shape.sequence * 3 // 4 - 2),
                text(generator, shape.sequence // 4 - 4),
            )
            fields = {"id": f"{task}/{number}", "language": language, "task": task, "split": "train"}
            rows.append(fields | {"prompt": prompt, "response": response, "answer": response})
        taxonomy.append(TaxonomyRow(f"{task}/{number}", task, "xx", "train", True, number % 4 >= 2))
    (folder / "parallel.jsonl").write_text(write_rows(rows), encoding="utf-8")
    write_taxonomy(folder / "taxonomy.jsonl", taxonomy)

    model = ModelShape(shape.layers, shape.experts, shape.topk, score, shape.hidden)
    size_GLE = (len(TASKS), shape.layers, shape.experts)
    delta_GLE = torch.rand(size_GLE) - 0.5
    mask_GLE = torch.zeros(size_GLE).scatter(-1, delta_GLE.topk(shape.topk).indices, 1.0).bool()
    frequency_GLE = torch.full(size_GLE, shape.topk / shape.experts)
    ExpertFile(
        tasks=TASKS,
        shape=model,
        expert_mask=mask_GLE,
        delta=delta_GLE,
        task_frequency=frequency_GLE,
        general_frequency=frequency_GLE[0],
        english_pattern={tokens: torch.randn(size_GLE).softmax(-1) for tokens in TOKENS},
        layer_number=torch.arange(1, shape.layers + 1),
        rule={"name": "top-m", "m": shape.topk},
        zone=Zone(0, shape.layers - 1, "given", "benchmark"),
        checkpoint="benchmark",
    ).save(folder / "experts.safetensors")
    ids = [row.id for row in taxonomy]
    for tokens in TOKENS:
        priors_NLE = torch.randn(len(ids), shape.layers, shape.experts).softmax(-1)
        Priors.save(
            folder / f"priors.{tokens}.safetensors",
            ids,
            priors_NLE,
            tokens=tokens,
            shape=model,
            checkpoint="benchmark",
        )


def text(generator: random.Random, tokens: int) -> str:
    """A text of `tokens` letters minus up to an eighth, so that samples differ in length."""
    return "".join(generator.choices(LETTERS, k=tokens - generator.randint(0, tokens // 8)))


def sequences(tokenizer: Tokenizer, count: int, tokens: int) -> list[Encoded]:
    """Encoded examples of about `tokens` tokens, for forward passes."""
    generator, found = random.Random(1), []
    for number in range(count):
        prompt, response = text(generator, tokens * 3 // 4 - 2), text(generator, tokens // 4 - 4)
        example = Example(str(number), "en", TASKS[number % 2], prompt, response, response, None, "train")
        found.append(encode(example, tokenizer))
    return found
