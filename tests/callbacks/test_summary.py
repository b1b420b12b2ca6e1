import dataclasses
import io

import pytest
from rich.console import Console

from lit_tune.callbacks.summary import RunSummary, SampleChange, parameters_text, print_summary

from .test_memory_report import MADE_OF, ON_CPU

LONG_PATH = "/home/somebody/a-rather-long-project-name/experiments/runs/smollm2-alpaca-lora-r16/checkpoints/last.ckpt"
SUMMARY = RunSummary(
    name="demo",
    train_losses=[1.83211, 1.2],
    val_losses=[None, 1.31],
    trainable_parameters=921_600,
    total_parameters=135_436_608,
    seconds=81.0,
    peak_gib=1.914,
    peak_of="host",
    memory=[ON_CPU],
    predicted_memory=MADE_OF,
    tokens_per_s=1276.4,
    samples=[
        SampleChange("Name a colour.", "The colour is [red]. " * 6, "Blue."),
        SampleChange("Say nothing.", "x" * 90, ""),
    ],
    places=[("config", "runs/demo/config.yaml"), ("metrics", "runs/demo/metrics.csv"), ("checkpoint", LONG_PATH)],
    next_command="lit-tune chat --model runs/demo",
)


def printed(summary: RunSummary, width: int, *, soft_wrap: bool = False) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=width, color_system=None, soft_wrap=soft_wrap), summary)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("soft_wrap", [False, True])
def test_nothing_is_cut_off(width: int, soft_wrap: bool) -> None:
    text = printed(SUMMARY, width, soft_wrap=soft_wrap)
    to_copy = [f"checkpoint   {LONG_PATH}", "Next:  lit-tune chat --model runs/demo"]
    assert set(to_copy) <= set(text.splitlines())
    assert all(len(line) <= width for line in text.splitlines() if line not in to_copy)
    assert "…" not in text
    for figure in ("1.8321", "1.3100", "921,600", "0.68", "1.91 GiB", "1,276", "1m 21s"):
        assert figure in text
    assert text.count("x") >= 90  # the long answer without a space, folded
    assert "\x1b" not in text


def test_the_memory_stands_beside_its_prediction() -> None:
    assert "predicted" in printed(SUMMARY, 80)
    assert "activations" in printed(SUMMARY, 80)


def test_losses_are_one_row_an_epoch() -> None:
    rows = [line.split() for line in printed(SUMMARY, 80).splitlines()]
    assert ["0", "1.8321", "-"] in rows
    assert ["1", "1.2000", "1.3100"] in rows


def test_answers_are_text_not_markup() -> None:
    assert "[red]" in printed(SUMMARY, 120)


def test_a_run_without_an_epoch_or_samples() -> None:
    bare = dataclasses.replace(SUMMARY, train_losses=[], val_losses=[], samples=[], tokens_per_s=None, memory=[])
    text = printed(bare, 80)
    assert "train loss" not in text
    assert "before" not in text
    assert "weights" not in text
    assert "throughput" not in text


def test_parameters_text() -> None:
    assert parameters_text(8_388_608, 6_746_804_224) == "8,388,608 of 6,746,804,224 trainable (0.12 %)"
