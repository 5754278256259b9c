"""What is changed in Megatron computes what Megatron computes."""

import torch


def test_the_installed_attention_takes_a_cache() -> None:
    from ramoe_megatron.mcore import compat
    from ramoe_megatron.mcore.cpu.backend import cpu_backend

    with cpu_backend():
        assert compat.attention_fault() is None


def test_the_halves_of_a_gated_projection_are_put_together_without_a_copy() -> None:
    from ramoe_megatron.mcore import compat
    from ramoe_megatron.mcore.cpu.backend import cpu_backend

    with cpu_backend():
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.transformer import mlp

        compat.merge_halves_in_place()
        compat.merge_halves_in_place()  # once more changes nothing
        weight = torch.randn(6, 4)
        whole = ShardedTensor.from_rank_offsets("weight", weight, replica_id=0)
        factory = mlp.apply_swiglu_sharded_factory(whole, ())
        views = [part.data for part in factory.build()]
        apart = [view.clone() for view in views]
        turned = views[::-1]
        merged, copied, swapped = (factory.merge_fn(halves) for halves in (views, apart, turned))
        part = factory.merge_fn(views[:1])  # as FSDP2 has it
    assert merged.data_ptr() == weight.data_ptr()
    assert torch.equal(merged, weight)
    assert copied.data_ptr() not in (weight.data_ptr(), apart[0].data_ptr())
    assert torch.equal(copied, weight)
    assert torch.equal(part, weight[:3])
    assert torch.equal(swapped, torch.cat([weight[3:], weight[:3]]))
