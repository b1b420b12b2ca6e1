"""What may not change when a run goes on: settings are compared by name and refused with both values shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lit_tune.errors import InputError

Setting = str | int | float | bool | None | list[str]


def changed(saved: Mapping[str, Setting], now: Mapping[str, Setting]) -> list[str]:
    """Return the names of the settings that a checkpoint has with another value."""
    return [name for name, value in now.items() if saved.get(name) != value]


def refuse_changes(
    saved: Mapping[str, Setting],
    now: Mapping[str, Setting],
    *,
    allowed: Collection[str] = (),
    fixed: Collection[str] = (),
) -> None:
    """Refuse to go on with settings that make another run of it.

    Args:
        saved: The settings that the checkpoint was made with.
        now: Those of this run.
        allowed: Names of those that may differ, because the user said so.
        fixed: Names of those that cannot differ whatever the user says: the checkpoint would not fit.

    Raises:
        InputError: One differs that may not; the text names all that do.
    """
    refused = [name for name in changed(saved, now) if name in fixed or name not in allowed]
    if not refused:
        return
    listed = "; ".join(
        f"{name}: the checkpoint was made with {saved.get(name)}, this run has {now[name]}" for name in refused
    )
    takeable = [name for name in refused if name not in fixed]
    taking = f", or take the change with --allow_changed {','.join(takeable)}" if takeable == refused else ""
    raise InputError(f"{listed}. Continue with what it was made with, or start a new run{taking}.")
