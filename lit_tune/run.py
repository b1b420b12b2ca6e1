"""A run: module, data and trainer from one configuration, its name and directory, and what it prints and leaves.

`TuneCLI` is LightningCLI with the decisions that a user should not have to make (name, precision, loggers, callbacks)
and with everything that can fail checked before a process is launched.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

from lit_tune import checkpoint, lock, memory_json, recipes, strategies, techniques
from lit_tune.advice import Change, advice, advice_lines
from lit_tune.board import Board
from lit_tune.callbacks.checkpoint import Checkpoint
from lit_tune.callbacks.continuation import Continuation
from lit_tune.callbacks.epoch_summary import EpochSummary
from lit_tune.callbacks.memory import MemoryMonitor
from lit_tune.callbacks.memory_report import memory_table, plain_text
from lit_tune.callbacks.parameters import ParameterCount
from lit_tune.callbacks.progress import TuneProgressBar
from lit_tune.callbacks.samples import Samples
from lit_tune.callbacks.stop import GracefulStop
from lit_tune.callbacks.summary import RunSummary, SampleChange, print_summary
from lit_tune.callbacks.throughput import Throughput
from lit_tune.data.describe import overlap
from lit_tune.data.instruct import DEFAULT_MICRO_BATCH_SIZE, InstructData, Prepared
from lit_tune.duration import seconds_of
from lit_tune.errors import InputError, OutOfMemoryError, is_out_of_memory
from lit_tune.logs import FILE as METRICS_FILE
from lit_tune.logs import MetricsCsv
from lit_tune.memory import GIB, Footprint
from lit_tune.modules.llama import LlamaTuner
from lit_tune.modules.load import load_config
from lit_tune.parser import TuneParser, refusals, restrict_imports, suggestion
from lit_tune.quiet import quieten
from lit_tune.redact import redact
from lit_tune.result import save_result, steps_of
from lit_tune.runs import RUNS, check_name, fresh_name, last_checkpoint, make_directory, run_of, runs_named, shown
from lit_tune.signals import is_launched

if TYPE_CHECKING:
    from lit_tune.predict import Case, Prediction

RESULT = "result"
CONFIG = "config.yaml"
PREDICTIONS = "predictions.jsonl"
DEFAULT_EPOCHS = 3

# Of those that memory depends on, the ones that `memory.json` takes as they are set.
MEMORY_SETTINGS = {
    "model": ("base", "method", "quantize", "gradient_checkpointing", "offload_activations", "optimizer", "attention"),
    "data": ("micro_batch_size", "micro_batch_tokens", "global_batch_size", "max_length", "packing"),
}

# What rank 0 decides is handed to the processes that Lightning launches through their environment.
NAME_VARIABLE = "LIT_TUNE_RUN_NAME"
CHECKPOINT_VARIABLE = "LIT_TUNE_CKPT_PATH"
CHECKPOINTING_VARIABLE = "LIT_TUNE_GRADIENT_CHECKPOINTING"

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": DEFAULT_EPOCHS,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the loader deals out the samples itself
    "enable_checkpointing": False,  # ours is lit_tune.callbacks.checkpoint
    "enable_model_summary": False,
}


def is_main_process() -> bool:
    """Tell whether this is the process that speaks and decides: rank 0, or the only one."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _handed_down(variable: str) -> str | None:
    """Return what the rank 0 that launched this process has decided; None where none did."""
    return os.environ.get(variable) if is_launched() else None


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# -- hardware ----------------------------------------------------------------------------------------------------------


def default_precision(accelerator: Any = "auto") -> str:
    """Return the precision taken when none is given: bf16-mixed where the device computes in bf16, else 32-true.

    On a CPU without matrix units for bf16 (AMX) it is emulated and 3.5 times slower than fp32.
    """
    if torch.cuda.is_available() and accelerator != "cpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("amx_bf16") else "32-true"


