from types import SimpleNamespace
from typing import Any

import pytest

from lit_tune.data.instruct import InstructData
from lit_tune.workload import MicroBatch, largest_micro_batches
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def prepared(**settings: Any) -> InstructData:
    data = InstructData(**settings)
    data.prepare(lambda: TOKENIZER)
    trainer: Any = SimpleNamespace(
        world_size=1, global_rank=0, accumulate_grad_batches=2, max_epochs=3, max_steps=-1, global_step=0
    )
    data.trainer = trainer
    return data


@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_micro_batches_are_those_of_the_batches_themselves(packing: bool) -> None:
    data = prepared(packing=packing, micro_batch_size=2, limit=40)
    source = data.source()
    batches = [
        batch
        for epoch in range(3)
        for step in source.plan(epoch)
        for batch in source.micro_batches(step, epoch=epoch, number=0, rank=0)
    ]
    shapes = {(batch["input_ids"].numel(), batch["num_supervised"], batch["num_samples"]) for batch in batches}
    found = {(micro.tokens, micro.supervised, len(micro.lengths)) for micro in largest_micro_batches(data)}
    assert found <= shapes
    assert max(tokens for tokens, _, _ in found) == max(tokens for tokens, _, _ in shapes)
    assert max(supervised for _, supervised, _ in found) == max(supervised for _, supervised, _ in shapes)
    assert len(found) <= 2


def test_padding_counts() -> None:
    assert MicroBatch((5, 3), 4).tokens == 8
    assert MicroBatch((5, 3), 4, packed=False).tokens == 10
