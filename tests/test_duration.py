import pytest

from lit_tune.duration import seconds_of
from lit_tune.errors import InputError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("90m", 90 * 60),
        ("1h30m", 5400),
        ("2d", 2 * 86_400),
        ("1d2h3m4s", 86_400 + 2 * 3600 + 3 * 60 + 4),
        (" 5m ", 300),
        ("01:30:00", 5400),
        ("00:00:01", 1),
        ("100:00:00", 360_000),
        ("1-12:00:00", 36 * 3600),  # as in SLURM's time limits
    ],
)
def test_a_length_of_time_is_read(text: str, seconds: int) -> None:
    assert seconds_of(text, setting="--time-limit") == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "90", "1.5h", "-5m", "m", "30m1h", "1h30", "90min", "0s", "00:00:00", "01:60:00", "1:2:3", "5m 3s"],
)
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        seconds_of(text, setting="--time-limit")
    assert str(refused.value) == f"--time-limit is {text!r}; give a length of time such as 90m, 1h30m or 01:30:00."
