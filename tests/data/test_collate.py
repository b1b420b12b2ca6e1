from typing import Any

import numpy as np
import pytest
import torch

from lit_tune.data.collate import Sample, collate

PAD = 9
# Token 9 is in the data too: what is padding is told by lengths, never by the id.
SAMPLES: list[Sample] = [
    (np.array([5, 6, 9]), np.array([-100, -100, 9])),
    (np.array([7, 8]), np.array([-100, 8])),
]


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_packed_samples_lie_in_one_row() -> None:
    batch = collate(SAMPLES, packing=True, pad_token_id=PAD)
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 9, 7, 8]],
        "labels": [[-100, -100, 9, -100, 8]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seqlens": [0, 3, 5],
        "longest": 3,
        "positions": [1, 3],
        "targets": [9, 8],
        "num_tokens": 5,
        "num_supervised": 2,
        "num_samples": 2,
    }


def test_padded_samples_lie_in_a_row_each_padded_on_the_right() -> None:
    batch = collate(SAMPLES, packing=False, pad_token_id=PAD)
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 9], [7, 8, 9]],
        "labels": [[-100, -100, 9], [-100, 8, -100]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
        "positions": [1, 3],
        "targets": [9, 8],
        "num_tokens": 5,
        "num_supervised": 2,
        "num_samples": 2,
    }


@pytest.mark.parametrize("packing", [True, False])
def test_no_samples_give_one_token_that_trains_nothing(packing: bool) -> None:
    batch = as_lists(collate([], packing=packing, pad_token_id=PAD))
    packed_only = {"cu_seqlens": [0, 1], "longest": 1} if packing else {}
    assert batch == packed_only | {
        "input_ids": [[PAD]],
        "labels": [[-100]],
        "position_ids": [[0]],
        "positions": [],
        "targets": [],
        "num_tokens": 0,
        "num_supervised": 0,
        "num_samples": 0,
    }


@pytest.mark.parametrize("packing", [True, False])
def test_types_are_those_of_the_contract_whatever_the_arrays_have(packing: bool) -> None:
    narrow = [(ids.astype(np.int32), labels.astype(np.int16)) for ids, labels in SAMPLES]
    for samples in (narrow, []):
        batch = collate(samples, packing=packing, pad_token_id=PAD)
        for key in ("input_ids", "labels", "position_ids", "positions", "targets"):
            assert batch[key].dtype == torch.int64, key
            assert batch[key].is_contiguous(), key
        assert not packing or batch["cu_seqlens"].dtype == torch.int32
        counts = [value for value in batch.values() if not isinstance(value, torch.Tensor)]
        assert all(type(count) is int for count in counts)


def test_a_batch_does_not_write_into_the_data() -> None:
    ids = np.arange(3)
    batch = collate([(ids, ids.copy())], packing=True, pad_token_id=PAD)
    batch["input_ids"].zero_()
    assert ids.tolist() == [0, 1, 2]
