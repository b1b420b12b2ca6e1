import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from jsonargparse._common import default_import_path_denylist, parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lit_tune.errors import InputError
from lit_tune.parser import (
    ALLOWED_PATHS,
    TuneParser,
    bad_value,
    explain,
    one_line,
    refusals,
    restrict_imports,
    suggestion,
)

KEYS = ["config", "name", "trainer.max_epochs", "trainer.max_steps", "model.learning_rate", "model.lora.rank"]

# What jsonargparse says of a value that none of several types fits.
UNION = """\
  Does not validate against any of the Union subtypes
  Subtypes: [{types}, <class 'NoneType'>]
  Errors:
    - Expected a ...
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: {value}"""


class Model:
    def __init__(
        self,
        method: Literal["lora", "fft"] = "lora",
        learning_rate: float | None = None,
        checkpointing: Literal["none", "full"] | int = "none",
        anything: Any = None,
        columns: dict[str, str] | None = None,
    ) -> None:
        self.method = method


def make_parser() -> TuneParser:
    parser = TuneParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--max_epochs", type=int, default=1)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None, default=None)
    parser.add_class_arguments(Model, "model")
    return parser


Told = Callable[[Sequence[str]], str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Parse a command line that is wrong, and return the one line that the user is told."""

    def parse(arguments: Sequence[str], parser: TuneParser | None = None) -> str:
        with pytest.raises(SystemExit) as stop:
            (parser or make_parser()).parse_args(list(arguments))
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("lit-tune: ")
        assert err.count("\n") == 1
        return err.removeprefix("lit-tune: ").rstrip("\n")

    return parse


@pytest.fixture(autouse=True)
def unrestricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with jsonargparse's own policy on imports, which is one for the whole process."""
    verdicts = dict.fromkeys(default_import_path_denylist, False)
    monkeypatch.setitem(parsing_settings, "import_path_verdicts", verdicts)
    monkeypatch.setitem(parsing_settings, "import_paths_enforced", False)


# Explaining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "unrecognized arguments: --trainer.max_epoch=3",
        "unrecognized arguments: --trainer.max_epoch 3 --and more",
        'Key "trainer.max_epoch" is not expected',
        "No action for key 'trainer.max_epoch' to check its value.",
        "Option 'trainer.max_epoch' is not accepted",
        "Group 'trainer' does not accept option 'max_epoch'",
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(message: str) -> None:
    assert explain(message, KEYS) == ("there is no setting 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("max_epochs", "trainer.max_epochs"),  # without its group
        ("model.max_epochs", "trainer.max_epochs"),  # in another group
        ("learningrate", "model.learning_rate"),
        ("model.rank", "model.lora.rank"),
        ("nmae", "name"),
        ("zzz", None),
    ],
)
def test_suggestions(key: str, near: str | None) -> None:
    assert suggestion(key, KEYS) == (f" Did you mean {near!r}?" if near else "")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("unrecognized arguments: fast", "there is no setting 'fast'. `--help` lists all."),
        ("unrecognized arguments: ---name", "there is no setting '-name'. Did you mean 'name'?"),
        (
            "Parser key \"model.lora.rank\":\n  Expected a <class 'int'>. Got value: NestedArg(key='x', val='3')",
            "there is no setting 'model.lora.rank.x'. Did you mean 'model.lora.rank'?",
        ),
        ("argument -c/--config: expected one argument", "config: no value is given; write --config VALUE."),
        ("the following arguments are required: monitor", "it needs monitor"),
        ("Unexpected config: 3", "the configuration holds no settings; write them by name, such as `model: {method: "),
    ],
)
def test_what_is_missing_or_too_much_is_told(message: str, line: str) -> None:
    assert explain(message, KEYS).startswith(line)


def test_nothing_is_suggested_from_nothing() -> None:
    assert suggestion("max_epochs", []) == ""


