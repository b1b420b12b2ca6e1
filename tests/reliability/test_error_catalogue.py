"""The faults a user can make, one row each: the command ends with the right code and says in one line what is wrong.

`words` are what must stand in that line: the value that is wrong, the place where it stands, and what to do.
"""

import errno
import gzip
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets
import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from lit_tune.modules.llama import LlamaTuner
from tests.reliability.told import Told, spread, surroundings, tiny_folder, told  # noqa: F401  # fixtures
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import tiny_base, tiny_llama
from tests.tiny_run import lit_tune

GOOD = '{"instruction": "Say yes.", "output": "yes"}\n'
SetUp = Callable[[pytest.MonkeyPatch], Any]


class Fault(NamedTuple):
    """What is done, and what must be said."""

    arguments: list[str]
    words: list[str]
    set_up: SetUp | None = None
    code: int = 2
    command: str = "fit"
    tiny: bool = True


def file(name: str, content: str | bytes) -> SetUp:
    """Return a set-up that writes a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda _: Path(name).write_bytes(data)


def edit(name: str, **values: Any) -> SetUp:
    """Return a set-up that sets values in a JSON file."""
    return lambda _: Path(name).write_text(json.dumps(json.loads(Path(name).read_text()) | values))


def adapter(edit_it: Callable[[], Any] = lambda: None, *, vocabulary: int = 273, **settings: Any) -> SetUp:
    """Return a set-up that makes an adapter for a tiny base and then edits it."""

    def set_up(_: pytest.MonkeyPatch) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
        get_peft_model(tiny_llama(vocabulary=vocabulary), config).save_pretrained("adapter")
        edit_it()

    return set_up


def hub_says(fault: str) -> SetUp:
    """Return a set-up in which the hub answers every question with this error."""

    def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> NoReturn:
            kind = getattr(huggingface_hub.errors, fault)
            raise kind.__new__(kind)  # made without the hub's response

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)

    return set_up


def raising(owner: Any, name: str, fault: BaseException) -> SetUp:
    """Return a set-up in which a function raises."""

    def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> NoReturn:
            raise fault

        monkeypatch.setattr(owner, name, fail)

    return set_up


def little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))


def trained(*settings: str, then: Callable[[Path], Any] = lambda path: None) -> SetUp:
    """Return a set-up that trains a run named `old` for a step and then does something to its checkpoint."""

    def set_up(_: pytest.MonkeyPatch) -> None:
        arguments = [*("--model.base", "base", "--data.path", "records.jsonl", "--data.template", "chatml"), *settings]
        arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
        arguments += ["--trainer.max_steps", "1", "--samples.prompts", "[]", "--checkpoint.every_n_steps", "1"]
        assert lit_tune("fit", *arguments, "--name", "old") == 0
        then(Path("runs/old/checkpoints/step-00000001.ckpt"))

    return set_up


def no_tokenizer(_: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained("mute")


def bert(_: pytest.MonkeyPatch) -> None:
    config = BertConfig(
        vocab_size=273, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    BertModel(config).save_pretrained("bert")
    tiny_tokenizer().save_pretrained("bert")


def wide_tokenizer(_: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained("base")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SETTINGS = {
    "no such command": Fault([], ["'fti'", "Did you mean 'fit'?"], command="fti", tiny=False),
    "settings for a tool without": Fault(["--x"], ["takes no settings", "'--x'"], command="configs", tiny=False),
    "no such setting": Fault(["--model.lora.rnk", "8"], ["'model.lora.rnk'", "Did you mean 'model.lora.rank'?"]),
    "an abbreviated setting": Fault(["--trainer.max_epo", "3"], ["'trainer.max_epo'", "'trainer.max_epochs'?"]),
    "a setting without its value": Fault(["--name"], ["name: no value is given", "write --name VALUE"]),
    "a word too much": Fault(["demo.yaml"], ["'demo.yaml'", "`--help`"]),
    "no such recipe": Fault(["--config", "lroa.yaml"], ["--config", "lroa.yaml", "Did you mean lora.yaml?"]),
    "a recipe that is no YAML": Fault(
        ["--config", "a.yaml"], ["a.yaml:2", "YAML"], file("a.yaml", "model:\n  base: [")
    ),
    "a setting twice in a recipe": Fault(
        ["--config", "a.yaml"], ["a.yaml:2", "'name' stands twice; keep one"], file("a.yaml", "name: a\nname: b\n")
    ),
    "a recipe without settings": Fault(
        ["--config", "a.yaml"], ["a.yaml", "write settings by name"], file("a.yaml", "[]")
    ),
    "a number as a name": Fault(["--config", "a.yaml"], ["name: '12'", "put it in quotes"], file("a.yaml", "name: 12")),
    "text for a number": Fault(["--model.lora.rank", "many"], ["model.lora.rank: 'many'", "it takes int"]),
    "no such choice": Fault(["--model.method", "lroa"], ["model.method: 'lroa'", "use one of lora, fft", "'lora'?"]),
    "not a number": Fault(["--model.learning_rate", ".nan"], ["model.learning_rate", "nan", "give one"]),
    "a negative rate": Fault(["--model.learning_rate", "-1"], ["model.learning_rate is -1", "0 or more"]),
    "no accumulation": Fault(
        ["--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches is 0", "1 or more"]
    ),
    "a seed too large": Fault(["--seed_everything", "4294967296"], ["seed_everything is 4294967296", "4294967295"]),
    "code as a class": Fault(["--trainer.callbacks", "os.system"], ["trainer.callbacks", "'os.system'", "may name"]),
    "a misspelt class": Fault(["--trainer.callbacks", "EarlyStoping"], ["'EarlyStoping'", "mean 'EarlyStopping'?"]),
    "a misspelt setting of a class": Fault(
        ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitr: x}}]"],
        ["trainer.callbacks", "'monitr'", "Did you mean 'monitor'?"],
    ),
    "a metric that is not there": Fault(
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/los"],
        ["trainer", "`val/los`", "`train/loss`"],
    ),
    "a class whose package is missing": Fault(["--trainer.logger", "MLFlowLogger"], ["MLFlowLogger", "pip install"]),
}
DEVICES = {
    "no such strategy": Fault(["--trainer.strategy", "dpp"], ["trainer", "'dpp'", "ddp"]),
    "a strategy that needs a GPU": Fault(["--trainer.strategy", "fsdp"], ["trainer", "`fsdp`", "accelerator"]),
    "a strategy whose package is missing": Fault(["--trainer.strategy", "deepspeed"], ["trainer", "pip install"]),
    "no such accelerator": Fault(["--trainer.accelerator", "gpus"], ["trainer", "'gpus'", "cuda"]),
    "no GPU": Fault(["--trainer.accelerator", "gpu"], ["trainer.accelerator is gpu", "use cpu or auto"]),
    "no device": Fault(["--trainer.devices", "0"], ["trainer", "devices='0'", "cpu"]),
    "devices that are no number": Fault(["--trainer.devices", "two"], ["trainer", "devices", "int > 0"]),
    "no such precision": Fault(
        ["--trainer.precision", "bf17-mixed"], ["trainer.precision: 'bf17-mixed'", "bf16-mixed"]
    ),
    "no such profiler": Fault(["--trainer.profiler", "fast"], ["trainer", "profiler", "simple"]),
    "no such clipping": Fault(["--trainer.gradient_clip_algorithm", "l3"], ["trainer", "l3", "norm"]),
    "steps below none": Fault(["--trainer.max_steps", "-5"], ["trainer", "max_steps", "-5"]),
    "a time that is none": Fault(["--trainer.max_time", "soon"], ["trainer", "'soon'", "DD:HH:MM:SS"]),
    "another checkpoint writer": Fault(["--trainer.plugins", "TorchCheckpointIO"], ["trainer", "CheckpointIO"]),
    "Lightning's own checkpoints": Fault(["--trainer.callbacks", "ModelCheckpoint"], ["trainer", "ModelCheckpoint"]),
    "no logging where we log": Fault(["--trainer.barebones", "true"], ["trainer", "barebones"]),
}
MODELS = {
    "a rank of none": Fault(["--model.lora.rank", "0"], ["model.lora.rank is 0", "1 or more"]),
    "an alpha of none": Fault(["--model.lora.alpha", "0"], ["model.lora.alpha is 0", "more than 0"]),
    "a dropout of all": Fault(["--model.lora.dropout", "1"], ["model.lora.dropout is 1.0", "less than 1"]),
    "no such layer": Fault(
        ["--model.lora.targets", "[q_prj]"], ["model.lora.targets", "'q_prj'", "q_proj", "all-linear"]
    ),
    "no layers": Fault(["--model.lora.targets", "[]"], ["model.lora.targets is empty", "all-linear"]),
    "quantised and trained in full": Fault(
        ["--model.method", "fft", "--model.quantize", "nf4"],
        ["model.quantize is nf4", "model.method fft", "use model.method lora, or model.quantize none"],
    ),
    "no such attention": Fault(["--model.attention", "flsh"], ["model.attention: 'flsh'", "use one of auto, eager"]),
    "no such directory": Fault(["--model.base", "./none"], ["model.base", "'./none'", "name a directory"]),
    "no network": Fault(
        ["--model.base", "some/model"], ["model.base: some/model", "out of reach", "smollm2-135m, which needs no hub"]
    ),
    "a gated model": Fault(
        ["--model.base", "some/model"], ["model.base", "some/model", "licence", "HF_TOKEN"], hub_says("GatedRepoError")
    ),
    "no such model on the hub": Fault(
        ["--model.base", "some/model"],
        ["model.base", "'some/model'", "check the name", "hf auth login"],
        hub_says("RepositoryNotFoundError"),
    ),
    "figures without weights": Fault(["--model.base", "llama2-7b"], ["model.base", "llama2-7b", "name the hub id"]),
    "weights in pickles": Fault(
        [],
        ["model.base", "no safetensors", "save_pretrained"],
        lambda _: Path("base/model.safetensors").rename("base/pytorch_model.bin"),
    ),
    "half of the weights": Fault(
        [], ["model.base", "weights are missing", "copy"], edit("base/config.json", num_hidden_layers=3)
    ),
    "weights of another width": Fault(
        [], ["model.base", "shape", "(32, 64)"], edit("base/config.json", intermediate_size=48)
    ),
    "a cut file of weights": Fault(
        [], ["model.base", "base cannot be loaded"], lambda _: Path("base/model.safetensors").write_bytes(b"cut")
    ),
    "another kind of model": Fault(["--model.base", "bert"], ["model.base", "BertModel", "LlamaForCausalLM"], bert),
    "no tokenizer": Fault(["--model.base", "mute"], ["model.base", "no tokenizer", "mute"], no_tokenizer),
    "a tokenizer without an end": Fault(
        ["--model.base", "endless"],
        ["model.base", "no end-of-sequence token", "set eos_token"],
        lambda _: tiny_base(Path("endless"), tokenizer=tiny_tokenizer(eos=False)),
    ),
    "a tokenizer larger than the model": Fault(
        [], ["model.base", "274 tokens", "273 embeddings", "'<extra>'", "take the tokenizer"], wide_tokenizer
    ),
    "a context too short": Fault(
        [], ["context of 16", "data.max_length"], edit("base/config.json", max_position_embeddings=16)
    ),
    "a model as an adapter": Fault(["--model.adapter", "base"], ["model.adapter", "no adapter_config.json", "PEFT"]),
    "an adapter as a model": Fault(
        ["--model.base", "adapter"], ["model.base", "It is an adapter: name it as model.adapter"], adapter()
    ),
    "a pickled adapter": Fault(
        ["--model.adapter", "adapter"],
        ["model.adapter: adapter", "only safetensors"],
        adapter(lambda: Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")),
    ),
    "an adapter of another vocabulary": Fault(
        ["--model.adapter", "adapter"],
        ["model.adapter: adapter", "(300, 32) there and (273, 32) here"],
        adapter(vocabulary=300, modules_to_save=["lm_head"]),
    ),
    "an adapter of another kind": Fault(
        ["--model.adapter", "adapter"],
        ["model.adapter: adapter", "peft_type 'IA3'", "only LORA"],
        lambda patch: [adapter()(patch), edit("adapter/adapter_config.json", peft_type="IA3")(patch)],
    ),
}
DATA = {
    "no such file": Fault(["--data.path", "recrods.jsonl"], ["recrods.jsonl", "no such file", "records.jsonl"]),
    "a directory": Fault(["--data.path", "base"], ["base", "is a directory", "give a file"]),
    "another format": Fault(["--data.path", "a.xlsx"], ["a.xlsx", ".jsonl"], file("a.xlsx", "x")),
    "an empty file": Fault(["--data.path", "a.jsonl"], ["a.jsonl", "empty"], file("a.jsonl", "")),
    "bad JSON": Fault(["--data.path", "a.jsonl"], ["a.jsonl:2:", "malformed JSON"], file("a.jsonl", GOOD + "{'a'}\n")),
    "a key twice": Fault(
        ["--data.path", "a.jsonl"],
        ["a.jsonl:1", "'output'", "twice"],
        file("a.jsonl", '{"instruction": "a", "output": "b", "output": "c"}\n'),
    ),
    "a field that is missing": Fault(
        ["--data.path", "a.jsonl"],
        ["a.jsonl:2", "'output' is missing"],
        file("a.jsonl", GOOD + '{"instruction": "a"}\n'),
    ),
    "a field that is a number": Fault(
        ["--data.path", "a.jsonl"],
        ["a.jsonl:1", "'output' is a number", "must be a string"],
        file("a.jsonl", '{"instruction": "a", "output": 3}\n'),
    ),
    "UTF-16": Fault(["--data.path", "a.jsonl"], ["a.jsonl", "UTF-16", "UTF-8"], file("a.jsonl", GOOD.encode("utf-16"))),
    "no UTF-8": Fault(["--data.path", "a.jsonl"], ["a.jsonl:1", "0xff", "UTF-8"], file("a.jsonl", b'{"a": "\xff"}')),
    "a cut archive": Fault(
        ["--data.path", "a.jsonl.gz"],
        ["a.jsonl.gz", "corrupt"],
        file("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:50]),
    ),
    "no such field of ours": Fault(
        ["--data.columns", "{instrction: q}"], ["data.columns", "'instrction'", "instruction"]
    ),
    "no such records": Fault(["--data.limit", "[50:60]"], ["limit '[50:60]'", "19 records", "records.jsonl"]),
    "a limit that is none": Fault(["--data.limit", "[0:x]"], ["limit '[0:x]'", 'write "[0:200]"']),
    "all records too long": Fault(["--data.max_length", "5"], ["19 records", "max_length 5"]),
    "no such template": Fault(["--data.template", "alpca"], ["'alpca'", "did you mean 'alpaca'"]),
    "a template that is none": Fault(
        ["--data.template", "a.jinja"], ["a.jinja:2", "Jinja"], file("a.jinja", "x\n{% for %}")
    ),
    "no chat template": Fault(["--data.template", "chat"], ["'chat'", "no chat template", "alpaca, "]),
    "nothing held out": Fault(["--data.val_fraction", "0.001"], ["data.val_fraction 0.001", "another fraction"]),
    "two kinds of validation": Fault(
        ["--data.val_fraction", "0.1", "--data.val_path", "records.jsonl"],
        ["data.val_fraction", "data.val_path", "one"],
    ),
    "a batch of none": Fault(["--data.micro_batch_size", "0"], ["data.micro_batch_size", "0", "1 or more"]),
    "a batch that cannot be divided": Fault(
        ["--data.global_batch_size", "6", "--data.micro_batch_size", "4"],
        ["data.global_batch_size 6", "data.micro_batch_size 4"],
    ),
    "a token budget below a sample": Fault(
        ["--data.micro_batch_tokens", "5"], ["data.micro_batch_tokens is 5", "raise it", "data.max_length"]
    ),
    "no data set on the hub": Fault(
        ["--data.path", "some/records"],
        ["some/records", "give an existing file or id"],
        hub_says("RepositoryNotFoundError"),
    ),
}
RUNS = {
    "a path as a name": Fault(["--name", "../x"], ["--name: '../x'", "use letters, digits"]),
    "a name too long": Fault(["--name", "x" * 300], ["--name", "300 characters", "at most 200"]),
    "no such run": Fault(["--ckpt_path", "last"], ["--ckpt_path last", "no run named lora under runs"]),
    "no such checkpoint": Fault(["--ckpt_path", "a.ckpt"], ["ckpt_path", "there is no checkpoint a.ckpt"]),
    "an empty path of a checkpoint": Fault(["--ckpt_path", ""], ["ckpt_path", "there is no checkpoint"]),
    "a flipped bit": Fault(
        ["--name", "old", "--ckpt_path", "last"], ["--ckpt_path last", "1 damaged", "step-00000001"], trained(then=flip)
    ),
    "a checkpoint without its run": Fault(
        ["--ckpt_path", "a.ckpt"],
        ["ckpt_path: a.ckpt lies in no run", "put it into the folder 'checkpoints'"],
        trained(then=lambda path: path.rename("a.ckpt")),
    ),
    "another rank than the checkpoint's": Fault(
        ["--name", "old", "--ckpt_path", "last", "--model.lora.rank", "4", "--trainer.max_steps", "2"],
        ["rank", "16", "4"],
        trained(),
    ),
    "another seed than the checkpoint's": Fault(
        ["--name", "old", "--ckpt_path", "last", "--seed_everything", "4", "--trainer.max_steps", "2"],
        ["seed_everything", "0", "4"],
        trained(),
    ),
    "nothing to validate with": Fault([], ["data.val_path", "data.val_fraction"], command="validate"),
    "a file named runs": Fault([], ["runs", "directory"], file("runs", "mine")),
    "no place to write to": Fault(
        ["--trainer.default_root_dir", "/proc/none"], ["/proc/none", "cannot be made", "trainer.default_root_dir"]
    ),
    "too little disk": Fault(["--model.method", "fft"], ["needed", "free"], little_disk),
    "a full disk at a save": Fault(
        ["--checkpoint.every_n_steps", "1"],
        ["step-00000001.ckpt", "No space left on device"],
        raising(torch, "save", OSError(errno.ENOSPC, "No space left on device")),
        code=4,
    ),
    "out of memory": Fault(
        [],
        ["out of memory in the forward pass of optimizer step 0", "try --data.micro_batch_size 2"],
        raising(LlamaTuner, "training_step", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        code=3,
    ),
    "more host memory than allowed": Fault(
        ["--trainer.max_steps", "2", "--memory.host_limit_gib", "0.001"],
        ["of host memory after optimizer step 0", "memory.host_limit_gib 0.001", "--ckpt_path last"],
        code=3,
    ),
    "no host memory allowed at all": Fault(["--memory.host_limit_gib", "0"], ["memory.host_limit_gib", "more than 0"]),
    "a loss that is not finite": Fault(
        ["--model.learning_rate", "1e30", "--trainer.max_steps", "3"],
        ["optimizer step", "is nan", "Lower model.learning_rate"],
        code=5,
    ),
}
CATALOGUE = {**SETTINGS, **DEVICES, **MODELS, **DATA, **RUNS}
_TOLD: list[str] = []


@pytest.mark.parametrize("fault", spread(CATALOGUE, one_in=2))
def test_a_fault_is_told_in_one_line_with_value_place_and_remedy(
    told: Told,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if fault.set_up is not None:
        fault.set_up(monkeypatch)
    said = told(fault.command, *fault.arguments, code=fault.code, tiny=fault.tiny)
    assert [word for word in fault.words if word not in said] == [], said
    _TOLD.append(said)


@pytest.mark.slow
def test_the_whole_catalogue_was_told(report: Callable[[str], None]) -> None:
    assert len(_TOLD) == len(CATALOGUE) >= 60
    codes = sorted({fault.code for fault in CATALOGUE.values()})
    report(
        f"{len(_TOLD)} catalogued faults: each one line with cause and remedy, 0 tracebacks, the right exit code "
        f"({', '.join(map(str, codes))})"
    )
