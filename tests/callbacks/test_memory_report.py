"""The table of a step's memory, at the widths of terminals, and its names as metrics."""

from dataclasses import replace

import pytest

from lit_tune.callbacks.memory_report import StepMemory, made_of, memory_table, metrics, plain_text, size_text
from lit_tune.memory import GIB, Footprint

MIB = 1024**2
MADE_OF = Footprint(weights=12_345 * MIB, gradients=512 * MIB, optimizer=0, activations=2 * GIB, other=300 * MIB)
ON_GPU = StepMemory(
    step=3,
    phases=(2 * GIB, MADE_OF.total, GIB),
    device=MADE_OF,
    most=replace(MADE_OF, optimizer=3 * GIB, other=0),
    host=Footprint(other=GIB),
    rss=3 * GIB,
    rss_peak=4 * GIB,
    pinned=GIB,
    allocated=GIB,
    reserved=16 * GIB,
    used=70 * GIB,
    total=80 * GIB,
)
ON_CPU = replace(ON_GPU, host=ON_GPU.device, pinned=0, allocated=0, reserved=0, used=0, total=0)


def table(*ranks: StepMemory, predicted: Footprint | None = None, width: int = 80, failed: bool = False) -> str:
    laid_out = memory_table(ranks, title="Memory", predicted=predicted, failed=failed)
    return plain_text(laid_out, width=width)


def cells(text: str, row: str) -> str:
    """Return a row of the table with single spaces."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(row))


def test_the_table_tells_sizes_shares_phases_and_the_host() -> None:
    text = table(ON_GPU)
    assert cells(text, "weights") == "weights 12.06 GiB 81.2 % 12.06 GiB"
    assert cells(text, "optimizer") == "optimizer 0.0 MiB 0.0 % 3.00 GiB"
    assert cells(text, "other") == "other 300.0 MiB 2.0 %"
    assert cells(text, "all") == "all 14.85 GiB 100.0 %"
    assert "peaks in GiB: forward 2.00, backward 14.85 (highest), optimizer step 1.00" in text
    assert "reserved 16.00 GiB; of the GPU 70.0 of 80.0 GiB in use" in text
    assert "host: 3.00 GiB with all children, peak of one process 4.00 GiB, 1.00 GiB pinned" in text


def test_the_prediction_stands_beside_with_its_error() -> None:
    predicted = replace(MADE_OF, activations=int(2.5 * GIB), other=0)
    text = table(ON_GPU, predicted=predicted)
    assert cells(text, "GPU") == "GPU at the peak share predicted off by at most"
    assert cells(text, "activations") == "activations 2.00 GiB 13.5 % 2.50 GiB -20.0 % 2.00 GiB"
    assert cells(text, "weights") == "weights 12.06 GiB 81.2 % 12.06 GiB +0.0 % 12.06 GiB"
    assert cells(text, "other") == "other 300.0 MiB 2.0 % 0.0 MiB"  # nothing to be off from


@pytest.mark.parametrize("ranks", [[ON_GPU], [ON_CPU], [ON_CPU, ON_GPU]])
def test_the_table_fits_80_columns_and_nothing_is_cut_off(ranks: list[StepMemory]) -> None:
    text = table(*ranks, predicted=MADE_OF)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_with_several_ranks_the_fullest_is_shown_and_all_are_told() -> None:
    lower = replace(ON_GPU, phases=(GIB, GIB, GIB), device=Footprint(weights=GIB))
    text = table(lower, ON_GPU)
    assert cells(text, "GPU of rank 1") == "GPU of rank 1 at the peak share at most"
    assert "peaks by rank: 1.00 GiB, 14.85 GiB; 15.85 GiB in all" in text
    assert "host: 6.00 GiB with all children" in text


def test_of_a_step_that_failed_only_what_is_known_is_shown() -> None:
    text = table(ON_GPU, failed=True)
    assert cells(text, "GPU") == "GPU allocated share"
    assert "peaks" not in text


def test_without_a_gpu_it_is_the_host() -> None:
    text = table(ON_CPU)
    assert cells(text, "host ") == "host at the peak share at most"
    assert "GPU" not in text
    assert "pinned" not in text
    assert not any(name.startswith("memory/gpu") for name in metrics([ON_CPU]))


def test_with_a_gpu_the_host_has_categories_of_its_own() -> None:
    found = metrics([ON_GPU])
    assert found["memory/weights_gib"] == MADE_OF.weights / GIB
    assert found["memory/host_weights_gib"] == 0
    assert found["memory/host_other_gib"] == 1
    assert "memory/rank0/peak_gib" not in found


@pytest.mark.parametrize(("peak", "activations", "other"), [(10, 3, 3), (7, 3, 0), (6, 2, 0), (3, 0, 0), (0, 0, 0)])
def test_what_is_not_known_is_other_and_never_less_than_nothing(peak: int, activations: int, other: int) -> None:
    made = made_of(Footprint(weights=2, gradients=1, optimizer=1, activations=3), peak)
    assert (made.activations, made.other) == (activations, other)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MiB"), (1536, "0.0 MiB"), (GIB - 1, "1024.0 MiB"), (GIB, "1.00 GiB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert size_text(size) == text
