from itertools import islice, product
from typing import Any

import numpy as np
import pytest
import torch

from lit_tune.data.encode import Encoded
from lit_tune.data.loader import (
    Batch,
    HeldOutLoader,
    PromptLoader,
    SizedTrainLoader,
    StepSource,
    TrainLoader,
    rng_seed,
    supervised_counts,
)
from lit_tune.data.packing import Cut

PAD = 0
EPOCHS = 3
BY_SAMPLES = Cut(world=2, accumulate=2, samples=3, tokens=None, packing=True)
PADDED = Cut(world=2, accumulate=2, samples=3, tokens=None, packing=False)
BY_TOKENS = Cut(world=2, accumulate=2, samples=None, tokens=40, packing=True)
CUTS = pytest.mark.parametrize("cut", [BY_SAMPLES, PADDED, BY_TOKENS], ids=["samples", "padded", "tokens"])


def encoded(count: int = 29) -> Encoded:
    """Make samples of 2 to 20 tokens; about half of these are supervised, the first of a sample now and then too."""
    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(2, 21, count))
    return Encoded(
        tokens=random.integers(1, 1000, ends[-1], dtype=np.int32),
        supervised=random.random(ends[-1]) < 0.5,
        bounds=np.stack([np.append(0, ends[:-1]), ends], axis=1),
        ids=np.arange(count),
        counts={},
    )


def source(cut: Cut, *, count: int = 29, seed: int = 5) -> StepSource:
    return StepSource(encoded(count), cut, seed=seed, pad_token_id=PAD)


def plain(batch: Batch) -> dict[str, Any]:
    """Make a batch comparable."""
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def served(loader: TrainLoader, *, last_epoch: int = EPOCHS - 1) -> list[dict[str, Any]]:
    """Take all micro-batches up to the end of an epoch, an `iter` per epoch as Lightning does."""
    batches: list[dict[str, Any]] = []
    while not batches or batches[-1]["epoch"] < last_epoch:
        batches += [plain(batch) for batch in loader]
    return batches


# A run's position -----------------------------------------------------------------------------------------------------


@CUTS
@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_from_any_step_the_rest_is_what_it_would_have_been(cut: Cut, rank: int) -> None:
    whole = served(TrainLoader(source(cut), rank=rank))
    steps = whole[-1]["step"] + 1
    assert steps >= 3 * EPOCHS  # so that it resumes at the beginning, in the middle and at the end of epochs
    for done in range(steps):
        resumed = served(TrainLoader(source(cut), rank=rank, steps_done=done))
        assert resumed == [batch for batch in whole if batch["step"] >= done], done


@CUTS
def test_the_position_after_every_micro_batch_is_the_number_of_finished_steps(cut: Cut) -> None:
    loader = TrainLoader(source(cut), rank=0)
    finished = 0
    for _ in range(EPOCHS):
        for batch in loader:
            finished += batch["last_of_step"]
            assert loader.state_dict() == {"steps_done": finished}
            assert batch["step"] == finished - batch["last_of_step"]
    assert finished > EPOCHS


def test_a_step_that_was_left_half_way_is_served_again_from_its_beginning() -> None:
    interrupted = TrainLoader(source(BY_SAMPLES), rank=0)
    taken = [plain(batch) for batch in islice(interrupted, 3)]
    assert [batch["step"] for batch in taken] == [0, 0, 1]
    again = TrainLoader(source(BY_SAMPLES), rank=0, steps_done=interrupted.state_dict()["steps_done"])
    assert plain(next(iter(again))) == taken[2]


def test_the_data_modules_position_is_not_overruled_by_the_loaders_own() -> None:
    loader = TrainLoader(source(BY_SAMPLES), rank=0, steps_done=2)
    loader.load_state_dict({"steps_done": 7})
    assert loader.state_dict() == {"steps_done": 2}


@CUTS
def test_a_step_is_located_by_counting_through_the_epochs(cut: Cut) -> None:
    data = source(cut)
    places = [(epoch, step) for epoch in range(EPOCHS) for step in range(len(data.plan(epoch)))]
    fresh = source(cut)
    assert [fresh.locate(done) for done in range(len(places))] == places
    assert [fresh.steps_in(epoch) for epoch in range(EPOCHS)] == [len(data.plan(epoch)) for epoch in range(EPOCHS)]


# What is in the batches -----------------------------------------------------------------------------------------------


@CUTS
def test_both_ranks_together_serve_every_sample_once_an_epoch(cut: Cut) -> None:
    data = encoded()
    batches = [batch for rank in range(2) for batch in TrainLoader(source(cut), rank=rank)]
    assert sum(batch["num_samples"] for batch in batches) == len(data)
    tokens = [token for batch in batches for token in batch["input_ids"].flatten().tolist() if token != PAD]
    assert sorted(tokens) == sorted(data.tokens.tolist())


