from types import SimpleNamespace
from typing import Any

import pytest

from lit_tune.data.instruct import InstructData
from lit_tune.workload import MicroBatch, largest_micro_batch
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
def test_the_largest_micro_batch_is_that_of_the_batches_themselves(packing: bool) -> None:
    data = prepared(packing=packing, micro_batch_size=2, limit=40)
    source = data.source()
    batches = [
        batch
        for epoch in range(3)
        for step in source.plan(epoch)
        for batch in source.micro_batches(step, epoch=epoch, number=0, rank=0)
    ]
    most = max(batches, key=lambda batch: (batch["input_ids"].numel(), batch["num_supervised"]))
    found = largest_micro_batch(data)
    assert found.tokens == most["input_ids"].numel()
    assert found.supervised == most["num_supervised"]
    assert len(found.lengths) == most["num_samples"]


def test_padding_counts() -> None:
    assert MicroBatch((5, 3), 4).tokens == 8
    assert MicroBatch((5, 3), 4, packed=False).tokens == 10
