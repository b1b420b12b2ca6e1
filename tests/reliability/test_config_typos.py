"""A setting that is misspelt by one letter is refused, and the right one named; so are values that cannot be.

`fit`'s own parser is built once and only parses: no run is made.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from typing_extensions import override

from lit_tune.parser import TuneParser, restrict_imports
from lit_tune.quiet import quieten
from lit_tune.run import TuneCLI

LETTERS = string.ascii_letters + string.digits + "_-"
RIGHT_SHARE = 0.95  # of the typos for which the setting that was meant is suggested


class _BuiltError(Exception):
    """Carries fit's parser out of LightningCLI before it parses."""


class _ParserOnly(TuneCLI):
    @override
    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        raise _BuiltError(parser, self._subcommand_parsers["fit"])


@pytest.fixture(scope="module")
def parsers() -> tuple[TuneParser, TuneParser]:
    """Return the parser of the command line, and that of `fit` in it."""
    quieten()
    restrict_imports()
    with pytest.raises(_BuiltError) as built:
        _ParserOnly(["fit"])
    whole, fit = built.value.args
    return whole, fit


Refused = Callable[[Sequence[str]], str]


@pytest.fixture
def refused(parsers: tuple[TuneParser, TuneParser], capsys: pytest.CaptureFixture[str]) -> Refused:
    """Parse settings that must be refused with exit code 2, and return the one line that is said."""

    def parse(arguments: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as stop:  # a failure prints the arguments: none is random but by its seed
            parsers[0].parse_args(["fit", *arguments])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1), (arguments, out, err)
        assert err.startswith("lit-tune: ")
        return err

    return parse


# Names ----------------------------------------------------------------------------------------------------------------


def one_edit(name: str, draw: random.Random) -> str:
    """Change one letter in a random part of a dotted name: insert, delete, replace, or transpose with the next."""
    parts = name.split(".")
    part = draw.randrange(len(parts))
    word, letter = parts[part], draw.choice(LETTERS)
    at = draw.randrange(len(word))
    parts[part] = draw.choice(
        [
            word[:at] + letter + word[at:],
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at + 1 :],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
        ]
    )
    return ".".join(parts)


def typos(names: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield `count` pairs of a setting's name and a misspelling that is no setting itself."""
    draw = random.Random(seed)
    while count:
        name = draw.choice(names)
        wrong = one_edit(name, draw)
        if wrong not in names and all(wrong.split(".")):
            yield name, wrong
            count -= 1


def ways(name: str, folder: Path) -> dict[str, list[str]]:
    """Return the arguments that set `name` in each way there is."""
    nested: Any = 1
    for part in reversed(name.split(".")):
        nested = {part: nested}
    file = folder / "typo.yaml"
    file.write_text(yaml.safe_dump(nested))
    return {"joined": [f"--{name}=1"], "apart": [f"--{name}", "1"], "YAML": [f"--config={file}"]}


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_a_misspelt_setting_is_refused_and_the_right_one_suggested(
    count: int,
    parsers: tuple[TuneParser, TuneParser],
    refused: Refused,
    tmp_path: Path,
    report: Callable[[str], None],
) -> None:
    # What only prints help is no setting that a typo could change.
    known = list(parsers[1].keys())
    names = [key for key in known if key not in ("help", "print_config") and not key.endswith(".help")]
    draw = random.Random(1)
    without: list[str] = []
    for name, wrong in typos(names, count, seed=0):
        way, arguments = draw.choice(list(ways(wrong, tmp_path).items()))
        said = refused(arguments)
        assert f"there is no setting {wrong!r}." in said, f"{way}: {wrong} for {name}: {said}"
        if f"Did you mean {name!r}?" not in said:
            without.append(f"{way}: {wrong} for {name}: {said}")
    right = count - len(without)
    assert right >= RIGHT_SHARE * count, "".join(without)
    if count == 500:
        report(
            f"{count} one-edit typos in {len(names)} settings, on the command line and in YAML: 0 accepted, "
            f"each named in one line, the right setting suggested in {right / count:.1%}"
        )


def test_the_edits_are_of_one_letter() -> None:
    draw = random.Random(0)
    edits = {one_edit("ab.c", draw) for _ in range(2000)}
    assert {"b.c", "a.c", "ba.c", "xab.c", "axb.c", "xb.c", "ab.xc", "ab.x", "ab."} <= edits
    assert all(abs(len(edit) - len("ab.c")) <= 1 and edit.count(".") == 1 for edit in edits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitr=val/loss"], "'monitr'. Did you mean 'mon"),
        (["--trainer.callbacks=EarlyStoping"], "Did you mean 'EarlyStopping'?"),
        (["--trainer.callbacks=lightning.pytorch.callbacks.EarlyStoping"], "Did you mean 'EarlyStopping'?"),
        (["--trainer.callbacks", "[{class_pat: EarlyStopping}]"], "'class_pat'. Did you mean 'class_path'?"),
        (["--trainer.logger", "{class_path: CSVLogger, init_args: {save_dr: x}}"], "'save_dr'. Did you mean 'save_d"),
        (["--trainer.strategy.hlp=1"], "there is no setting 'trainer.strategy.hlp'"),
        (["--model.lora", "{rnk: 3}"], "there is no setting 'model.lora.rnk'. Did you mean 'model.lora.rank'?"),
        (["--model.lora.rank.x=3"], "there is no setting 'model.lora.rank.x'. Did you mean 'model.lora.rank'?"),
        (["fast"], "there is no setting 'fast'. `--help` lists all."),
        (["-x"], "there is no setting '-x'"),
    ],
)
def test_a_misspelt_class_or_setting_of_one_is_named(refused: Refused, arguments: list[str], said: str) -> None:
    assert said in refused(arguments)


