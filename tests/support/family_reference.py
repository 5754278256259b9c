"""What transformers computes in float64 with the tiny models: routing alignment, and scores under steering.

Shape suffixes: B sequences, S their tokens, L MoE layers, E experts, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from family_models import VOCABULARY
from tiny_models import make_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ramoe_megatron.data.encode import Encoded
from ramoe_megatron.models.convert import convert_folder, plan_conversion
from ramoe_megatron.models.torch_dist import TorchDist


def float64_model(name: str) -> Any:
    """The tiny model in float64. Its norms and rotary embeddings still round to float32."""
    model = make_model(name, vocab_size=VOCABULARY).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Ids with padding at the end, which causal attention never sees. [B, S]"""
    return pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)


def router_logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """All logits of each layer's router, with the router's bias if it has one. L x [B, S, E]"""
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    seen: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda *call: seen.append(call[-1][0])) for router in routers]
    ids = padded(sequences)
    model(ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(routers)
    return [logits.view(*ids.shape, -1) for logits in seen]


def megatron_gradients(model: Any, folder: Path) -> TorchDist:
    """The gradients of a transformers model under Megatron's names.

    A conversion only moves values, so the gradients convert as the weights do.
    """
    for parameter in model.parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data = slope
    model.save_pretrained(folder / "hf")
    convert_folder(plan_conversion(folder / "hf"), folder / "mg")
    return TorchDist(folder / "mg/release")


@contextlib.contextmanager
def steered_phimoe(mask_LBE: Tensor, strength: float) -> Iterator[list[Tensor]]:
    """Soft steering (arXiv 2510.04694) before transformers' SparseMixer, in one forward pass.

    Yields the list that gets each layer's raised logits. [B, S, E]
    """
    from transformers.models.phimoe import modeling_phimoe

    mixer, seen = modeling_phimoe.sparsemixer, []

    def raised(logits: Tensor, **more: Any) -> Any:
        mask_BE = mask_LBE[len(seen)]
        own = logits.view(len(mask_BE), -1, logits.shape[-1])
        spread = (own - own.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
        seen.append(torch.where(mask_BE[:, None], own + strength * spread, own))
        return mixer(seen[-1].view_as(logits), **more)

    modeling_phimoe.sparsemixer = raised
    try:
        yield seen
    finally:
        modeling_phimoe.sparsemixer = mixer


def log_likelihoods(model: Any, encoded: Sequence[Encoded], vocabulary: int) -> list[float]:
    """Of each sequence's tokens after its prompt. Only the tokenizer's vocabulary has probability."""
    with torch.no_grad():
        logits_BSV = model(padded([sequence.ids for sequence in encoded])).logits[..., :vocabulary]
    found = []
    for logits_SV, sequence in zip(logits_BSV.log_softmax(-1), encoded, strict=True):
        places = range(sequence.prompt_length, len(sequence.ids))
        found.append(sum(float(logits_SV[place - 1, sequence.ids[place]]) for place in places))
    return found


def lumped_kl(p_E: Tensor, q_E: Tensor, mask_E: Tensor) -> Tensor:
    """KL of English p from q, over the task experts and one bin for all others."""
    p, q = (torch.cat([each[mask_E], each[~mask_E].sum()[None]]) for each in (p_E, q_E))
    return (p * (p / q).log()).sum()


def checkpoint_place(weight: str) -> tuple[str, tuple[int, ...]]:
    """Key and place in a checkpoint of a weight of Megatron's local GPT model whose layers are alike."""
    words = weight.split(".")
    place = []
    for word in ("layers", "local_experts"):
        if word in words:
            at = words.index(word) + 1
            place.append(int(words.pop(at)))
    key = ".".join(words).replace("experts.local_experts", "experts.experts")
    for norm, linear in (
        ("input_layernorm", "self_attention.linear_qkv"),
        ("pre_mlp_layernorm", "mlp.linear_fc1"),
    ):
        key = key.replace(f"layers.{norm}.", f"layers.{linear}.layer_norm_")
    return key, tuple(place)
