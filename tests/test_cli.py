"""What the user is told: one line on stderr with the place and the remedy, and an exit code; and no more than once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lit_tune import cli, signals
from lit_tune.errors import Interrupted, NonFiniteError, OutOfMemoryError, SaveError
from lit_tune.logs import read_metrics
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import tiny_base, tiny_llama
from tests.tiny_run import lit_tune, write_records

GOOD = {"instruction": "Say yes.", "output": "yes"}


@pytest.fixture
def tiny(working_directory: Path) -> list[str]:
    """Make a base and records in an empty working directory; return the settings of a run with them."""
    tiny_base(working_directory / "base")
    write_records(working_directory / "records.jsonl")
    return [
        *("--model.base", "base", "--data.path", "records.jsonl", "--data.template", "chatml"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--samples.prompts", "[]"),
        *("--memory.predict", "false"),  # which has tests of its own
    ]


@pytest.fixture
def refusal(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `lit-tune fit` with settings that must be refused; return what is said, and see that nothing is left."""

    def refused(*settings: str, command: str = "fit") -> str:
        before = sorted(Path().iterdir())
        assert lit_tune(command, *tiny, *settings) == 2
        said = capsys.readouterr().err
        assert said.startswith("lit-tune: ")
        assert said.count("\n") == 1
        assert said.endswith("\n")
        assert [path for path in Path().iterdir() if path not in before and path.name != "runs"] == []
        assert list(Path("runs").glob("*")) == []
        return said

    return refused


Refusal = Callable[..., str]


# Exit codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (MemoryError("of the host"), 3, r"out of host memory: of the host\. Lower data\.micro_batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
            3,
            r"out of memory: CUDA out of memory\. Tried Lower",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 3, "out of memory: DefaultCPUAllocator"),
        (OutOfMemoryError("too much", "a table\nof it"), 3, "too much"),
        (SaveError("the disk is full"), 4, "the disk is full"),
        (NonFiniteError("the loss is nan"), 5, "the loss is nan"),
        (Interrupted(signal.SIGINT, "a.ckpt"), 130, "stopped by SIGINT; saved a.ckpt; go on with --ckpt_path last"),
        (Interrupted(signal.SIGTERM, None), 143, "stopped by SIGTERM; nothing was saved"),
        (Interrupted(signal.SIGTERM, "a.ckpt", "--time-limit"), 143, "stopped by --time-limit; saved a.ckpt; go on"),
    ],
)
def test_every_fault_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], fault: BaseException, code: int, said: str
) -> None:
    def fail() -> NoReturn:
        raise fault

    assert cli.exit_code(fail) == code
    printed = capsys.readouterr().err
    assert re.match(rf"lit-tune: {said}", printed), printed
    assert printed.count("\n") == 1


def test_what_memory_was_taken_follows_the_fault_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> NoReturn:
        raise OutOfMemoryError("too much", "a table\nof it")

    assert cli.exit_code(fail) == 3
    assert capsys.readouterr() == ("a table\nof it\n", "lit-tune: too much\n")


def test_of_a_fault_on_all_ranks_rank_0_speaks_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*, on_all_ranks: bool) -> NoReturn:
        raise OutOfMemoryError("too much", "a table", on_all_ranks=on_all_ranks)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(signals, "let_parent_end", lambda: None)
    assert cli.exit_code(lambda: fail(on_all_ranks=True)) == 3
    assert capsys.readouterr() == ("", "")
    assert cli.exit_code(lambda: fail(on_all_ranks=False)) == 3
    assert capsys.readouterr() == ("a table\n", "lit-tune: too much\n")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def fail() -> NoReturn:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.exit_code(fail)


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK"])
def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert lit_tune("fti") == 2
    assert capsys.readouterr() == ("", "")