def process_count(accelerator: Any, devices: Any, num_nodes: int) -> int:
    """Return the processes that a run has, one for each device, as Lightning counts them."""
    if (world := os.environ.get("WORLD_SIZE")) and "TORCHELASTIC_RUN_ID" in os.environ:
        return int(world)
    if isinstance(devices, list):
        return len(devices) * num_nodes
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()]) * num_nodes
    if str(devices).isdigit():  # what is neither a number nor `auto`, Lightning refuses
        return int(devices) * num_nodes
    return (1 if accelerator == "cpu" else max(1, torch.cuda.device_count())) * num_nodes


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuse more GPUs than there are; on a machine without GPUs, devices are CPU processes and any number goes.

    Raises:
        InputError: More GPUs are asked for than the machine has.
    """
    count = torch.cuda.device_count()
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and count > 0)
    if accelerator in ("gpu", "cuda") and count == 0:
        raise InputError(f"trainer.accelerator is {accelerator}, but no CUDA GPU is visible; use cpu or auto.")
    wanted = [int(x) for x in devices.split(",") if x] if isinstance(devices, str) and "," in devices else devices
    highest = max(wanted, default=-1) + 1 if isinstance(wanted, list) else int(wanted) if str(wanted).isdigit() else 0
    if on_gpu and highest > count:
        raise InputError(f"trainer.devices is {devices}, but {count} GPU(s) are visible; ask for at most {count}.")


# -- the command -------------------------------------------------------------------------------------------------------


class SaveConfig(SaveConfigCallback):
    """Write the whole configuration to `config.yaml` in the run's directory, for `--config` to take again."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: a continuation that is refused must leave the run's configuration as it is."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.config = redact(self.config)
        super().setup(trainer, pl_module, "fit")


