from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise, product
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


class Training:
    """The optimizer steps of a run that takes its batches from a loader."""

    def __init__(self, cut: Cut, *, rank: int = 0, done: int = 0, seed: int = 5) -> None:
        self.done = done
        self.loader = TrainLoader(source(cut, seed=seed), rank=rank, steps_done=lambda: self.done)

    def epoch(self) -> Iterator[dict[str, Any]]:
        """Train to the end of an epoch, as Lightning does by one `iter`."""
        for batch in self.loader:
            yield plain(batch)
            self.done += batch["last_of_step"]

    def batches(self, *, last_epoch: int = EPOCHS - 1) -> list[dict[str, Any]]:
        """Train up to the end of an epoch."""
        batches: list[dict[str, Any]] = []
        while not batches or batches[-1]["epoch"] < last_epoch:
            batches += self.epoch()
        return batches


# Where a run goes on --------------------------------------------------------------------------------------------------


@CUTS
@pytest.mark.parametrize("rank", [0, 1])
def test_from_any_step_on_the_rest_is_what_it_would_have_been(cut: Cut, rank: int) -> None:
    whole = Training(cut, rank=rank).batches()
    steps = whole[-1]["step"] + 1
    assert steps >= 3 * EPOCHS  # so that it goes on at the beginning, in the middle and at the end of epochs
    for done in range(steps):
        rest = Training(cut, rank=rank, done=done).batches()
        assert rest == [batch for batch in whole if batch["step"] >= done], done


def test_a_step_that_was_left_half_way_is_served_again_from_its_beginning() -> None:
    training = Training(BY_SAMPLES)
    taken = list(islice(training.epoch(), 4))
    assert [batch["step"] for batch in taken] == [0, 0, 1, 1]
    assert training.done == 1  # the second step is served, and not yet done
    assert next(training.epoch()) == taken[2]


@CUTS
def test_batches_fetched_ahead_do_not_move_the_run_on(cut: Cut) -> None:
    training = Training(cut)
    fetched = list(training.loader)
    assert [plain(batch) for batch in training.loader] == [plain(batch) for batch in fetched]
    assert training.loader.state_dict() == {}


def test_a_saved_state_moves_nothing() -> None:
    training = Training(BY_SAMPLES, done=2)
    training.loader.load_state_dict({"steps_done": 7})
    assert next(training.epoch())["step"] == 2


@CUTS
def test_a_step_is_located_by_counting_through_the_epochs(cut: Cut) -> None:
    data = source(cut)
    places = [(epoch, step) for epoch in range(EPOCHS) for step in range(len(data.plan(epoch)))]
    fresh = source(cut)
    assert [fresh.locate(done) for done in range(len(places))] == places
    assert [fresh.steps_in(epoch) for epoch in range(EPOCHS)] == [len(data.plan(epoch)) for epoch in range(EPOCHS)]


@CUTS
def test_in_any_order_a_step_is_located_the_same(cut: Cut) -> None:
    asked = list(range(3 * source(cut).steps_in(0)))
    expected = {done: source(cut).locate(done) for done in asked}
    data = source(cut)
    for done in np.random.default_rng(1).permutation(asked).tolist():
        assert data.locate(done) == expected[done]


def test_what_is_known_of_the_place_need_not_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = source(BY_TOKENS)
    before = sum(data.steps_in(epoch) for epoch in range(EPOCHS))
    fresh = source(BY_TOKENS)
    fresh.know(epoch=EPOCHS, steps_before=before)
    counted: list[int] = []

    def steps_in(epoch: int) -> int:
        counted.append(epoch)
        return data.steps_in(epoch)

    monkeypatch.setattr(fresh, "steps_in", steps_in)
    assert fresh.locate(before + 1) == (EPOCHS, 1)
    assert counted == [EPOCHS]
    assert fresh.locate(before - 1) == (EPOCHS - 1, data.steps_in(EPOCHS - 1) - 1)  # before it, from the beginning
    assert counted == [EPOCHS, *range(EPOCHS)]


