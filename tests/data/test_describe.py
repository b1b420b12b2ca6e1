import numpy as np
import pytest
from rich.console import Console

from lit_tune.data.describe import Bin, Description, colour, describe, overlap, render
from lit_tune.data.encode import Encoded
from lit_tune.data.prompts import encode_record, load_template
from lit_tune.data.records import Message, Record
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer

COUNTS = {"records": 9, "empty": 1, "kept": 5, "dropped": 3, "truncated": 2}


def encoded(*samples: list[int], supervised_from: int) -> Encoded:
    """Make samples of the given tokens, supervised from one position on."""
    ends = np.cumsum([len(sample) for sample in samples])
    supervised = [index >= supervised_from for sample in samples for index in range(len(sample))]
    return Encoded(
        tokens=np.concatenate([np.array(sample, dtype=np.int32) for sample in samples]),
        supervised=np.array(supervised),
        bounds=np.stack([ends - [len(sample) for sample in samples], ends], axis=1),
        ids=np.arange(len(samples)),
        counts=COUNTS,
    )


@pytest.fixture
def description() -> Description:
    return describe(encoded([1] * 2, [2] * 4, [2] * 4, [3] * 6, [4] * 24, supervised_from=1))


def test_figures_are_those_counted_by_hand(description: Description) -> None:
    assert description == Description(
        samples=5,
        counts=COUNTS,
        tokens=40,
        supervised_share=35 / 40,
        mean_length=8.0,
        length_percentiles={5: 2, 50: 4, 95: 24, 99: 24},
        max_length=24,
        histogram=(
            Bin(1, 2, 1),
            Bin(3, 4, 2),
            Bin(5, 6, 1),
            *(Bin(n, n + 1, 0) for n in range(7, 23, 2)),
            Bin(23, 24, 1),
        ),
        duplicates=1,
    )


def test_the_first_token_never_counts_as_supervised() -> None:
    assert describe(encoded([1, 2], [3, 4], supervised_from=0)).supervised_share == 0.5


def test_a_subset_is_described_by_its_own_samples() -> None:
    subset = encoded([1] * 2, [2] * 4, [2] * 4, supervised_from=1).subset([2, 1])
    figures = describe(subset)
    assert (figures.samples, figures.tokens, figures.duplicates) == (2, 8, 1)
    assert figures.supervised_share == 6 / 8


def test_held_out_samples_that_are_trained_on_are_counted() -> None:
    data = encoded([1] * 2, [2] * 4, [2] * 4, [3] * 6, supervised_from=1)
    assert overlap(data.subset([0, 1]), data.subset([2, 3])) == 1
    assert overlap(data.subset([0]), data.subset([1, 2, 3])) == 0
    assert overlap(data, data) == 4


def test_rendering_shows_every_figure(description: Description) -> None:
    console = Console(width=100, record=True)
    render(description, console)
    shown = console.export_text()
    for part in (
        "5 (of 9 records)",
        "87.5%",
        "mean 8.0, p5 2, p50 4, p95 24, p99 24, max 24",
        "duplicates           1",
    ):
        assert part in shown
    rows = [line for line in shown.splitlines() if " - " in line]
    assert len(rows) == 12
    assert [row.count("█") for row in rows[:4]] == [20, 40, 20, 0]


def test_supervised_text_is_marked_without_colour_too() -> None:
    tokenizer = tiny_tokenizer()
    record = Record(0, (Message("user", "the é 😀"), Message("assistant", "yes\n")))
    ids, supervised = encode_record(record, load_template("chatml"), tokenizer)
    labels = [token if counted else -100 for token, counted in zip(ids, supervised, strict=True)]
    text = colour(ids, labels, tokenizer)
    assert text.plain == "<s><|im_start|>user\nthe é 😀<|im_end|>\n<|im_start|>assistant\n⟦yes\n<|im_end|>⟧"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["<|im_end|>"] == "magenta"
    assert styles["y"] == "bold green"
    assert styles["e"] == "green"
    assert styles["he"] == "dim"


def test_spaces_of_sentencepiece_are_shown() -> None:
    tokenizer = tiny_sentencepiece_tokenizer()
    ids = tokenizer("the in the", add_special_tokens=False).input_ids
    assert colour(ids, [-100] * len(ids), tokenizer).plain == " the in the"


def test_control_characters_do_not_reach_the_terminal() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("\x1b[2J\x07", add_special_tokens=False).input_ids
    assert colour(ids, ids, tokenizer).plain == r"⟦\x1b[2J\x07⟧"
