"""The same curve on any split: devices x accumulation x micro-batch, packed or padded, against one micro-batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.reliability.splits import Seen, Split, run_in_ranks, run_split
from tests.tiny_llama import tiny_base
from tests.tiny_run import write_records

GLOBAL_BATCH = 8
RECORDS = 27  # 19 to train on, in steps of 8, 8 and 3: the last leaves ranks and micro-batches uneven or without work

SHORT = [
    Split(2, 1, samples=4),
    Split(2, 2, samples=2, packing=False),
    Split(2, 4, samples=1, method="fft"),
    Split(2, 2, samples=2, method="fft", strategy="fsdp2"),
    Split(2, 1, samples=4, packing=False, strategy="fsdp2_cpu_offload"),
]
LONG = [
    Split(world, GLOBAL_BATCH // world // samples, samples=samples, packing=packing, method=method)
    for method in ("lora", "fft")
    for packing in (True, False)
    for world in (1, 2)
    for samples in (8, 4, 2, 1)
    if samples * world <= GLOBAL_BATCH
] + [
    Split(world, GLOBAL_BATCH // world // samples, samples=samples, packing=packing, method=method, strategy="fsdp2")
    for method in ("lora", "fft")
    for packing in (True, False)
    for world, samples in ((1, 4), (2, 4), (2, 1))
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", RECORDS)


def run_all(splits: list[Split], base: str, records: str, directory: Path) -> list[Seen]:
    """Run those of one rank here, those of two in two processes; return what they did in the order given."""
    two = [split for split in splits if split.world == 2]
    of_two = iter(run_in_ranks(two, world=2, base=base, records=records, directory=directory) if two else [])
    return [next(of_two) if split.world == 2 else run_split(split, base, records) for split in splits]


def differences(one: Seen, other: Seen) -> tuple[float, float, float, float]:
    """Return the largest relative differences of losses, gradients, weights and validation loss.

    Gradients are compared by the norm of all of them, weights against the norm of all that was learnt: Adam divides by
    the gradient's own size, so that single weights near zero differ by whole updates.
    """
    assert len(one.losses) == len(other.losses)
    losses = max(abs(a - b) / abs(a) for a, b in zip(one.losses, other.losses, strict=True))
    gradients = max(float(torch.dist(a, b) / a.norm()) for a, b in zip(one.gradients, other.gradients, strict=True))
    learnt = torch.dist(one.weights[-1], one.weights[0])
    weights = float(torch.dist(one.weights[-1], other.weights[-1]) / learnt)
    return losses, gradients, weights, abs(one.val_loss - other.val_loss) / one.val_loss


@pytest.mark.parametrize("splits", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_any_split_gives_the_same_losses_gradients_and_weights(
    splits: list[Split], base: str, records: str, tmp_path: Path, report: Callable[[str], None]
) -> None:
    reference = {method: run_split(Split(1, 1, samples=8, method=method), base, records) for method in ("lora", "fft")}
    assert len(reference["lora"].losses) == 6
    found = []
    for split, seen in zip(splits, run_all(splits, base, records, tmp_path), strict=True):
        found.append(differences(reference[split.method], seen))
        losses, gradients, weights, validation = found[-1]
        assert losses <= 1e-5, split
        assert gradients <= 1e-5, split
        assert weights <= 1e-3, split
        assert validation <= 1e-5, split
    if splits is LONG:
        worst = [max(column) for column in zip(*found, strict=True)]
        report(
            f"{len(splits)} splits of one global batch, {len(reference['lora'].losses)} steps each; largest relative "
            f"difference: losses {worst[0]:.1e}, gradients {worst[1]:.1e}, weights {worst[2]:.1e} of the update, "
            f"validation loss {worst[3]:.1e}"
        )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_accumulation_and_ranks_are_the_same_thing_even_to_dropout(
    packing: bool, base: str, records: str, tmp_path: Path
) -> None:
    """k micro-batches on one rank, or one on each of k: the same samples in the same places, so the same dropout."""
    by_samples = {"samples": 2, "packing": packing, "dropout": 0.3}
    by_tokens = {"tokens": 200, "packing": packing, "dropout": 0.3}
    cuts = [by_samples, by_tokens]
    one = [run_split(Split(1, 2, **cut), base, records) for cut in cuts]  # type: ignore[arg-type]
    two = run_in_ranks(
        [Split(2, 1, **cut) for cut in cuts],  # type: ignore[arg-type]
        world=2,
        base=base,
        records=records,
        directory=tmp_path,
    )
    for a, b in zip(one, two, strict=True):
        losses, gradients, weights, _ = differences(a, b)
        assert losses <= 1e-6
        assert gradients <= 1e-6
        assert weights <= 1e-4