# What is in the batches -----------------------------------------------------------------------------------------------


@CUTS
def test_both_ranks_together_serve_every_sample_once_an_epoch(cut: Cut) -> None:
    data = encoded()
    batches = [batch for rank in range(2) for batch in Training(cut, rank=rank).loader]
    assert sum(batch["num_samples"] for batch in batches) == len(data)
    tokens = [token for batch in batches for token in batch["input_ids"].flatten().tolist() if token != PAD]
    assert sorted(tokens) == sorted(data.tokens.tolist())


@CUTS
def test_step_supervised_is_the_sum_over_ranks_and_micro_batches(cut: Cut) -> None:
    batches = [batch for rank in range(2) for batch in Training(cut, rank=rank).batches()]
    steps = {batch["step"] for batch in batches}
    for step in steps:
        of_step = [batch for batch in batches if batch["step"] == step]
        supervised = sum(label != -100 for batch in of_step for row in batch["labels"] for label in row)
        assert {batch["step_supervised"] for batch in of_step} == {supervised}
        assert sum(batch["num_supervised"] for batch in of_step) == supervised


@CUTS
def test_the_first_and_the_last_micro_batch_of_a_step_are_marked(cut: Cut) -> None:
    batches = Training(cut, rank=1).batches()
    steps = [None, *(batch["step"] for batch in batches), None]
    for step_before, batch, step_after in zip(steps, batches, steps[2:], strict=False):
        assert batch["first_of_step"] is (batch["step"] != step_before)
        assert batch["last_of_step"] is (batch["step"] != step_after)


@CUTS
def test_a_batch_names_the_records_of_its_samples(cut: Cut) -> None:
    data = source(cut)
    data.data = replace(data.data, ids=data.data.ids + 100)
    by_tokens = {tuple(data.data.sample(i)[0].tolist()): i + 100 for i in range(len(data.data))}
    named: list[int] = []
    for rank in range(2):
        for batch in TrainLoader(data, rank=rank, steps_done=lambda: 0):
            assert len(batch["sample_ids"]) == batch["num_samples"]
            named += batch["sample_ids"]
            if cut.packing and batch["num_samples"]:
                row = batch["input_ids"][0].tolist()
                bounds = batch["cu_seqlens"].tolist()
                parts = [tuple(row[a:b]) for a, b in pairwise(bounds)]
                assert [by_tokens[part] for part in parts] == batch["sample_ids"]
    assert sorted(named) == list(range(100, 129))


def test_dropout_is_seeded_apart_for_every_step_micro_batch_and_rank() -> None:
    def seeds(rank: int, *, seed: int = 5) -> list[int]:
        return [batch["rng_seed"] for batch in Training(BY_SAMPLES, rank=rank, seed=seed).batches()]

    both = seeds(0) + seeds(1)
    assert len(set(both)) == len(both) > 20
    assert seeds(0) + seeds(1) == both
    assert not set(seeds(0, seed=6)) & set(both)


def test_micro_batches_on_other_ranks_drop_out_the_same() -> None:
    def seeded(world: int, accumulate: int) -> dict[tuple[int, ...], int]:
        """Map the samples of a micro-batch to its seed, in all whole steps of an epoch over all ranks."""
        cut = Cut(world=world, accumulate=accumulate, samples=3, tokens=None, packing=True)
        batches = [batch for rank in range(world) for batch in Training(cut, rank=rank).epoch()]
        return {tuple(batch["sample_ids"]): batch["rng_seed"] for batch in batches if batch["step"] < 2}

    assert len(seeded(1, 4)) == 8
    assert seeded(1, 4) == seeded(2, 2) == seeded(4, 1)


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
            loader = SizedTrainLoader(source(cut, count=count), rank=rank, steps_done=lambda: 0)
            assert len(loader) == len(list(loader)), (count, rank)


def test_a_token_budget_promises_no_length() -> None:
    assert not hasattr(TrainLoader(source(BY_TOKENS), rank=0, steps_done=lambda: 0), "__len__")


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
