"""A pretrain_gpt.py on Megatron-Core 0.19 with routing alignment, as a team may have it.

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py MEGATRON_FLAGS --ramoe-data train.jsonl \
        --ramoe-coeff 1.0 --ramoe-experts experts.safetensors --ramoe-taxonomy taxonomy.jsonl

Only the lines marked (1) to (11) are added to Megatron's script. (1), (5), (7) and (9) are always needed. (6)
finds an error in the data before the model is built. The other lines serve one case each: (2) --ramoe-pack,
(3) --ramoe-coeff-unit lm-loss, (4) megatron-core from a wheel, (8) --ramoe-train, (10) a machine without a
GPU, (11) a checkpoint of `ramoe convert`.
"""

import sys
from functools import partial

import ramoe_megatron


def loss_func(loss_mask, losses):
    """Megatron's usual masked loss: the sum over tokens, their number, and both for the log."""
    import torch

    mask = loss_mask.view(-1).float()
    loss = (losses.view(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    ramoe_megatron.record_lm_loss(loss, tokens)  # (3) what --ramoe-coeff-unit lm-loss measures
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.float().view(1)])}


def forward_step(data_iterator, model):
    """One micro-batch, without a padding mask: `routing_batch` tells the routers which tokens are real."""
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    with ramoe_megatron.routing_batch(model, batch):  # (1) the routers read the batch
        losses = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],  # for Megatron's loss of --mtp-num-layers
            packed_seq_params=ramoe_megatron.packed_seq_params(batch),  # (2) None unless --ramoe-pack
        )
    return losses, partial(loss_func, batch["loss_mask"])


def main():
    """Call Megatron's `pretrain()`."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    ramoe_megatron.skip_helper_compilation()  # (4) the wheel lacks the Makefile that Megatron looks for
    args = parse_and_validate_args(extra_args_provider=ramoe_megatron.add_arguments)  # (5) our flags
    ramoe_megatron.check_data(args)  # (6) reads the data and the files of alignment
    model = gpt_config_from_args(args)
    ramoe_megatron.family_modules(args, model)  # (11) what the note beside the checkpoint asks for
    alignment = ramoe_megatron.RoutingAlignmentConfig.from_args(args)  # (7) routing alignment on the model
    model.pre_wrap_hooks.append(partial(ramoe_megatron.attach, config=alignment))  # (7)
    ramoe_megatron.train_selected(args, model)  # (8) all weights unless --ramoe-train says otherwise
    container = pretrain_cfg_container_from_args(args, model)
    dataset_provider = ramoe_megatron.dataset_provider  # (9) parallel data
    pretrain(container, dataset_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    with ramoe_megatron.cpu_backend() as on_cpu:  # (10) does nothing where there is a GPU
        if on_cpu:
            sys.argv[1:] = ramoe_megatron.cpu_command_line(sys.argv[1:])[0]  # (10)
        main()