@CUTS
def test_step_supervised_is_the_sum_over_ranks_and_micro_batches(cut: Cut) -> None:
    batches = [batch for rank in range(2) for batch in served(TrainLoader(source(cut), rank=rank))]
    steps = {batch["step"] for batch in batches}
    for step in steps:
        of_step = [batch for batch in batches if batch["step"] == step]
        supervised = sum(label != -100 for batch in of_step for row in batch["labels"] for label in row)
        assert {batch["step_supervised"] for batch in of_step} == {supervised}
        assert sum(batch["num_supervised"] for batch in of_step) == supervised


@CUTS
def test_only_the_last_micro_batch_of_a_step_is_marked(cut: Cut) -> None:
    batches = served(TrainLoader(source(cut), rank=1))
    following = [*(batch["step"] for batch in batches[1:]), None]
    for batch, next_step in zip(batches, following, strict=True):
        assert batch["last_of_step"] is (batch["step"] != next_step)


def test_dropout_is_seeded_apart_for_every_step_micro_batch_and_rank() -> None:
    seeds = [batch["rng_seed"] for rank in range(2) for batch in served(TrainLoader(source(BY_SAMPLES), rank=rank))]
    assert len(set(seeds)) == len(seeds) > 20
    again = [batch["rng_seed"] for rank in range(2) for batch in served(TrainLoader(source(BY_SAMPLES), rank=rank))]
    assert again == seeds
    other = [batch["rng_seed"] for batch in TrainLoader(source(BY_SAMPLES, seed=6), rank=0)]
    assert not set(other) & set(seeds)


def test_seeds_are_valid_for_torch_and_differ_for_neighbours() -> None:
    seeds = [rng_seed(*parts) for parts in product(range(8), repeat=4)]
    assert len(set(seeds)) == 8**4
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    assert rng_seed(1, 2, 3, 4) == seeds[1 * 512 + 2 * 64 + 3 * 8 + 4]


def test_supervised_counts_are_those_of_the_labels() -> None:
    data = encoded()
    assert data.supervised[data.bounds[:, 0]].any()  # first tokens that are supervised, and yet never a label
    for part in (data, data.subset([7, 3, 11])):
        labels = [part.sample(i)[1] for i in range(len(part))]
        assert supervised_counts(part).tolist() == [int((row != -100).sum()) for row in labels]


# Lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "accumulate", "samples"), [(1, 1, 1), (1, 3, 2), (2, 2, 3), (3, 2, 1), (4, 1, 2)])
def test_the_length_is_the_number_of_micro_batches(world: int, accumulate: int, samples: int, packing: bool) -> None:
    cut = Cut(world=world, accumulate=accumulate, samples=samples, tokens=None, packing=packing)
    for count in range(1, 2 * world * accumulate * samples + 2):
        for rank in range(world):
            loader = SizedTrainLoader(source(cut, count=count), rank=rank)
            assert len(loader) == len(list(loader)), (count, rank)


def test_a_token_budget_promises_no_length() -> None:
    assert not hasattr(TrainLoader(source(BY_TOKENS), rank=0), "__len__")


# Held-out sets --------------------------------------------------------------------------------------------------------


@CUTS
def test_held_out_samples_are_served_once_over_all_ranks(cut: Cut) -> None:
    data = encoded(25)  # leaves the last micro-batch of rank 1 empty when cut by samples
    loaders = [HeldOutLoader(data, cut, rank=rank, pad_token_id=PAD) for rank in range(2)]
    ranks = [[plain(batch) for batch in loader] for loader in loaders]
    assert [len(batches) for batches in ranks] == [len(loader) for loader in loaders]
    assert len(ranks[0]) == len(ranks[1])
    batches = [*ranks[0], *ranks[1]]
    assert sum(batch["num_samples"] for batch in batches) == 25
    assert sum(batch["num_tokens"] for batch in batches) == len(data.tokens)
    assert sum(batch["num_supervised"] for batch in batches) == supervised_counts(data).sum()
    assert not any("step" in batch for batch in batches)


def test_an_idle_rank_gets_a_filler() -> None:
    loader = HeldOutLoader(encoded(25), BY_SAMPLES, rank=1, pad_token_id=PAD)
    last = list(loader)[-1]
    assert last["num_samples"] == last["num_supervised"] == 0
    assert last["input_ids"].tolist() == [[PAD]]


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (4, [2, 2]), (5, [2, 2, 1])])
def test_prompts_come_in_batches_with_what_is_common(count: int, sizes: list[int]) -> None:
    loader = PromptLoader(range(count), [[i, i + 1] for i in range(count)], size=2, common={"pad_token_id": PAD})
    batches = list(loader)
    assert [len(batch["ids"]) for batch in batches] == sizes
    assert len(loader) == len(sizes)
    assert all(batch["prompts"] == [[i, i + 1] for i in batch["ids"]] for batch in batches)
    assert all(batch["pad_token_id"] == PAD for batch in batches)