@pytest.mark.parametrize(
    ("text", "explained"),
    [
        ("  Expected a <class 'int'>. Got value: many", "'many' is not valid; it takes int."),
        (
            "  Expected a typing.Literal['lora', 'fft']. Got value: lorra",
            "'lorra' is not valid; use one of lora, fft. Did you mean 'lora'?",
        ),
        ("  Expected a typing.Literal['lora', 'fft']. Got value: 7", "'7' is not valid; use one of lora, fft."),
        # Not str, which is only what was given.
        (
            UNION.format(types="<class 'int'>, <class 'float'>", value="many"),
            "'many' is not valid; it takes int or float.",
        ),
        (
            UNION.format(types="typing.Literal['none', 'full'], <class 'int'>", value="ful"),
            "'ful' is not valid; use one of none, full, int. Did you mean 'full'?",
        ),
        (
            UNION.format(types="<class 'lightning.pytorch.callbacks.callback.Callback'>", value="x"),
            "'x' is not valid; it takes Callback.",
        ),
        (
            UNION.format(types="<class 'lightning.pytorch.callbacks.callback.Callback'>", value="EarlyStoping"),
            "'EarlyStoping' is not valid; it takes Callback. Did you mean 'EarlyStopping'?",
        ),
        (UNION.format(types="<class 'str'>", value="12"), "'12' is not valid; it takes text: put it in quotes."),
        (UNION.format(types="<class 'str'>", value="[12]"), "'[12]' is not valid; it takes str."),
        ("Unable to load config 'x.yaml'", "'x.yaml' is not valid; it takes settings by name, or a YAML file of them."),
        (
            "  - Problem with given class_path 'torch.nn.Liner':\n      module 'torch.nn' has no attribute 'Liner'\n"
            + UNION.format(types="<class 'int'>", value="torch.nn.Liner"),
            "'torch.nn.Liner' cannot be used: module 'torch.nn' has no attribute 'Liner'.",
        ),
        ("File does not exist: 'x.yaml'", "File does not exist: 'x.yaml'"),
    ],
)
def test_a_bad_value_is_told_with_what_would_be_right(text: str, explained: str) -> None:
    assert bad_value(text) == explained
    assert explain(f'Parser key "model.x":\n{text}', KEYS) == f"model.x: {explained}"


def test_what_is_not_known_is_said_in_one_line() -> None:
    assert one_line("Problems:\n  - first\n\n  - second\n") == "Problems: first second"


# What lightning refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        MisconfigurationException("`max_epochs` must be\n  more"),
        ValueError("`max_epochs` must be more"),
        TypeError("`max_epochs` must be more"),
        ModuleNotFoundError("`max_epochs` must be more"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_what_lightning_refuses_is_the_users_fault_in_one_line(fault: Exception) -> None:
    with pytest.raises(InputError, match=r"^trainer: `max_epochs` must be more$"), refusals():
        raise fault


def test_while_it_trains_fewer_errors_are_the_users_fault() -> None:
    with pytest.raises(ValueError, match="a bug") as raised, refusals((MisconfigurationException,)):
        raise ValueError("a bug")
    assert type(raised.value) is ValueError
    for fault in (MisconfigurationException("no"), RuntimeError("Early stopping conditioned on metric `a` which is")):
        with pytest.raises(InputError), refusals((MisconfigurationException,)):
            raise fault


def test_faults_of_ours_and_those_already_told_stay_as_they_are() -> None:
    for fault in (InputError("model.x is 3"), KeyError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(fault)) as raised, refusals():
            raise fault
        assert raised.value is fault


# Parsing --------------------------------------------------------------------------------------------------------------


def test_all_settings_are_known_by_their_full_names() -> None:
    assert {"config", "max_epochs", "callbacks", "model.method", "model.learning_rate"} <= set(make_parser().keys())


@pytest.mark.parametrize("key", ["max_epoch", "max_epo", "max-epochs"])
def test_an_abbreviation_is_refused_and_not_taken_for_the_setting(told: Told, key: str) -> None:
    assert told([f"--{key}=3"]) == f"there is no setting {key!r}. Did you mean 'max_epochs'?"


def test_an_unknown_setting_of_a_group_is_refused_on_the_command_line_and_in_yaml(told: Told, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  metod: fft\n")
    expected = "there is no setting 'model.metod'. Did you mean 'model.method'?"
    assert told(["--model.metod=fft"]) == expected
    assert told([f"--config={config}"]) == expected


def test_an_unknown_setting_at_the_top_of_yaml_is_refused(told: Told, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("max_epoch: 3\n")
    assert told([f"--config={config}"]).startswith("there is no setting 'max_epoch'. Did you mean 'max_epochs'?")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--max_epochs=many", "max_epochs: 'many' is not valid; it takes int."),
        ("--model.method=lorra", "model.method: 'lorra' is not valid; use one of lora, fft. Did you mean 'lora'?"),
        ("--model.learning_rate=fast", "model.learning_rate: 'fast' is not valid; it takes float."),
        (
            "--model.checkpointing=ful",
            "model.checkpointing: 'ful' is not valid; use one of none, full, int. Did you mean 'full'?",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_one_line(told: Told, argument: str, expected: str) -> None:
    assert told([argument]) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"patince": 3}, "there is no setting 'patince'. Did you mean 'patience'?"),
        ({"monitor": "a", "patience": "x"}, "patience: 'x' is not valid; it takes int."),
        ({}, "it needs monitor."),
    ],
)
def test_a_wrong_setting_of_a_class_is_told_with_the_place_and_the_class(
    told: Told, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    path = "lightning.pytorch.callbacks.EarlyStopping"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"callbacks": [{"class_path": path, "init_args": settings}]}))
    assert told([f"--config={config}"]) == f"callbacks: {path!r} cannot be used: {expected}"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0; it must be 1 or more."),
        ("--seed_everything=-1", f"seed_everything is -1; it must be between 0 and {2**32 - 1}."),
        ("--model.learning_rate=.nan", "model.learning_rate is not a number (nan); give one."),
    ],
)
def test_a_number_out_of_its_range_is_refused_in_a_command_too(
    capsys: pytest.CaptureFixture[str], argument: str, expected: str
) -> None:
    fit = make_parser()
    fit.add_argument("--trainer.accumulate_grad_batches", type=int, default=1)
    fit.add_argument("--seed_everything", type=int | None, default=None)
    whole = TuneParser()
    whole.add_subcommands().add_subcommand("fit", fit)
    for parser, arguments in ((fit, [argument]), (whole, ["fit", argument])):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert capsys.readouterr().err == f"lit-tune: {expected}\n"