class TuneCLI(LightningCLI):
    """LightningCLI for `fit`, `validate`, `test` and `predict`; with `run=False` it only builds (`load_run`)."""

    model: LlamaTuner
    datamodule: InstructData

    def __init__(
        self,
        arguments: list[str],
        *,
        recipe: Path | None = None,
        run: bool = True,
        description: str = "Fine-tune LLaMA-family models with LoRA or in full.",
        options: Callable[[LightningArgumentParser], None] | None = None,
        adjust: Callable[[Any], dict[str, Any]] | None = None,
    ) -> None:
        self.recipe = recipe
        self._adjust = adjust
        self._target: dict[str, Any] = {}
        self._options = options
        self._command = arguments[0] if run else "fit"
        self.console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not is_main_process())
        self.resumed_from: Path | None = None
        self._steps_done = 0
        self._time_limit_s: int | None = None
        self.directory: Path | None = None
        self._lock: IO[str] | None = None
        # By the clock that never jumps: when this process began, its imports included.
        self._started = time.monotonic() - (time.time() - psutil.Process().create_time())
        try:
            self._build_and_run(arguments, run=run, description=description)
        except BaseException:
            self._discard_unused_directory()
            raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def _build_and_run(self, arguments: list[str], *, run: bool, description: str) -> None:
        super().__init__(
            LlamaTuner,
            InstructData,
            args=arguments,
            run=run,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=TuneParser,
            parser_kwargs={"description": description},
            auto_configure_optimizers=False,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in LightningCLI, called on self
        # Only the one that was asked for: each of the four parsers takes a third of a second to build.
        known = super().subcommands()
        return {self._command: known[self._command]}

    # -- settings ----------------------------------------------------------------------------------------------------

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run and of its folder under runs/; left out, the recipe's name, else the method. A name "
            "that exists gets -2, -3, ...; with --ckpt_path last, the newest run of that name goes on.",
        )
        parser.add_argument(
            "--time_limit",
            "--time-limit",
            type=str | None,
            default=None,
            help="End before this much time has passed, with a checkpoint and exit code 143: 90m, 1h30m or 01:30:00.",
        )
        parser.add_argument(
            "--allow_changed",
            type=str | None,
            default=None,
            help="With --ckpt_path: settings that may differ from the checkpoint's, separated by commas, such as "
            "model.learning_rate,data.path.",
        )
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(MemoryMonitor, "memory")
        if self._options:
            self._options(parser)

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Model and data first: `--help` begins with what this tool is about.
        parser.add_lightning_class_args(LlamaTuner, "model")
        parser.add_lightning_class_args(InstructData, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})

    @property
    def settings(self) -> Any:
        """The parsed settings of the command."""
        return self.config[self.subcommand] if self.subcommand else self.config

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: checkpoints hold no hyperparameters that could override the command line."""

    @override
    def before_instantiate_classes(self) -> None:
        settings = self.settings
        if self._adjust:
            self._target = self._adjust(settings)
        trainer = settings["trainer"]
        check_devices(trainer["accelerator"], trainer["devices"])
        if trainer["precision"] is None:
            trainer["precision"] = default_precision(trainer["accelerator"])
        if settings["time_limit"]:
            self._time_limit_s = seconds_of(settings["time_limit"], setting="--time-limit")
        root = Path(trainer["default_root_dir"] or ".") / RUNS
        wanted = settings["name"] or (self.recipe.stem if self.recipe else settings["model"]["method"])
        if self.subcommand and settings.get("ckpt_path") is not None:
            self._find_checkpoint(root, check_name(wanted))
        if self.subcommand == "fit" and not trainer["fast_dev_run"]:
            self.directory = self._claim_directory(root, check_name(wanted))
            settings["name"] = self.directory.name

    def _find_checkpoint(self, root: Path, name: str) -> None:
        """Turn `--ckpt_path last`, `best` or a path into the path of an intact checkpoint."""
        given = _handed_down(CHECKPOINT_VARIABLE) or str(self.settings["ckpt_path"])
        if given == "last":
            path, damaged = last_checkpoint(root, name)
            for bad in damaged:
                self.console.print(f"Passed over {bad}: damaged.")
        elif given == "best":
            runs = runs_named(root, name)
            path = (runs[-1] if runs else root / name) / checkpoint.DIRECTORY / checkpoint.BEST
        else:
            path = Path(given)
        self.resumed_from = path
        # The number alone: Lightning reads the file again, and two copies of a whole model are one too many.
        self._steps_done = int(checkpoint.read(path)["global_step"])
        self.settings["ckpt_path"] = os.environ[CHECKPOINT_VARIABLE] = str(path)

    def _claim_directory(self, root: Path, name: str) -> Path:
        """Choose the run's directory and make it, on rank 0; a continued run keeps its own."""
        if self.resumed_from is not None:
            directory = run_of(self.resumed_from)
        elif given := _handed_down(NAME_VARIABLE):
            return root / given
        elif is_main_process():
            directory = make_directory(root, name)
            os.environ[NAME_VARIABLE] = directory.name
        else:
            return root / fresh_name(root, name)
        if is_main_process():
            self._lock = lock.hold(directory)
        return directory

    def _discard_unused_directory(self) -> None:
        """Remove the directory that this process has just made, if the run ended before anything worth keeping."""
        if self.directory is None or self.resumed_from is not None or not is_main_process():
            return
        steps = self.trainer.global_step if hasattr(self, "trainer") else 0
        if not steps and not checkpoint.step_checkpoints(self.directory):
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- building ----------------------------------------------------------------------------------------------------

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in _as_list(config["callbacks"])):
            raise InputError(
                "trainer.callbacks: GradientAccumulationScheduler changes the samples of an optimizer step during the "
                "run; set trainer.accumulate_grad_batches or data.global_batch_size."
            )
        for name, whole in {"limit_train_batches": (None, 1.0), "overfit_batches": (0.0,)}.items():
            if config[name] not in whole and not config["fast_dev_run"]:
                raise InputError(
                    f"trainer.{name} is {config[name]}: it would cut epochs where no checkpoint could go on; "
                    "set data.limit for fewer records, or trainer.max_steps for a shorter run."
                )
        config["strategy"] = self._choose_strategy(config)
        self.strategy_name = config["strategy"] if isinstance(config["strategy"], str) else "auto"
        config["callbacks"] = [*_as_list(config["callbacks"]), *self._own_callbacks(config)]
        writer = checkpoint.AtomicCheckpointIO(asynchronous=self._checkpoint.asynchronous)
        config["plugins"] = [*_as_list(config["plugins"]), writer]
        if config["logger"] in (None, True):
            config["logger"] = self._own_loggers() if self.directory else False
        with refusals():
            trainer = super().instantiate_trainer(**kwargs)
        trainer.accumulate_grad_batches = self.datamodule.accumulation(
            world=trainer.world_size, given=trainer.accumulate_grad_batches
        )
        if refused := techniques.refusal(self._choice(trainer, strategy=config["strategy"])):
            raise InputError(refused)
        return trainer

    def _choice(self, trainer: Trainer, *, strategy: Any) -> techniques.Choice:
        """Return what the run is set to, for the table of what goes together."""
        model = self.model
        # The setting, not the trainer's own: on a CPU Lightning makes bf16 of fp16.
        precision = str(self.settings["trainer"]["precision"])
        choice = techniques.Choice(
            method=model.method,
            quantize=model.quantize,
            variant=model.lora.variant,
            gradient_checkpointing=model.gradient_checkpointing,
            precision=techniques.PRECISIONS.get(precision, precision),
            strategy=strategy if isinstance(strategy, str) else type(strategy).__name__,
            device=trainer.strategy.root_device.type,
            devices=trainer.world_size,
        )
        choice = replace(choice, **self._target)
        if self.subcommand not in (None, "fit"):  # to measure a model takes nothing that trains it
            return choice
        return replace(
            choice,
            optimizer=model.optimizer,
            optimizer_in_backward=model.optimizer_in_backward,
            skip_nonfinite=model.skip_nonfinite,
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
        )

    def _choose_strategy(self, trainer: Any) -> Any:
        return strategies.choose(
            trainer["strategy"],
            method=self.model.method,
            devices=process_count(trainer["accelerator"], trainer["devices"], trainer["num_nodes"]),
            command=self._command,
            precision=str(trainer["precision"]),
            optimizer=self.model.optimizer,
        )

    def _own_callbacks(self, trainer: Any) -> list[Callback]:
        """Return the callbacks that every run has, in the order in which they must run."""
        self.throughput, self.epochs = Throughput(), EpochSummary()
        callbacks: list[Callback] = [ParameterCount(), self.throughput, self.epochs]
        self.progress = None if trainer["enable_progress_bar"] is False else TuneProgressBar()
        if self.progress is not None:
            callbacks.append(self.progress)
        if self.subcommand == "fit":
            self._checkpoint.bind(self.directory, flush_logs=self._flush_logs)
            self.memory.bind(save=self._save_now)
        return callbacks

    def _save_now(self, trainer: Trainer) -> None:
        self._checkpoint.save(trainer)
        self._checkpoint.wait(trainer)

    @property
    def memory(self) -> MemoryMonitor:
        """What measures memory."""
        monitor: MemoryMonitor = self._get(self.config_init, "memory")
        return monitor

    @property
    def _checkpoint(self) -> Checkpoint:
        saver: Checkpoint = self._get(self.config_init, "checkpoint")
        return saver

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        # What saves and stops does so between two steps: before the other callbacks have begun with the next one.
        saver = self._checkpoint
        first = [
            saver,
            GracefulStop(saver, time_limit_s=self._time_limit_s, started=self._started),
            Continuation(self.datamodule.place_after),
            self.memory,
        ]
        config["callbacks"] = [*first, *config["callbacks"]]
        return super()._instantiate_trainer(config, [callback for callback in callbacks if callback not in first])

    def _own_loggers(self) -> list[Any]:
        assert self.directory is not None
        first_step = self._steps_done
        return [Board(self.directory, first_step=first_step), MetricsCsv(self.directory, first_step=first_step)]

    def _flush_logs(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.flush()
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()

    # -- fit ---------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Do what can fail, in the launching process, before any other is started."""
        self.prepare()
        self.datamodule.trainer = self.trainer
        self._resolve_checkpointing()
        total = self.datamodule.total_steps()
        if self.progress is not None:
            self.progress.total_steps = total
        finished = (
            self._steps_done >= total and self.directory and steps_of(self.directory / RESULT) == self._steps_done
        )
        if self.resumed_from and finished:
            self.console.print(
                f"{self.directory} is finished: {self._steps_done} optimizer steps done. "
                "Raise trainer.max_epochs or trainer.max_steps to go on, or leave out --ckpt_path for a new run."
            )
            raise SystemExit(0)

    def prepare(self) -> None:
        """Fetch the base, tokenise the data and hand the callbacks what they need."""
        self.model.allow_changed = self.datamodule.allow_changed = self._allowed_changes()
        ready = self.datamodule.prepare(self.model.load_tokenizer)
        self._check_context(ready)
        samples = self._get(self.config_init, "samples")
        samples.bind(
            encode_prompt=self.datamodule.encode_prompt,
            decode=lambda ids: str(ready.tokenizer.decode(ids, skip_special_tokens=True)),
            stop_token_ids=self.datamodule.stop_token_ids(),
            pad_token_id=ready.tokenizer.pad_token_id,
            before_sampling=self.throughput.pause,
        )
        self.samples = samples

    def _allowed_changes(self) -> list[str]:
        allowed = [name.strip() for name in (self.settings["allow_changed"] or "").split(",") if name.strip()]
        known = set(self.settings.as_flat().__dict__)
        for name in allowed:
            if name not in known:
                raise InputError(f"--allow_changed: there is no setting {name!r}.{suggestion(name, sorted(known))}")
        return allowed

    def _check_context(self, ready: Prepared) -> None:
        """Refuse samples that are longer than the positions the model knows."""
        context = getattr(load_config(self.model.base), "max_position_embeddings", None)
        longest = int(ready.train.lengths.max())
        if context is not None and longest > context:
            raise InputError(
                f"data.max_length {self.datamodule.max_length} lets in a sample of {longest} tokens, but "
                f"{self.model.base} has a context of {context}; lower data.max_length to that."
            )

    def fit(self, model: LlamaTuner, datamodule: InstructData, **kwargs: Any) -> None:
        """Train, then save the result and print the summary."""
        self._announce()
        if self.memory.predict and is_main_process():
            self.memory.predicted = self._predicted()
        try:
            with refusals((MisconfigurationException,)):
                self.trainer.fit(model, datamodule=datamodule, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(error) from error
            raise
        # Every rank gives its shard, if weights are sharded.
        state = self.trainer.strategy.lightning_module_state_dict() if self.directory is not None else {}
        if self.trainer.is_global_zero and self.directory is not None:
            self._log_hyperparameters()
            self._record_memory()
            # Last: it is what tells a finished run from one that is to be continued.
            save_result(model, datamodule, self.directory / RESULT, precision=str(self.trainer.precision), state=state)
            print_summary(self.console, self._summary())

    def _announce(self) -> None:
        ready = self.datamodule.prepare(self.model.load_tokenizer)
        counts = ready.train.counts
        remarks = {
            "held out": len(ready.val) if ready.val is not None else 0,
            "dropped: too long": counts["dropped"],
            "truncated": counts["truncated"],
            "left out: no output": counts["empty"],
        }
        said = "".join(f", {number:,} {what}" for what, number in remarks.items() if number)
        run = self.directory or "for a look (fast_dev_run), nothing is kept"
        self.console.print(f"Run {run}: {self.model.method} of {self.model.base}, {self.trainer.precision}")
        self.console.print(f"Data {shown(Path(self.datamodule.path))}: {len(ready.train):,} samples{said}")
        if ready.val is not None and (shared := overlap(ready.train, ready.val)):
            self.console.print(
                f"{shared:,} of the {len(ready.val):,} held-out samples are trained on too: "
                "their loss tells nothing of new text.",
                style="yellow",
            )
        if self.resumed_from:
            self.console.print(f"Going on from {self.resumed_from} (optimizer step {self._steps_done})")

    def _heaviest(self) -> tuple[Case, Prediction]:
        """Return what the run's memory depends on, and what it will be."""
        from lit_tune.predict import Case, heaviest  # noqa: PLC0415  # not every command predicts
        from lit_tune.workload import largest_micro_batches  # noqa: PLC0415

        micros = largest_micro_batches(self.datamodule)
        case = Case(
            tuner=self.model,
            config=load_config(self.model.base),
            micro=micros[0],
            precision=str(self.trainer.precision),
            device="cuda" if self.trainer.strategy.root_device.type == "cuda" else "cpu",
            accumulate=self.trainer.accumulate_grad_batches,
            devices=self.trainer.world_size,
            strategy=self.strategy_name,
        )
        return heaviest(case, micros)

    def _predicted(self) -> Footprint | None:
        """Return what a rank is predicted to hold at its peak; without a GPU, with what the process holds already."""
        try:
            case, found = self._heaviest()
            already = psutil.Process().memory_info().rss if case.device == "cpu" else 0
            return found.peak + Footprint(other=already)
        except InputError:
            raise
        except Exception as error:  # a model or strategy of another make, whose run need not fail for that
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            self.console.print(f"Memory cannot be predicted: {reason[0]}")
            return None

    def _resolve_checkpointing(self) -> None:
        """Let `auto` be the cheapest gradient checkpointing with which the run fits."""
        from lit_tune.predict import cheapest_checkpointing  # noqa: PLC0415

        if self.model.gradient_checkpointing == "auto":
            chosen = _handed_down(CHECKPOINTING_VARIABLE)
            if chosen is None:
                on_gpu = self.trainer.strategy.root_device.type == "cuda"
                room = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
                chosen = os.environ[CHECKPOINTING_VARIABLE] = str(cheapest_checkpointing(self._heaviest()[0], room))
                self.console.print(f"Gradient checkpointing: {chosen}, for {room / GIB:.1f} GiB that are free")
            self.model.gradient_checkpointing = int(chosen) if chosen.isdigit() else chosen  # type: ignore[assignment]

    def _out_of_memory(self, error: Exception) -> OutOfMemoryError:
        """Say what memory was taken when there was none left, and what to change."""
        changes, monitor, newest = self._planned() or self._smaller(), self.memory, self._checkpoint.newest
        if isinstance(error, OutOfMemoryError):
            # What a run with a GPU takes of the host does not depend on these.
            changes = [] if self.trainer.strategy.root_device.type == "cuda" else changes
            text = f"{error}; raise it" + (" or" if changes else "")
        else:
            text = f"out of memory in the {monitor.failed_in}: {(str(error) or repr(error)).splitlines()[0]}"
            text += ";" if changes else ""
        text += f" try {changes[0].flags}" if changes else ""
        text += f"; {newest} is intact, go on with --ckpt_path last" if newest else ""
        details = advice_lines(changes, continues=newest is not None)
        if monitor.failed is not None:
            title = f"Memory in the {monitor.failed_in}"
            table = memory_table([monitor.failed], title=title, predicted=monitor.predicted, failed=True)
            details = [plain_text(table), *details]
        return OutOfMemoryError(text, "\n".join(details), on_all_ranks=getattr(error, "on_all_ranks", False))

    def _planned(self) -> list[Change]:
        """Return what is predicted to make the run fit on its GPU; nothing without one."""
        if self.trainer.strategy.root_device.type != "cuda":
            return []
        from lit_tune.remedies import CONTEXT_GIB, advised  # noqa: PLC0415  # not every run ends like this

        total = torch.cuda.get_device_properties(self.trainer.strategy.root_device).total_memory
        try:
            return advised(*self._heaviest(), int(total - CONTEXT_GIB * GIB))
        except Exception:  # what cannot be predicted is no second fault; the list without figures is left
            return []

    def _smaller(self) -> list[Change]:
        data, trainer = self.datamodule, self.trainer
        derived = (data.global_batch_size or 0) // (trainer.world_size * trainer.accumulate_grad_batches)
        longest = data.prepared.train.lengths.max() if data.prepared else data.max_length
        return advice(
            method=self.model.method,
            quantize=self.model.quantize,
            gradient_checkpointing=self.model.gradient_checkpointing,
            offload_activations=self.model.offload_activations,
            optimizer=self.model.optimizer,
            precision=str(trainer.precision),
            on_gpu=trainer.strategy.root_device.type == "cuda",
            micro_batch_size=derived or data.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE,
            micro_batch_tokens=data.micro_batch_tokens,
            global_batch_size=data.global_batch_size,
            accumulate_grad_batches=self.settings["trainer"]["accumulate_grad_batches"],
            longest_sample=int(longest),
        )

    def _record_memory(self) -> None:
        """Write `memory.json`."""
        monitor = self.memory
        if self.directory is None or not monitor.largest:
            return
        model, data = self.settings["model"], self.settings["data"]
        settings = {f"model.{name}": model[name] for name in MEMORY_SETTINGS["model"]}
        settings |= {f"data.{name}": data[name] for name in MEMORY_SETTINGS["data"]}
        settings |= {
            "model.lora.rank": self.model.lora.rank if self.model.method == "lora" else None,
            "trainer.precision": str(self.trainer.precision),
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "devices": self.trainer.world_size,
            "strategy": type(self.trainer.strategy).__name__,
            "tokens_of_largest_micro_batch": monitor.most_tokens,
        }
        peaks = {"gpu_peak_gib": monitor.gpu_peak_gib, "host_peak_gib": monitor.host_peak_gib}
        content = memory_json.record(monitor.largest, predicted=monitor.predicted, run=peaks, settings=settings)
        memory_json.write(content, self.directory)

    def _log_hyperparameters(self) -> None:
        """Put the settings and the final metrics into TensorBoard's HParams tab."""
        # By names of their own and behind the curves, of which they are no points; there a continued run drops them.
        metrics: dict[str, float] = {}
        if self.epochs.epoch_losses:
            metrics["final/train_epoch_loss"] = self.epochs.epoch_losses[-1]
        if self.epochs.val_losses and (val_loss := self.epochs.val_losses[-1]) is not None:
            metrics["final/val_loss"] = val_loss
        settings = {
            f"{part}.{key}": str(value) if isinstance(value, list | dict) else value
            for part in ("model", "data")
            for key, value in self.settings[part].as_flat().__dict__.items()
            if value is not None
        }
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(redact(settings), metrics, step=self.trainer.global_step)
                logger.finalize("success")  # it has opened its file again

    def _summary(self) -> RunSummary:
        assert self.directory is not None
        total, trainable = self.model.parameter_counts()
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        history = self.samples.history
        changes = (
            [
                SampleChange(prompt, before, after)
                for prompt, before, after in zip(self.samples.prompts, history[0][1], history[-1][1], strict=True)
            ]
            if len(history) > 1
            else []
        )
        run = self.directory
        places = [
            ("result", run / RESULT),
            ("config", run / CONFIG),
            ("metrics", run / METRICS_FILE),
            ("memory", run / memory_json.FILE),
            ("checkpoints", run / checkpoint.DIRECTORY),
        ]
        return RunSummary(
            name=run.name,
            train_losses=self.epochs.epoch_losses,
            val_losses=self.epochs.val_losses,
            trainable_parameters=trainable,
            total_parameters=total,
            seconds=time.monotonic() - self._started,
            peak_gib=self.memory.peak_gib,
            peak_of="GPU" if on_gpu else "host",
            memory=self.memory.largest,
            predicted_memory=self.memory.predicted,
            tokens_per_s=self.throughput.average.get("throughput/tokens_per_s"),
            samples=changes,
            places=[(what, str(path)) for what, path in places],
            next_command=f"tensorboard --logdir {shlex.quote(str(run.parent))}",
        )

    # -- validate, test ----------------------------------------------------------------------------------------------

    def before_validate(self) -> None:
        """Refuse to measure nothing."""
        if self.datamodule.prepare(self.model.load_tokenizer).val is None:
            raise InputError(
                "there are no held-out records to measure on: set data.val_path, or data.val_fraction as in training."
            )

    before_test = before_validate

    # -- predict -----------------------------------------------------------------------------------------------------

    def before_predict(self) -> None:
        """Tell the data module how long answers may be."""
        self.datamodule.max_new_tokens = self._get(self.config_init, "samples").max_new_tokens

    def predict(self, model: LlamaTuner, datamodule: InstructData, **kwargs: Any) -> None:
        """Answer the prompts of the held-out records, or of all, and write them to `predictions.jsonl`."""
        kwargs["return_predictions"] = True
        answers = [
            answer for batch in self.trainer.predict(model, datamodule=datamodule, **kwargs) or [] for answer in batch
        ]
        asked = datamodule.predict_dataloader()
        decode = datamodule.prepare(model.load_tokenizer).tokenizer.decode
        rows = [
            {"id": number, "prompt": decode(prompt), "answer": decode(answer)}
            for number, prompt, answer in zip(asked.ids, asked.prompts, answers, strict=True)
        ]
        gathered: list[list[dict[str, Any]]] = [rows]
        if self.trainer.world_size > 1:
            gathered = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, rows)
        if is_main_process():
            path = (run_of(self.resumed_from) if self.resumed_from else Path()) / PREDICTIONS
            everything = sorted((row for part in gathered for row in part), key=lambda row: int(row["id"]))
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in everything))
            self.console.print(f"{len(everything)} answers in {path}")


