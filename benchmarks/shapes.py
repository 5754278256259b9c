"""The measured models and batches, as Megatron's flags."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig


@dataclass(frozen=True)
class Variant:
    """One way to align, compared with stock Megatron."""

    name: str
    """The aligned layers and tokens, in words."""
    layers: str
    """Aligned layers, as `--ramoe-layers`."""
    tokens: str = "last"
    pooling: str = "sequence"

    @property
    def aligned(self) -> int:
        """Number of aligned layers."""
        first, last = map(int, self.layers.split("-"))
        return last - first + 1

    def config(self, folder: Path) -> RoutingAlignmentConfig:
        """The alignment with the files of `world.write_world`. Target: the example's English routing."""
        return RoutingAlignmentConfig(
            coeff=1.0,
            experts=str(folder / "experts.safetensors"),
            taxonomy=str(folder / "taxonomy.jsonl"),
            priors=str(folder / f"priors.{self.tokens}.safetensors"),
            target="example",
            layers=self.layers,
            tokens=self.tokens,  # type: ignore[arg-type]
            pooling=self.pooling,  # type: ignore[arg-type]
        )


HALF = Variant("half, last token", "1-2")


@dataclass(frozen=True)
class Shape:
    """A model and the micro-batch of one rank. A step is one micro-batch."""

    name: str
    hidden: int = 512
    heads: int = 8
    ffn: int = 128
    """Hidden size of one expert."""
    layers: int = 4
    experts: int = 64
    topk: int = 8
    sequence: int = 256
    """Tokens of a sample."""
    samples: int = 4
    bf16: bool = False
    variants: tuple[Variant, ...] = (HALF,)
    control: bool = True
    """Whether the control is measured too."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequence * self.samples

    def __str__(self) -> str:
        precision = "bfloat16" if self.bf16 else "float32"
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.experts} experts of {self.ffn}, "
            f"top-{self.topk}, {self.samples} x {self.sequence} tokens, {precision}"
        )


BASE = Shape(
    "base",
    variants=(
        HALF,
        Variant("half, prompt tokens", "1-2", "prompt"),
        Variant("half, prompt, by token", "1-2", "prompt", "token"),
        Variant("one, last token", "1-1"),
        Variant("all, last token", "0-3"),
    ),
)
TINY = replace(
    BASE, hidden=32, heads=2, ffn=32, experts=8, topk=2, sequence=32, samples=2, variants=BASE.variants[:3:2]
)
LARGE = replace(BASE, hidden=2048, heads=16, ffn=512, experts=128, sequence=2048, bf16=True)


def growth(base: Shape) -> tuple[Shape, ...]:
    """The shape, then four times the tokens, then fewer and more experts."""
    alone = replace(base, variants=(HALF,), control=False)
    return (
        base,
        replace(alone, name="tokens-x4", sequence=4 * base.sequence),
        replace(alone, name="experts-quarter", experts=base.experts // 4),
        replace(alone, name="experts-x4", experts=base.experts * 4),
    )


PRESETS: dict[str, tuple[Shape, ...]] = {
    "cpu": growth(BASE),
    "gpu": (LARGE,),
    "tiny": (TINY,),
}
"""`cpu` is the default. `gpu` needs a CUDA device with 80 GB. `tiny` is for the benchmark's test."""


@dataclass(frozen=True)
class Decoded:
    """Answers and choices of a converted model."""

    shape: Shape
    answers: int = 64
    tokens: int = 128
    """Tokens of an answer."""
    prompt: int = 64
    """Tokens of the longest prompt. A prompt with choices has twice as many."""
    growth: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens of an answer, for how the time grows."""
    batch_tokens: int = 16384

    def __str__(self) -> str:
        return f"{self.shape}; {self.answers} answers of {self.tokens} tokens"


DECODED = {
    "cpu": Decoded(Shape("decoding", hidden=256, layers=6, experts=32, topk=4, sequence=128)),
    "tiny": Decoded(replace(TINY, name="decoding"), answers=5, tokens=4, prompt=12, growth=(2, 4)),
}


def model_flags(shape: Shape, folder: Path) -> list[str]:
    """Megatron's flags for the model and its tokenizer."""
    flags = (
        f"--num-layers {shape.layers} --hidden-size {shape.hidden} --num-attention-heads {shape.heads} "
        f"--seq-length {shape.sequence} --max-position-embeddings {4 * shape.sequence} --num-experts "
        f"{shape.experts} --moe-router-topk {shape.topk} --moe-ffn-hidden-size {shape.ffn} --ffn-hidden-size "
        f"{shape.ffn} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff "
        "0.001 --moe-token-dispatcher-type alltoall --position-embedding-type rope --normalization RMSNorm "
        "--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --tokenizer-type "
        "SentencePieceTokenizer"
    ).split()
    precision = precision_flags(bf16=True) if shape.bf16 else []
    return [*flags, "--tokenizer-model", str(folder / "tokenizer.model"), *precision]


def precision_flags(bf16: bool) -> list[str]:
    """Flags of a CUDA device: the precision, and the layers that are installed."""
    flags = ["--bf16", "--moe-router-dtype", "fp32"] if bf16 else []
    if importlib.util.find_spec("transformer_engine"):
        return [*flags, "--transformer-impl", "transformer_engine", "--moe-grouped-gemm"]
    unfused = (
        "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion "
        "--no-persist-layer-norm"
    )
    return [*flags, "--transformer-impl", "local", *unfused.split()]


def training_flags(shape: Shape, folder: Path, ranks: int) -> list[str]:
    """Flags of the training steps. The tiny learning rate leaves weights and routing unchanged."""
    flags = (
        f"--micro-batch-size {shape.samples} --global-batch-size {shape.samples * ranks} --train-iters 1000 "
        "--lr 1e-12 --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --seed 7 --num-workers 0 "
        "--save-interval 1000 --no-save-optim --no-save-rng"
    ).split()
    return [
        *model_flags(shape, folder),
        *flags,
        "--save",
        str(folder / "base"),
        "--ramoe-data",
        str(folder / "parallel.jsonl"),
    ]


def profiling_flags(shape: Shape, folder: Path) -> list[str]:
    """Flags of forward passes over the checkpoint that the training benchmark of the shape saved."""
    own = [
        "--load",
        str(folder / "base"),
        "--ramoe-data",
        str(folder / "parallel.jsonl"),
        "--ramoe-output",
        str(folder),
    ]
    return [*model_flags(shape, folder), *own, "--ramoe-batch-tokens", str(4 * shape.tokens)]
