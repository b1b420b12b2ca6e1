"""Secrets of settings and of the environment reach neither a run's files nor what is said of a fault."""

from pathlib import Path

import pytest
import yaml

from lit_tune.redact import HIDDEN
from tests.reliability.told import Told, surroundings, tiny_folder, told  # noqa: F401  # fixtures

FORMED = "hf_" + "abcdefghijklmnopqrst"  # known by its form
NAMED = "swordfish"  # known by its setting's name
HELD = "opensesame"  # known because a variable of such a name holds it
SECRETS = (FORMED, NAMED, HELD)


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_HUB_TOKEN", HELD)


def test_no_file_of_a_run_holds_a_secret(told: Told) -> None:  # noqa: F811
    Path("records.jsonl").rename(f"{HELD}.jsonl")
    board = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "board", "comment": f"https://me:{NAMED}@host {FORMED}"},
    }
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"logger": board}}))
    told("fit", "--config", "run.yaml", "--data.path", f"{HELD}.jsonl", "--name", "mine", code=0)
    files = [path for folder in ("runs", "board") for path in Path(folder).rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml"} <= {path.name for path in files}
    holding = [(path, secret) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]
    assert holding == []
    (config,) = (path for path in files if path.name == "config.yaml")
    assert yaml.safe_load(config.read_text())["data"]["path"] == f"{HIDDEN}.jsonl"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.path", f"{HELD}.jsonl"],
        ["--model.base", f"./{HELD}"],
        ["--model.method", FORMED],
        ["--model.token", NAMED],
        [f"--model.token={NAMED}"],
        ["--trainer.logger", f"{{class_path: CSVLogger, init_args: {{api_key: '{NAMED}'}}}}"],
        ["--name", f"https://me:{NAMED}@host/x"],
        ["--ckpt_path", f"https://host/a.ckpt?token={NAMED}"],
        [FORMED],
    ],
)
def test_what_is_said_of_a_fault_holds_no_secret(told: Told, arguments: list[str]) -> None:  # noqa: F811
    said = told("fit", *arguments)
    assert [secret for secret in SECRETS if secret in said] == []