# Commands and settings ------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("--help") == lit_tune() == lit_tune("-h") == 0
    said = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "data", "configs", "env"):
        assert f"\n  {command} " in said


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("--version") == 0
    assert capsys.readouterr().out == f"lit-tune {cli.version()}\n"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_help_of_a_command_explains_its_settings(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert lit_tune(command, "--help") == 0
    said = capsys.readouterr().out
    for setting in ("--model.lora.rank", "--data.limit", "--trainer.max_epochs", "--ckpt_path", "--name"):
        assert setting in said


def test_print_config_prints_what_config_takes(capsys: pytest.CaptureFixture[str], working_directory: Path) -> None:
    assert lit_tune("fit", "--config", "lora.yaml", "--print_config") == 0
    printed = capsys.readouterr().out
    Path("mine.yaml").write_text(printed)
    assert lit_tune("fit", "--config", "mine.yaml", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)
    assert not Path("runs").exists()


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert lit_tune("fti") == 2
    said = capsys.readouterr().err
    assert said.startswith("lit-tune: there is no command 'fti'. Did you mean 'fit'? Commands: fit, validate, ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("--trainer.max_epoch", "trainer.max_epochs"),  # an abbreviation is no setting
        ("--model.learning_rat", "model.learning_rate"),
        ("--model.lora.rnak", "model.lora.rank"),
        ("--learning_rate", "model.learning_rate"),
        ("--data.micro_batchsize", "data.micro_batch_size"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(refusal: Refusal, setting: str, near: str) -> None:
    assert f"there is no setting {setting.removeprefix('--')!r}. Did you mean {near!r}?" in refusal(setting, "1")
    assert f"Did you mean {near!r}?" in refusal(f"{setting}=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {learning_rat: 1}", "'model.learning_rate'"),
        ("trainer: {max_epoch: 1}", "'trainer.max_epochs'"),
        ("model: {lora: {rnk: 1}}", "'model.lora.rank'"),
        ("modle: {lora: {rank: 1}}", "modle"),
        ("model: [1", "wrong.yaml:1: this is no YAML"),
    ],
)
def test_a_fault_in_a_config_file_is_told(refusal: Refusal, tmp_path_factory: Any, text: str, said: str) -> None:
    path = tmp_path_factory.mktemp("config") / "wrong.yaml"
    path.write_text(text)
    assert said in refusal("--config", str(path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--config", "lroa.yaml"], "no file lroa.yaml here and no recipe of that name. Did you mean lora.yaml?"),
        (["--model.method", "lroa"], "model.method: 'lroa' is not valid; use one of lora, fft. Did you mean 'lora'?"),
        (["--model.quantize", "nf5"], "use one of none, int8, nf4, fp4"),
        (["--trainer.precision", "bf17-mixed"], "bf16-mixed"),
        (["--data.over_length", "cut"], "use one of drop, truncate, fail"),
        (["--data.template", "alpca"], "did you mean 'alpaca'?"),
        (["--data.template", "chat"], "the tokenizer has no chat template; use one of alpaca, llama2, llama3, chatml"),
        (["--model.lora.targets", "[q_prj]"], "'q_prj' is no linear layer of this model; valid are down_proj, "),
        (["--model.lora.rank", "0"], "model.lora.rank is 0; it must be 1 or more"),
        (["--model.lora.rank", "many"], "model.lora.rank: 'many' is not valid; it takes int"),
        (["--model.learning_rate", "fast"], "'fast' is not valid"),
        (["--model.warmup", "1.5"], "model.warmup is 1.5"),
        (["--model.method", "fft", "--model.quantize", "nf4"], "quantised weights cannot train"),
        (["--model.adapter", "base"], "base holds no adapter_config.json"),
        (["--model.base", "./none"], "there is no directory './none'"),
        (["--model.base", "llama2-7b"], "names an architecture whose figures come with lit-tune, not its weights"),
        (["--data.path", "nowhere.json"], "nowhere.json"),
        (["--data.path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.val_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.limit", "[0:x]"], "limit '[0:x]' is no range of records"),
        (["--data.limit", "[50:60]"], "selects none of the 19 records"),
        (["--data.max_length", "5"], "all 19 records are longer than max_length 5"),
        (["--data.over_length", "fail", "--data.max_length", "5"], "records.jsonl:1: the record has "),
        (["--data.global_batch_size", "6", "--data.micro_batch_size", "4"], "data.global_batch_size 6"),
        (["--name", "a/b"], "'a/b' is no plain folder name"),
        (["--trainer.accelerator", "gpu"], "no CUDA GPU is visible"),
        (["--time-limit", "90"], "--time-limit is '90'; give a length of time such as 90m, 1h30m or 01:30:00."),
        (
            ["--allow_changed", "model.learning_rat"],
            "no setting 'model.learning_rat'. Did you mean 'model.learning_rate'",
        ),
        (["--model.skip_nonfinite", "-1"], "model.skip_nonfinite is -1; it must be 0 or more."),
        (["--checkpoint.every_minutes", "0"], "checkpoint.every_minutes is 0.0; it must be more than 0."),
        (["--trainer.limit_train_batches", "0.5"], "trainer.limit_train_batches is 0.5: it would cut epochs where no"),
        (["--trainer.overfit_batches", "1"], "trainer.overfit_batches is 1: it would cut epochs where no checkpoint"),
        (["--ckpt_path", "last"], "no run named lora under runs has an intact checkpoint"),
        (["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_be_is_told(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert said in refusal(*settings)


def test_more_devices_than_there_are_are_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "trainer.devices is 4, but 2 GPU(s) are visible; ask for at most 2." in refusal("--trainer.devices", "4")


@pytest.mark.parametrize("path", ["os.system", "lightning.pytorch.callbacks.LambdaCallback", "tests.tiny_run.Watch"])
def test_a_config_names_no_code_of_its_own(refusal: Refusal, path: str) -> None:
    assert path in refusal("--trainer.callbacks", json.dumps([{"class_path": path}]))


# Records --------------------------------------------------------------------------------------------------------------


def write(path: str, *values: Any) -> None:
    """Write values, or texts as they are, a line each."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    Path(path).write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"instruction": "a", "output": ', "bad.jsonl:2:32: malformed JSON"),
        ("no json", "bad.jsonl:2:1: malformed JSON"),
        ({"instruction": "a"}, "bad.jsonl:2: 'output' is missing"),
        ({"output": "a"}, "bad.jsonl:2: 'instruction' is missing"),
        ({"instruction": " ", "output": "a"}, "bad.jsonl:2: 'instruction' is empty"),
        ({"instruction": "a", "output": ""}, "bad.jsonl:2: 'output' is empty"),
        ({"instruction": "a", "output": 3}, "bad.jsonl:2: 'output' is a number; it must be a string"),
        ({"instruction": "a", "output": None}, "bad.jsonl:2: 'output' is null"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "bad.jsonl:2: 'input' is a list"),
        (["a"], "bad.jsonl:2: the record is a list"),
        ({"messages": []}, "bad.jsonl:2: 'messages' is an empty list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "bad.jsonl:2: 'messages' ends with a user turn"),
    ],
    ids=str,
)
def test_a_bad_record_is_told_with_file_line_and_field(tiny: list[str], refusal: Refusal, bad: Any, said: str) -> None:
    write("bad.jsonl", GOOD, bad, GOOD)
    assert said in refusal("--data.path", "bad.jsonl")


def test_a_bad_record_of_a_json_array_is_told_with_its_line(refusal: Refusal) -> None:
    Path("bad.json").write_text('[\n {"instruction": "a", "output": "b"},\n {"instruction": "a"}\n]')
    assert "bad.json:3: 'output' is missing" in refusal("--data.path", "bad.json")
    Path("bad.json").write_text('[\n {"instruction": "a", "output": "b"},\n {"instruction" "a"}\n]')
    assert "bad.json:3:17: malformed JSON" in refusal("--data.path", "bad.json")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "instruction,output\n")])
def test_an_empty_data_set_is_refused(refusal: Refusal, name: str, text: str) -> None:
    Path(name).write_text(text)
    assert name in refusal("--data.path", name)


def test_data_without_supervised_token_is_refused(refusal: Refusal) -> None:
    write("long.jsonl", {"instruction": "a " * 500, "output": "b"})
    said = refusal("--data.path", "long.jsonl", "--data.max_length", "99", "--data.over_length", "truncate")
    assert "no supervised token is left" in said


# Bases ----------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_refused(refusal: Refusal) -> None:
    tiny_base(Path("endless"), tokenizer=tiny_tokenizer(eos=False))
    assert "has no end-of-sequence token" in refusal("--model.base", "endless")


def test_a_base_without_tokenizer_is_refused(refusal: Refusal) -> None:
    tiny_llama().save_pretrained("mute")
    assert "no tokenizer could be read from" in refusal("--model.base", "mute")


def test_a_base_that_is_no_causal_language_model_is_refused(refusal: Refusal) -> None:
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained("bert")
    tokenizer.save_pretrained("bert")
    said = refusal("--model.base", "bert")
    assert "model.base: " in said
    assert "causal language model" in said


def test_weights_in_pickles_alone_are_refused(refusal: Refusal) -> None:
    tiny_base(Path("pickled"))
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    assert "holds no safetensors; weights are never read from pickles" in refusal("--model.base", "pickled")


def test_damaged_weights_are_refused(refusal: Refusal) -> None:
    tiny_base(Path("damaged"))
    weights = Path("damaged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in refusal("--model.base", "damaged")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b"{"),
        ("adapter_model.safetensors", b"cut off"),
        ("adapter_model.safetensors", b""),
    ],
)
def test_a_damaged_adapter_is_refused(tiny: list[str], refusal: Refusal, file: str, content: bytes) -> None:
    get_peft_model(tiny_llama(), LoraConfig()).save_pretrained("adapter")
    (Path("adapter") / file).write_bytes(content)
    assert "model.adapter: adapter does not fit this base model" in refusal("--model.adapter", "adapter")


def test_an_adapter_of_another_base_is_refused(refusal: Refusal) -> None:
    other = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=9))
    get_peft_model(other, LoraConfig()).save_pretrained("adapter")
    assert "model.adapter: adapter does not fit this base model" in refusal("--model.adapter", "adapter")


def test_an_adapter_named_as_base_is_told_so(refusal: Refusal) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    assert "It is an adapter: name it as model.adapter." in refusal("--model.base", "adapter")


# The hub --------------------------------------------------------------------------------------------------------------


def test_offline_a_hub_model_is_told_to_be_out_of_reach(refusal: Refusal) -> None:
    said = refusal("--model.base", "some/model")
    assert "some/model is not in the local cache and the hub is out of reach" in said
    assert "smollm2-135m, which needs no hub" in said


def test_without_network_a_hub_model_is_told_to_be_out_of_reach(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    said = refusal("--model.base", "some/model")
    assert "some/model is not in the local cache and the hub is out of reach (ConnectError)" in said


def test_the_hub_is_asked_once_and_briefly(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*_: Any, timeout: float, **__: Any) -> NoReturn:
        asked.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert "the hub is out of reach (TimeoutError)" in refusal("--model.base", "some/model")
    assert len(asked) == 1
    assert asked[0] < 5  # seconds


def test_a_gated_model_is_told_how_to_get_access(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        gated = huggingface_hub.errors.GatedRepoError
        raise gated.__new__(gated)  # made without the hub's response

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    said = refusal("--model.base", "meta-llama/Llama-2-7b-hf")
    assert "access to meta-llama/Llama-2-7b-hf must be granted first" in said
    assert "HF_TOKEN" in said


def test_a_hub_data_set_out_of_reach_is_told(refusal: Refusal) -> None:
    assert "some/records" in refusal("--data.path", "some/records")


# Places to write to ---------------------------------------------------------------------------------------------------


def test_no_write_access_is_told_before_the_run(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def fail(path: Path, *args: Any, **kwargs: Any) -> None:  # tests may run as root, whom no permission stops
        if path == Path("runs/lora"):
            raise PermissionError(13, "Permission denied")
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", fail)
    said = refusal()
    assert "runs/lora: the run's directory cannot be made (Permission denied); set trainer.default_root_dir" in said


def test_runs_that_is_a_file_is_told(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("mine")
    assert lit_tune("fit", *tiny) == 2
    assert "runs/lora: the run's directory cannot be made" in capsys.readouterr().err
    assert Path("runs").read_text() == "mine"


def test_too_little_disk_is_told_before_the_run(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    said = refusal("--model.method", "fft")
    assert "are needed there for 3 checkpoints, 0.0 GiB are free" in said


# In a process of its own ----------------------------------------------------------------------------------------------


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m lit_tune` as a user does."""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_tune", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_an_error_is_one_line_without_traceback(tiny: list[str]) -> None:
    done = process("fit", *tiny, "--data.path", "nowhere.json")
    assert done.returncode == 2
    assert done.stderr.startswith("lit-tune: nowhere.json")
    assert done.stderr.count("\n") == 1


def test_two_processes_print_an_error_once(tiny: list[str]) -> None:
    # Known only when the model is there, so after the second process has been started.
    done = process(
        "fit", *tiny, "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--model.lora.targets=[q_prj]"
    )
    assert done.returncode == 2
    assert done.stderr.count("is no linear layer of this model") == 1
    assert "Traceback" not in done.stderr
    assert list(Path("runs").iterdir()) == []


def test_two_processes_train_as_one_does_and_one_goes_on_where_they_ended(tiny: list[str]) -> None:
    settings = [*tiny, "--data.global_batch_size", "8", "--data.val_fraction", "0.2"]
    settings += ["--model.lora.dropout", "0", "--model.learning_rate", "0.01", "--trainer.max_epochs", "2"]
    settings += ["--trainer.accelerator", "cpu", "--checkpoint.every_n_steps", "1", "--checkpoint.keep_last", "9"]
    assert lit_tune("fit", *settings, "--name", "one") == 0
    done = process("fit", *settings, "--name", "two", "--trainer.devices", "2", "--data.micro_batch_size", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path("runs").iterdir()) == ["one", "two"]
    for column in ("Epoch 0: average loss", "Run runs/two", "Parameters: "):
        assert done.stdout.count(column) == 1
    assert_same_curves("two", "one")
    # The same global batch on one device: 2 x 2 micro-batches of 2 samples become 2 of 4.
    for step in (1, 2):  # within an epoch, and at its end
        assert lit_tune("fit", *settings, "--ckpt_path", f"runs/two/checkpoints/step-{step:08d}.ckpt") == 0
        assert_same_curves("two", "one")
        assert len(list(Path("runs/two/checkpoints").glob("step-*"))) == 4


def assert_same_curves(name: str, reference: str) -> None:
    """Check a run and its result against one that cut the same steps otherwise."""
    run, other = (read_metrics(Path("runs") / of / "metrics.csv") for of in (name, reference))
    assert [row["step"] for row in run] == [row["step"] for row in other] == ["0", "1", "2", "3"]
    for column in ("train/loss", "train/epoch_loss", "val/loss"):
        # fp32 sums over other splits of the same samples
        expected = [float(row[column]) for row in other if row[column]]
        assert [float(row[column]) for row in run if row[column]] == pytest.approx(expected, rel=1e-5), column
    files = {path.name for path in (Path("runs") / name / "result").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