def test_secrets_are_hidden_in_what_is_told(told: Told) -> None:
    assert told(["--model.metod=hf_" + "a" * 20]) == "there is no setting 'model.metod'. Did you mean 'model.method'?"
    assert told(["--model.method=hf_" + "a" * 20]).startswith("model.method: '[hidden]' is not valid; use one of ")


def test_a_commands_own_settings_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    parser = TuneParser()
    commands = parser.add_subcommands()
    commands.add_subcommand("fit", make_parser())
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "--model.metod=fft"])
    assert "Did you mean 'model.method'?" in capsys.readouterr().err


def test_what_is_right_is_parsed() -> None:
    parsed = make_parser().parse_args(["--max_epochs=3", "--model.method=fft", "--model.checkpointing=4"])
    assert (parsed.max_epochs, parsed.model.method, parsed.model.checkpointing) == (3, "fft", 4)


# No code from configurations ------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a module `somebodys` with a callback on Python's path; it makes the returned file when it is imported."""
    trace = tmp_path / "imported"
    (tmp_path / "somebodys.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "from lightning.pytorch import Callback\nclass Own(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    return trace


OWN = {"class_path": "somebodys.Own"}
WAYS = {
    "by name": {"callbacks": "somebodys.Own"},
    "as a class": {"callbacks": OWN},
    "in a list": {"callbacks": [OWN]},
    "beside an allowed one": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelSummary"}, OWN]},
    "through an allowed package": {"callbacks": {"class_path": "lightning.somebodys.Own"}},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_a_class_of_another_package_is_refused_before_it_is_imported(
    told: Told, tmp_path: Path, trace: Path, settings: dict[str, Any]
) -> None:
    restrict_imports()
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert "somebodys.Own' cannot be used: " in told([f"--config={config}"])
    assert not trace.exists()
    assert "somebodys" not in sys.modules


@pytest.mark.parametrize("key", ["anything", "columns"])
def test_where_no_class_is_expected_none_is_imported_either(tmp_path: Path, trace: Path, key: str) -> None:
    restrict_imports()
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": {key: OWN}}))
    parser = make_parser()
    parser.instantiate_classes(parser.parse_args([f"--config={config}"]))
    assert not trace.exists()


def test_the_users_own_code_is_imported_when_trusted(trace: Path) -> None:
    restrict_imports(trusted=True)
    parser = make_parser()
    made = parser.instantiate_classes(parser.parse_args(["--callbacks=somebodys.Own"]))
    assert isinstance(made.callbacks, Callback)
    assert trace.exists()


@pytest.mark.parametrize("path", ["os.system", "builtins.eval", "jsonargparse.ArgumentParser", "subprocess.Popen"])
def test_pythons_own_callables_are_refused(told: Told, path: str) -> None:
    restrict_imports()
    assert told([f"--callbacks={path}"]) == (
        f"callbacks: {path!r} cannot be used: a configuration may name classes of {', '.join(ALLOWED_PATHS)}, not "
        "LambdaCallback."
    )


@pytest.mark.parametrize(
    "path",
    [
        "lightning.pytorch.callbacks.LambdaCallback",
        "lightning.pytorch.callbacks.lambda_function.LambdaCallback",
        "LambdaCallback",
    ],
)
def test_a_callback_that_calls_a_function_by_its_name_is_refused(
    told: Told, tmp_path: Path, path: str, trace: Path
) -> None:
    restrict_imports()
    config = tmp_path / "run.yaml"
    callback = {"class_path": path, "init_args": {"on_fit_start": "somebodys.Own"}}
    config.write_text(yaml.safe_dump({"callbacks": [callback]}))
    assert told([f"--config={config}"]).startswith("callbacks: ")
    assert not trace.exists()


def test_yaml_that_builds_objects_is_refused(told: Told, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"max_epochs: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    assert "python/object/apply:os.mkdir" in told([f"--config={config}"])
    assert not (tmp_path / "made").exists()


def test_classes_of_known_packages_are_taken() -> None:
    restrict_imports()
    parser = make_parser()
    arguments = ["--callbacks=EarlyStopping", "--callbacks.monitor=val/loss"]
    (early_stopping,) = parser.instantiate_classes(parser.parse_args(arguments)).callbacks
    assert isinstance(early_stopping, EarlyStopping)
    assert early_stopping.monitor == "val/loss"
