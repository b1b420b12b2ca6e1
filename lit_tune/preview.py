"""Looking before running: `lit-tune data`, `lit-tune configs`, `lit-tune env`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_tune import recipes
from lit_tune.environment import environment
from lit_tune.errors import InputError

if TYPE_CHECKING:
    from lit_tune.data.instruct import Prepared

# -- lit-tune data -----------------------------------------------------------------------------------------------------


def data(arguments: list[str]) -> None:
    """Show what training will see of the records: takes every setting of `fit`, and --show with sample numbers."""
    from lit_tune.run import build  # noqa: PLC0415  # imports torch and lightning

    built = build(arguments, description="Show what training will see of the records.", options=_add_options)
    show = built.settings["show"]
    prepared = built.datamodule.prepare(built.model.load_tokenizer)
    print_data(Console(highlight=False), prepared, path=built.datamodule.path, show=show)


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--show", type=list[int], default=[0], help="Numbers of the samples to print token by token, such as [0,17]."
    )


def print_data(console: Console, prepared: Prepared, *, path: str, show: list[int]) -> None:
    """Print figures and a histogram of the training samples, and some of them token by token.

    Raises:
        InputError: A number in `show` is not that of a sample.
    """
    from lit_tune.data.describe import colour, describe, overlap, render  # noqa: PLC0415

    samples = len(prepared.train)
    if wrong := [number for number in show if not 0 <= number < samples]:
        raise InputError(f"--show: there is no sample {wrong[0]}; {path} gives 0 to {samples - 1}.")
    console.print(Text(f"Data {path}, template {prepared.template.name}"), style="bold")  # a Text, for [x] is no markup
    render(describe(prepared.train), console)
    if prepared.val is not None:
        console.print("\nHeld out", style="bold")
        render(describe(prepared.val), console)
        if shared := overlap(prepared.train, prepared.val):
            console.print(f"{shared:,} of these are trained on too, word for word", style="yellow")
    for number in show:
        tokens, labels = prepared.train.sample(number)
        record = int(prepared.train.ids[number])
        console.print(f"\nSample {number} (record {record}): ⟦supervised⟧, the rest is masked", style="bold")
        console.print(colour(tokens.tolist(), labels.tolist(), prepared.tokenizer))


# -- lit-tune configs --------------------------------------------------------------------------------------------------


def configs(arguments: list[str]) -> None:
    """List the recipes that come with the package."""
    if _asks_for_help(arguments, "configs", "List the recipes that come with lit-tune, for --config NAME."):
        return
    _print_pairs({name: recipes.purpose(path) for name, path in recipes.shipped().items()})


# -- lit-tune env ------------------------------------------------------------------------------------------------------


def env(arguments: list[str]) -> None:
    """Print versions, devices and memory, without names, paths or secrets."""
    if _asks_for_help(arguments, "env", "Print versions, devices and memory, for a bug report; no names, no secrets."):
        return
    _print_pairs(environment())


def _print_pairs(rows: dict[str, str]) -> None:
    """Print names and what belongs to them in two columns, the second folded at the terminal's width."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    Console(highlight=False).print(table)


def _asks_for_help(arguments: list[str], command: str, text: str) -> bool:
    """Answer `--help` of a tool without settings; refuse anything else."""
    if not arguments:
        return False
    if arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: lit-tune {command}\n\n{text}\n")
        return True
    raise InputError(f"lit-tune {command} takes no settings, but was given {arguments[0]!r}.")