# Values ---------------------------------------------------------------------------------------------------------------

CHOICES = {  # setting: a choice of it that is misspelt below
    "model.method": "lora",
    "model.quantize": "int8",
    "model.lora.variant": "rslora",
    "model.lora.bias": "lora_only",
    "model.optimizer": "adafactor",
    "model.schedule": "cosine",
    "model.gradient_checkpointing": "none",
    "data.over_length": "truncate",
    "trainer.precision": "bf16-mixed",
}


@pytest.mark.parametrize(("setting", "choice"), CHOICES.items())
def test_a_misspelt_choice_is_refused_and_the_right_one_suggested(
    refused: Refused, tmp_path: Path, setting: str, choice: str
) -> None:
    draw = random.Random(0)
    for _ in range(5):
        wrong = one_edit(choice, draw) if "." not in choice else choice
        if wrong == choice:
            continue
        said = refused([f"--{setting}={wrong}"])
        assert said.startswith(f"lit-tune: {setting}: {wrong!r} is not valid; use one of "), said
        assert f"Did you mean {choice!r}?" in said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--model.lora.rank=many", "model.lora.rank: 'many' is not valid; it takes int."),
        ("--model.lora.rank=1.5", "model.lora.rank: '1.5' is not valid; it takes int."),
        ("--model.lora.rank=", "model.lora.rank: '' is not valid; it takes int."),
        ("--model.lora.rank=1e999", "model.lora.rank: 'inf' is not valid; it takes int."),
        ("--model.lora.rank", "model.lora.rank: no value is given; write --model.lora.rank VALUE."),
        ("--model.lora=3", "model.lora: '3' is not valid; it takes settings by name, or a YAML file of them."),
        ("--samples.max_new_tokens=0", "samples.max_new_tokens is 0; it must be 1 or more."),
        ("--model=nowhere.yaml", "model: 'nowhere.yaml' is not valid; it takes settings by name, or a YAML file"),
        ("--data.columns=3", "data.columns: '3' is not valid; it takes dict."),
        ("--data.packing=maybe", "data.packing: 'maybe' is not valid; it takes bool."),
        ("--trainer.max_epochs=two", "trainer.max_epochs: 'two' is not valid; it takes int."),
        ("--model.learning_rate=.nan", "model.learning_rate is not a number (nan)"),
        ("--model.learning_rate=-1e-4", "model.learning_rate is -0.0001; it must be 0 or more."),
        ("--model.weight_decay=-1", "model.weight_decay is -1; it must be 0 or more."),
        ("--seed_everything=-1", "seed_everything is -1; it must be between 0 and 4294967295."),
        ("--seed_everything=4294967296", "seed_everything is 4294967296; it must be between 0 and 4294967295."),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0; it must be 1 or more."),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch is 0; it must be 1 or more."),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1; it must be 0 or more."),
        ("--model=null", "model: 'null' is not valid; it takes settings by name, or a YAML file of them."),
        ("--model.lora={class_path: os.system}", "'os.system' cannot be used: a configuration may name classes of "),
    ],
)
def test_a_value_that_cannot_be_is_refused(refused: Refused, argument: str, said: str) -> None:
    assert said in refused([argument])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: 12", "name: '12' is not valid; it takes text: put it in quotes."),
        ("name: yes", "name: 'True' is not valid; it takes text: put it in quotes."),
        ("model: {lora: {rank: '1 6'}}", "model.lora.rank: '1 6' is not valid; it takes int."),
        ("model:", "the configuration holds no settings; write them by name"),
        ("model: null\nname: a", "model holds no settings; leave it out"),
        ("trainer: {max_epochs: 1, max_epochs: 2}", "'max_epochs' stands twice; keep one"),
        ("1: 2", "must be a string"),
    ],
)
def test_a_value_of_a_file_that_cannot_be_is_refused(refused: Refused, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "values.yaml").write_text(text)
    assert said in refused(["--config", str(tmp_path / "values.yaml")])
