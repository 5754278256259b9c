"""Laws of the padded samples: labels are shifted tokens, with a loss on the response and its eod only."""

from typing import Any

import pytest
import torch
from data_rows import SmallTokenizer, example
from hypothesis import given
from hypothesis import strategies as st

from ramoe_megatron.data.dataset import SFTDataset, pad
from ramoe_megatron.data.encode import Encoded, encode
from ramoe_megatron.data.sampler import order
from ramoe_megatron.errors import RamoeError

TOKENIZER = SmallTokenizer()
EXAMPLES = [
    example("1", prompt="one two three four five ?", response="EUR"),
    example("2", "fi", prompt="one ?", response="yes no perhaps"),
    example("3", prompt="", response="one two three four"),
]


def dataset(**changes: Any) -> SFTDataset:
    options: dict[str, Any] = {"seq_length": 40, "num_samples": 12, "seed": 5} | changes
    return SFTDataset(EXAMPLES, TOKENIZER, **options)


@given(st.data())
def test_loss_covers_response_and_eod_and_nothing_else(data: st.DataObject) -> None:
    prompt, response, slack = (data.draw(st.integers(least, 6)) for least in (0, 1, 0))
    ids = data.draw(st.lists(st.integers(3, 99), min_size=prompt + response, max_size=prompt + response))
    encoded = Encoded([*ids, 2], prompt)
    item = pad(encoded, len(encoded.ids) - 1 + slack, eod=2)
    trained = item["labels"][item["loss_mask"].bool()].tolist()
    # nothing stands before the first token, so an empty prompt leaves it without a prediction
    assert trained == encoded.ids[max(prompt, 1) :]
    length = int(item["length"])
    assert item["tokens"][:length].tolist() == encoded.ids[:-1]
    assert item["labels"][:length].tolist() == encoded.ids[1:]
    assert item["tokens"][length:].tolist() == item["labels"][length:].tolist() == [2] * slack
    assert set(item["loss_mask"].tolist()) <= {0.0, 1.0}


def test_samples_follow_the_order_and_are_whole() -> None:
    found = dataset()
    assert len(found) == 12
    assert found.order.tolist() == order(EXAMPLES, 12, 5).tolist()
    for place in range(12):
        item = found[place]
        index = int(item["example"])
        assert index == found.order[place]
        expected = encode(EXAMPLES[index], TOKENIZER)
        assert found.encoded[index] == expected
        assert int(item["prompt_length"]) == expected.prompt_length
        assert torch.equal(item["tokens"], pad(expected, 40, TOKENIZER.eod)["tokens"])


def test_samples_collate_with_the_stated_types_and_shapes() -> None:
    batch = next(iter(torch.utils.data.DataLoader(dataset(), batch_size=4)))
    for name in ("tokens", "labels", "position_ids"):
        assert (batch[name].dtype, batch[name].shape) == (torch.int64, (4, 40))
    assert (batch["loss_mask"].dtype, batch["loss_mask"].shape) == (torch.float32, (4, 40))
    for name in ("prompt_length", "length", "example"):
        assert (batch[name].dtype, batch[name].shape) == (torch.int64, (4,))
    assert torch.equal(batch["position_ids"][2], torch.arange(40))


def test_the_longest_example_just_fits() -> None:
    longest = max(len(encode(e, TOKENIZER).ids) for e in EXAMPLES) - 1
    assert len(dataset(seq_length=longest)) == 12
    message = rf"1 of 3 examples are longer than --seq-length {longest - 1}.*id '1'.*least {longest}"
    with pytest.raises(RamoeError, match=message):
        dataset(seq_length=longest - 1)


def test_weights_reach_the_sampler() -> None:
    found = dataset(weights={"*/fi": 1.0, "*": 0.0})
    assert set(found.order.tolist()) == {1}
