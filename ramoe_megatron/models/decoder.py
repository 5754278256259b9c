"""What the families share: a decoder's numbers, its Megatron flags, and its tensors on both sides.

A family is a `Family`: the architecture's name in config.json, its numbers and flags, and the names of its
tensors. Megatron's names are those of a GPTModel's checkpoint in the torch_dist format. It holds one key for
all layers if they are alike (`decoder.layers.mlp.router.weight` [L, E, H]), and one key a layer otherwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ramoe_megatron.models.operations import Copy, GateUp, Operation, QueryKeyValue, Shape

COPY = Copy()
Flags = dict[str, Any]
"""Megatron's flags without the dashes. True is a bare flag."""


@dataclass(frozen=True, slots=True)
class Part:
    """A Hugging Face tensor, or its slice at leading indices."""

    name: str
    index: Shape = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a Megatron tensor and the Hugging Face tensors that it is made of."""

    key: str
    place: Shape
    """Leading indices in the Megatron tensor: layer, expert."""
    shape: Shape
    """Shape at that place."""
    parts: tuple[Part, ...]
    operation: Operation = COPY


@dataclass(frozen=True)
class Numbers:
    """The sizes of a decoder, from config.json."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key and value heads."""
    head_size: int
    vocabulary: int
    experts: int
    topk: int
    expert_width: int
    tied: bool
    """Whether the output layer is the embedding."""
    dense: frozenset[int] = frozenset()
    """Layers without experts, 0-based."""
    dense_width: int = 0

    @property
    def qkv(self) -> QueryKeyValue:
        """The operation of the three projections."""
        return QueryKeyValue(self.groups, self.heads // self.groups, self.head_size)


@dataclass(frozen=True)
class Names:
    """Names of a family's tensors at Hugging Face, inside a layer unless said otherwise."""

    router: str = "mlp.gate"
    expert: str = "mlp.experts.{expert}"
    """Of one expert; followed by the names of `gate_up_down`."""
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    qkv_bias: bool = False
    o_bias: bool = False
    norm_bias: bool = False
    qk_norm: Shape | None = None
    """Lengths of the weights of q_norm and k_norm; None without the norms."""
    router_bias: bool = False
    sinks: bool = False
    lm_head_bias: bool = False
    experts: Callable[[Numbers, str, Callable[..., Iterator[Piece]]], Iterator[Piece]] | None = None
    """Pieces of a layer's experts where they are not stored one by one."""


@dataclass(frozen=True)
class Family:
    """A family of models."""

    name: str
    architecture: str
    """`architectures` in config.json."""
    numbers: Callable[[Any], Numbers]
    flags: Callable[[Any], Flags]
    names: Callable[[Any, Mapping[str, Any]], Names]
    """From the configuration and the tensors of the folder (name -> anything)."""
    modules: str | None = None
    """Name of the family's own modules in `mcore/families`; None where Megatron's are exact."""
    refuse: Callable[[Any], str | None] = field(default=lambda _: None)
    """Why a configuration cannot be expressed; None if it can."""

    def pieces(self, config: Any, tensors: Mapping[str, Any]) -> Iterator[Piece]:
        """All pieces, in the order of the layers."""
        yield from decoder_pieces(self.numbers(config), self.names(config, tensors))


def decoder_pieces(n: Numbers, names: Names) -> Iterator[Piece]:
    """All pieces of a decoder."""
    yield Piece(
        "embedding.word_embeddings.weight", (), (n.vocabulary, n.hidden), (Part("model.embed_tokens.weight"),)
    )
    for layer in range(n.layers):
        yield from _layer_pieces(n, names, layer)
    yield from _norm("decoder.final_layernorm", (), "model.norm", n.hidden, names, dot=True)
    if not n.tied:
        yield Piece("output_layer.weight", (), (n.vocabulary, n.hidden), (Part("lm_head.weight"),))
    if names.lm_head_bias:
        yield Piece("output_layer.bias", (), (n.vocabulary,), (Part("lm_head.bias"),))


def _norm(key: str, place: Shape, name: str, length: int, names: Names, dot: bool = False) -> Iterator[Piece]:
    for kind in ("weight", "bias") if names.norm_bias else ("weight",):
        yield Piece(f"{key}{'.' if dot else '_'}{kind}", place, (length,), (Part(f"{name}.{kind}"),))


def _layer_pieces(n: Numbers, names: Names, layer: int) -> Iterator[Piece]:
    # A model whose layers differ has a key for each layer.
    prefix, place = (f"decoder.layers.{layer}", ()) if n.dense else ("decoder.layers", (layer,))
    source = f"model.layers.{layer}"

    def one(key: str, shape: Shape, parts: Sequence[str], operation: Operation = COPY, *more: int) -> Piece:
        found = tuple(Part(f"{source}.{part}") for part in parts)
        return Piece(f"{prefix}.{key}", (*place, *more), shape, found, operation)

    attention, projections = "self_attention", [f"self_attn.{name}_proj" for name in "qkv"]
    rows = (n.heads + 2 * n.groups) * n.head_size
    yield from _norm(
        f"{prefix}.{attention}.linear_qkv.layer_norm", place, f"{source}.input_layernorm", n.hidden, names
    )
    yield one(f"{attention}.linear_qkv.weight", (rows, n.hidden), [f"{p}.weight" for p in projections], n.qkv)
    if names.qkv_bias:
        yield one(f"{attention}.linear_qkv.bias", (rows,), [f"{p}.bias" for p in projections], n.qkv)
    yield one(
        f"{attention}.linear_proj.weight", (n.hidden, n.heads * n.head_size), ["self_attn.o_proj.weight"]
    )
    if names.o_bias:
        yield one(f"{attention}.linear_proj.bias", (n.hidden,), ["self_attn.o_proj.bias"])
    if names.qk_norm:
        for letter, length in zip("qk", names.qk_norm, strict=True):
            yield one(
                f"{attention}.{letter}_layernorm.weight", (length,), [f"self_attn.{letter}_norm.weight"]
            )
    if names.sinks:
        yield one(f"{attention}.core_attention.softmax_offset", (n.heads,), ["self_attn.sinks"])

    after = f"{source}.post_attention_layernorm"
    yield from _norm(f"{prefix}.mlp.linear_fc1.layer_norm", place, after, n.hidden, names)
    if layer in n.dense:
        gate, up, down = (f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
        yield one("mlp.linear_fc1.weight", (2 * n.dense_width, n.hidden), [gate, up], GateUp())
        yield one("mlp.linear_fc2.weight", (n.hidden, n.dense_width), [down])
        return
    # Transformer-engine's layers look for the same norm under another name.
    yield from _norm(f"{prefix}.pre_mlp_layernorm", place, after, n.hidden, names, dot=True)
    yield one("mlp.router.weight", (n.experts, n.hidden), [f"{names.router}.weight"])
    if names.router_bias:
        yield one("mlp.router.bias", (n.experts,), [f"{names.router}.bias"])
    if names.experts:
        yield from names.experts(n, source, lambda *args: _expert_pieces(prefix, place, *args))
        return
    for expert in range(n.experts):
        gate, up, down = (
            f"{names.expert.format(expert=expert)}.{name}.weight" for name in names.gate_up_down
        )
        fc1, fc2 = "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"
        yield one(fc1, (2 * n.expert_width, n.hidden), [gate, up], GateUp(), expert)
        yield one(fc2, (n.hidden, n.expert_width), [down], COPY, expert)


def _expert_pieces(
    prefix: str,
    place: Shape,
    experts: int,
    linear: str,
    shape: Shape,
    names: Sequence[str],
    operation: Operation,
) -> Iterator[Piece]:
    """One piece for each expert, from tensors that hold all experts."""
    for expert in range(experts):
        parts = tuple(Part(name, (expert,)) for name in names)
        yield Piece(f"{prefix}.mlp.experts.experts.{linear}", (*place, expert), shape, parts, operation)


def extra_states(n: Numbers) -> Iterator[tuple[str, Shape, Shape]]:
    """The empty objects that Megatron's layers expect in a checkpoint: key, place and count.

    The list covers local and transformer-engine layers; Megatron ignores what it does not look for.
    """
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    for layer in range(n.layers):
        prefix, place, count = (
            (f"decoder.layers.{layer}", (), ()) if n.dense else ("decoder.layers", (layer,), (n.layers,))
        )
        own = ["mlp.linear_fc1", "mlp.linear_fc2"] if layer in n.dense else ["pre_mlp_layernorm"]
        for module in [*modules, *own]:
            yield f"{prefix}.{module}", place or (0,), count or (1,)
        if layer not in n.dense:
            for linear in ("linear_fc1", "linear_fc2"):
                for expert in range(n.experts):
                    yield f"{prefix}.mlp.experts.experts.{linear}", (*place, expert), (*count, n.experts)
    yield "decoder.final_layernorm", (0,), (1,)
    yield "output_layer", (0,), (1,)


def decoder_flags(n: Numbers, config: Any) -> Flags:
    """The Megatron flags that follow from the sizes alone, and the load-balancing loss.

    transformers adds that loss only with `output_router_logits`, and on another scale; see the files of
    examples/models/.
    """
    balanced = getattr(config, "output_router_logits", False)
    flags: Flags = {
        "padded-vocab-size": n.vocabulary,
        "num-layers": n.layers,
        "hidden-size": n.hidden,
        "num-attention-heads": n.heads,
        "kv-channels": n.head_size,
        "max-position-embeddings": config.max_position_embeddings,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "ffn-hidden-size": n.dense_width or n.expert_width,
        "moe-ffn-hidden-size": n.expert_width,
        "num-experts": n.experts,
        "moe-router-topk": n.topk,
        "moe-router-score-function": "softmax",
        "moe-router-dtype": "fp32",
        "moe-router-load-balancing-type": "aux_loss",
        "moe-aux-loss-coeff": float(config.router_aux_loss_coef) if balanced else 0.0,
    }
    if n.groups < n.heads:
        flags |= {"group-query-attention": True, "num-query-groups": n.groups}
    if not n.tied:
        flags["untie-embeddings-and-output-weights"] = True
    if n.dense:
        flags["moe-layer-freq"] = str([int(layer not in n.dense) for layer in range(n.layers)]).replace(
            " ", ""
        )
    return flags


def decoder_numbers(config: Any, experts: int, expert_width: int, **own: Any) -> Numbers:
    """The numbers that all configurations call alike, with those that each family calls by its own name."""
    return Numbers(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        experts=experts,
        topk=config.num_experts_per_tok,
        expert_width=expert_width,
        tied=config.tie_word_embeddings,
        **own,
    )
