from typing import Any

import pytest

from lit_tune.continuation import changed, refuse_changes
from lit_tune.errors import InputError

SAVED: dict[str, Any] = {"a.rate": 0.1, "a.rank": 4, "b.names": ["x", "y"], "b.path": None}


def refusal(now: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(InputError) as refused:
        refuse_changes(SAVED, now, **settings)
    return str(refused.value)


def test_what_differs_is_named() -> None:
    assert changed(SAVED, dict(SAVED)) == []
    assert changed(SAVED, SAVED | {"a.rank": 8, "b.names": ["x"]}) == ["a.rank", "b.names"]
    assert changed(SAVED, {"a.rate": 0.1}) == []  # the checkpoint may know more
    assert changed({}, {"a.rank": None}) == []
    assert changed({}, {"a.rank": 8}) == ["a.rank"]


def test_the_same_settings_are_no_fault() -> None:
    refuse_changes(SAVED, dict(SAVED), fixed=["a.rank"])


def test_a_change_is_refused_with_both_values_and_the_way_to_take_it() -> None:
    assert refusal(SAVED | {"a.rate": 0.2}) == (
        "a.rate: the checkpoint was made with 0.1, this run has 0.2. Continue with what it was made with, or start a "
        "new run, or take the change with --allow_changed a.rate."
    )


def test_all_changes_are_told_at_once() -> None:
    told = refusal(SAVED | {"a.rate": 0.2, "b.path": "z"})
    assert (
        "a.rate: the checkpoint was made with 0.1, this run has 0.2; b.path: the checkpoint was made with None" in told
    )
    assert told.endswith("--allow_changed a.rate,b.path.")


def test_a_change_that_is_allowed_is_taken() -> None:
    refuse_changes(SAVED, SAVED | {"a.rate": 0.2}, allowed=["a.rate", "b.path"])
    told = refusal(SAVED | {"a.rate": 0.2, "b.path": "z"}, allowed=["a.rate"])
    assert "a.rate" not in told
    assert told.endswith("--allow_changed b.path.")


def test_what_is_fixed_cannot_be_allowed() -> None:
    told = refusal(SAVED | {"a.rank": 8}, allowed=["a.rank"], fixed=["a.rank"])
    assert told == (
        "a.rank: the checkpoint was made with 4, this run has 8. Continue with what it was made with, or start a new "
        "run."
    )
    # The flag would help one of two, and so neither.
    assert "--allow_changed" not in refusal(SAVED | {"a.rank": 8, "a.rate": 1.0}, fixed=["a.rank"])