# -- ways in -----------------------------------------------------------------------------------------------------------


def start(command: str, arguments: list[str], *, recipe: Path | None) -> None:
    """Run `fit`, `validate`, `test` or `predict` with the arguments of the command line."""
    quieten()
    restrict_imports()
    if recipe and is_main_process() and "--print_config" not in arguments:
        print(f"Recipe {shown(recipe)}", flush=True)
    TuneCLI([command, *arguments], recipe=recipe)


def build(
    arguments: list[str],
    *,
    description: str,
    options: Callable[[LightningArgumentParser], None] | None = None,
    adjust: Callable[[Any], dict[str, Any]] | None = None,
) -> TuneCLI:
    """Build a run from fit's settings without starting it, for the tools that look at one.

    Args:
        description: What the tool's `--help` says first.
        options: Adds the tool's own settings to the parser.
        adjust: Changes the parsed settings before anything is made of them, and returns what the run is for, as fields
            of `techniques.Choice`, where that is another machine than this one.
    """
    quieten()
    restrict_imports()
    arguments, found = recipes.expand(arguments)
    recipe = found[-1] if found else None
    return TuneCLI(arguments, recipe=recipe, run=False, description=description, options=options, adjust=adjust)


def load_run(config: str) -> TuneCLI:
    """Build the module, data and trainer of a configuration file (or recipe), not started."""
    return build(["--config", config], description="")
