"""A team's own pretrain_gpt.py on Megatron-Core 0.19 with routing alignment: the lines marked (1)-(5) are all that is added.

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py MEGATRON_FLAGS --ramoe-data train.jsonl --ramoe-coeff 1.0 \
        --ramoe-experts experts.safetensors --ramoe-taxonomy taxonomy.jsonl

The last lines are for a machine without a GPU, where they run the same script on the CPU; with a GPU they do nothing.
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
    ramoe_megatron.record_lm_loss(loss, tokens)  # (5) what --ramoe-coeff-unit lm-loss measures
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.float().view(1)])}


def forward_step(data_iterator, model):
    """One micro-batch. (1) the routers read the batch inside `routing_batch`."""
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    packed = ramoe_megatron.packed_seq_params(batch)  # None unless --ramoe-pack
    with ramoe_megatron.routing_batch(model, batch):
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses, partial(loss_func, batch["loss_mask"])


def main():
    """Megatron's own `pretrain()`."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    ramoe_megatron.skip_helper_compilation()  # Megatron-Core from a wheel lacks the Makefile that it looks for
    # (2) our flags beside Megatron's
    args = parse_and_validate_args(extra_args_provider=ramoe_megatron.add_arguments)
    ramoe_megatron.check_data(args)  # what is wrong with the data is told before any weights load
    model = gpt_config_from_args(args)
    # (3) routing alignment on the model that Megatron builds
    alignment = ramoe_megatron.RoutingAlignmentConfig.from_args(args)
    model.pre_wrap_hooks.append(partial(ramoe_megatron.attach, config=alignment))
    ramoe_megatron.train_selected(args, model)  # all weights unless --ramoe-train says otherwise
    # (4) parallel data
    dataset_provider = ramoe_megatron.dataset_provider
    container = pretrain_cfg_container_from_args(args, model)
    pretrain(container, dataset_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    with ramoe_megatron.cpu_backend() as on_cpu:
        if on_cpu:
            sys.argv[1:] = ramoe_megatron.cpu_command_line(sys.argv[1:])[0]
        main()
