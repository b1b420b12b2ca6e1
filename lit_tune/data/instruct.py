"""The LightningDataModule: instruction records in, micro-batches of fixed optimizer steps out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from typing_extensions import override

from lit_tune.cache import cache_directory
from lit_tune.continuation import Setting, changed, refuse_changes
from lit_tune.data.encode import IGNORED, Encoded, encode_dataset
from lit_tune.data.loader import HeldOutLoader, PromptLoader, SizedTrainLoader, StepSource, TrainLoader
from lit_tune.data.packing import Cut
from lit_tune.data.prompts import Template, encode_prompt, load_template, stop_token_ids
from lit_tune.data.records import Message
from lit_tune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MICRO_BATCH_SIZE = 4
PROMPTS_A_BATCH = 16
DATA_CONTENT = "data.path"
Limit = str | int | list[int] | None


def bundled_sample() -> str:
    """Return the path of the instruction records that come with the package."""
    return str(resources.files("lit_tune.data") / "sample" / "instructions.jsonl")


def split(num_samples: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Return the samples to train on and those to hold out, both in ascending order; the same ones for every seed."""
    held_out = round(num_samples * val_fraction)
    shuffled = np.random.default_rng(0).permutation(num_samples).tolist()
    return sorted(shuffled[held_out:]), sorted(shuffled[:held_out])


def content_digest(data: Encoded) -> str:
    """Return a short hash of all that training takes from the data: tokens, labels and which samples."""
    digest = hashlib.sha256(data.bounds.tobytes())
    digest.update(data.tokens.tobytes())
    digest.update(data.supervised.tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Prepared:
    """What the settings and a tokenizer make of the records."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: Encoded
    val: Encoded | None

    @cached_property
    def digest(self) -> str:
        """The hash of the training data; every checkpoint holds it, so it is made once."""
        return content_digest(self.train)


class InstructData(LightningDataModule):
    """Serve instruction records, tokenised once and cached, in optimizer steps that any cut leaves the same.

    Args:
        path: Alpaca or messages records: a .json, .jsonl (also .gz), .csv or .parquet file, or a hub data set id; left
            out, the sample that comes with the package.
        columns: Where the file names its columns differently: {instruction: question, output: answer}.
        limit: Which records to take, such as "[0:200]" or 200.
        template: Prompt template: alpaca, llama2, llama3, chatml, chat (the model's own), or a .jinja file.
        max_length: Longest sample in tokens, prompt and response together.
        over_length: What happens to longer ones: dropped, truncated at the end, or the run fails. They are counted.
        packing: Put the samples of a micro-batch into one row without padding (no sample sees another); else one sample
            a row, padded to the longest, neighbours in length together.
        micro_batch_size: Samples per device and micro-batch (4 if no other batch setting is given).
        micro_batch_tokens: Tokens per device and micro-batch, padding included, instead of a number of samples.
        global_batch_size: Samples per optimizer step over all devices; --trainer.accumulate_grad_batches follows.
        val_fraction: Share of the records held out for validation.
        val_path: A file of records for validation, instead of a share of the training records.
    """

    def __init__(
        self,
        path: str | None = None,
        columns: dict[str, str] | None = None,
        limit: Limit = None,
        template: str = "alpaca",
        max_length: int = 1024,
        over_length: Literal["drop", "truncate", "fail"] = "drop",
        packing: bool = True,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        global_batch_size: int | None = None,
        val_fraction: float = 0.0,
        val_path: str | None = None,
    ) -> None:
        super().__init__()
        _check_batch_settings(micro_batch_size, micro_batch_tokens, global_batch_size)
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction is {val_fraction}; it must be at least 0 and less than 1.")
        if val_fraction and val_path:
            raise InputError("data.val_fraction and data.val_path are both given; validation takes one of them.")
        if max_length < 2:
            raise InputError(f"data.max_length is {max_length}; it must be 2 or more.")
        self.path = path or bundled_sample()
        self.columns = columns
        self.limit = limit
        self.template_name = template
        self.max_length = max_length
        self.over_length = over_length
        self.packing = packing
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.global_batch_size = global_batch_size
        self.val_fraction = val_fraction
        self.val_path = val_path
        self.max_new_tokens = 128  # of an answer, in `predict`
        self.allow_changed: Collection[str] = ()  # settings that a continued run may have otherwise
        self.prepared: Prepared | None = None
        self._source: StepSource | None = None

    # -- preparation -------------------------------------------------------------------------------------------------

    def prepare(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Prepared:
        """Read, tokenise and split the records (or take them from the cache); the first call does the work.

        Raises:
            InputError: Anything wrong with the records or the settings; the text names the place.
        """
        if self.prepared is not None:
            return self.prepared
        tokenizer = load_tokenizer()
        chat_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        template = load_template(self.template_name, chat_template=chat_template)
        train = self._encode(self.path, self.limit, tokenizer, template)
        val = self._encode(self.val_path, None, tokenizer, template) if self.val_path else None
        if self.val_fraction:
            kept, held_out = split(len(train), self.val_fraction)
            if not kept or not held_out:
                raise InputError(
                    f"data.val_fraction {self.val_fraction} of {len(train)} samples leaves {len(kept)} to train on and "
                    f"{len(held_out)} to validate with; give more records or another fraction."
                )
            train, val = train.subset(kept), train.subset(held_out)
        self.prepared = Prepared(tokenizer, template, train, val)
        return self.prepared

    def _encode(self, path: str, limit: Limit, tokenizer: PreTrainedTokenizerBase, template: Template) -> Encoded:
        encoded = encode_dataset(
            path,
            tokenizer=tokenizer,
            template=template,
            max_length=self.max_length,
            over_length=self.over_length,
            columns=self.columns,
            limit=limit,
            cache_dir=cache_directory() / "tokens",
        )
        longest = int(encoded.lengths.max())
        if self.micro_batch_tokens is not None and longest > self.micro_batch_tokens:
            raise InputError(
                f"data.micro_batch_tokens is {self.micro_batch_tokens}, but the longest sample of {path} has {longest} "
                "tokens; raise it, or lower data.max_length."
            )
        return encoded

    @override
    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        self.prepare(trainer.lightning_module.load_tokenizer)

    def _ready(self) -> Prepared:
        assert self.prepared is not None, "prepare() comes first"
        return self.prepared

    def encode_prompt(self, instruction: str) -> list[int]:
        """Return the token ids of a prompt for `instruction`, made by the same template and function as in training."""
        ready = self._ready()
        message = Message(role="user", content=instruction, instruction=instruction)
        return encode_prompt([message], ready.template, ready.tokenizer)

    def stop_token_ids(self) -> list[int]:
        """Return the tokens that end an answer: eos, and the template's own end of a turn."""
        ready = self._ready()
        return stop_token_ids(ready.template, ready.tokenizer)

    # -- training ----------------------------------------------------------------------------------------------------

    def cut(self, *, world: int, accumulate: int) -> Cut:
        """Return how an optimizer step is divided over `world` ranks and `accumulate` micro-batches."""
        tokens = self.micro_batch_tokens
        samples = None if tokens else (self.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE)
        if self.global_batch_size and samples:
            samples = min(samples, max(1, self.global_batch_size // (world * accumulate)))
        return Cut(world=world, accumulate=accumulate, samples=samples, tokens=tokens, packing=self.packing)

    def accumulation(self, *, world: int, given: int) -> int:
        """Return the micro-batches per optimizer step: `given`, or what `global_batch_size` asks of `world` ranks.

        Raises:
            InputError: The global batch is no multiple of the others, or `given` is less than 1 or disagrees with it.
        """
        if given < 1:
            raise InputError(f"trainer.accumulate_grad_batches is {given}; it must be 1 or more.")
        if self.global_batch_size is None:
            return given
        share, rest = divmod(self.global_batch_size, world)
        samples = self.micro_batch_size or _largest_divisor(share, at_most=DEFAULT_MICRO_BATCH_SIZE)
        samples = min(samples, max(1, share))
        if rest or share % samples:
            raise InputError(
                f"data.global_batch_size {self.global_batch_size} is not devices x micro-batches x samples: "
                f"{world} devices x data.micro_batch_size {samples} do not divide it."
            )
        derived = share // samples
        if given not in (1, derived):
            raise InputError(
                f"trainer.accumulate_grad_batches is {given}, but data.global_batch_size {self.global_batch_size} on "
                f"{world} devices with data.micro_batch_size {samples} makes it {derived}; leave one of them out."
            )
        return derived

    def source(self) -> StepSource:
        """Return the optimizer steps of the trainer's run."""
        trainer: Any = self.trainer
        ready = self._ready()
        cut = self.cut(world=trainer.world_size, accumulate=trainer.accumulate_grad_batches)
        if self._source is None or self._source.cut != cut or self._source.seed != self._seed():
            self._source = StepSource(ready.train, cut, seed=self._seed(), pad_token_id=_pad_token_id(ready))
        return self._source

    @staticmethod
    def _seed() -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))  # set by Lightning's seed_everything

    def optimizer_steps(self, epochs: int, *, at_most: int | None = None) -> int:
        """Return the number of optimizer steps in the first `epochs` epochs, counting no further than `at_most`."""
        source = self.source()
        total = 0
        for epoch in range(epochs):  # with a token budget, every epoch has its own number
            total += source.steps_in(epoch)
            if at_most is not None and total >= at_most:
                return at_most
        return total

    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run: of the trainer's epochs, or its `max_steps` if that is less."""
        # NOTE: not trainer.estimated_stepping_batches: touching it while the optimizer is made drops the loader's state
        # on resume (pl#20550).
        trainer: Any = self.trainer
        epochs, steps = trainer.max_epochs, trainer.max_steps
        if epochs is None or epochs < 0:
            return max(1, int(steps))
        return max(1, self.optimizer_steps(epochs, at_most=steps if steps >= 0 else None))

    @override
    def train_dataloader(self) -> TrainLoader:
        trainer: Any = self.trainer
        source = self.source()
        kind = SizedTrainLoader if source.cut.samples is not None else TrainLoader
        return kind(source, rank=trainer.global_rank, steps_done=lambda: int(trainer.global_step))

    # -- going on with a run -----------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Setting]:
        """Return what decides which samples an optimizer step trains on, by the names of the settings.

        How a step is cut into devices, accumulation and micro-batches is not among it.
        """
        cut = self.source().cut
        limit = self.limit if isinstance(self.limit, str | int | None) else [str(number) for number in self.limit]
        return {
            "seed_everything": self._seed(),
            "data.template": self.template_name,
            "data.max_length": self.max_length,
            "data.over_length": self.over_length,
            "data.limit": limit,
            "data.val_fraction": self.val_fraction,
            "data.global_batch_size": _global_batch(cut),
            DATA_CONTENT: f"content {self._ready().digest}",  # last: the others above change it too
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        last = max(0, trainer.global_step - 1)
        epoch, step = self.source().locate(last)
        return {"settings": self.settings(), "epoch": epoch, "steps_before_epoch": last - step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trainer: Any = self.trainer
        if getattr(trainer, "state", None) is not None and trainer.state.fn != TrainerFn.FITTING:
            return  # a checkpoint may be measured on any records
        saved: Mapping[str, Setting] = state_dict["settings"]
        now = self.settings()
        allowed = set(self.allow_changed)
        if any(name in allowed and name.startswith("data.") for name in changed(saved, now)):
            allowed.add(DATA_CONTENT)  # another template or length makes other tokens of the same records
        refuse_changes(saved, now, allowed=allowed)
        if "data.global_batch_size" not in changed(saved, now):
            self.source().know(epoch=state_dict["epoch"], steps_before=state_dict["steps_before_epoch"])

    def place_after(self, step: int) -> tuple[int, int, bool]:
        """Return where an optimizer step (0 is the run's first) ends, as the run is cut now.

        Returns:
            The epoch, a rank's micro-batches in it up to the step's end, and whether the epoch ends there too.
        """
        source = self.source()
        epoch, number = source.locate(step)
        steps = source.plan(epoch)[: number + 1]
        return epoch, sum(len(micro_batches) for micro_batches in steps), len(steps) == source.steps_in(epoch)

    # -- evaluation --------------------------------------------------------------------------------------------------

    @override
    def val_dataloader(self) -> HeldOutLoader | list[Any]:
        trainer: Any = self.trainer
        ready = self._ready()
        if ready.val is None:
            return []
        cut = self.cut(world=trainer.world_size, accumulate=1)
        return HeldOutLoader(ready.val, cut, rank=trainer.global_rank, pad_token_id=_pad_token_id(ready))

    @override
    def test_dataloader(self) -> HeldOutLoader | list[Any]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> PromptLoader:
        """Return this rank's prompts: of the held-out samples, or of all where none are held out."""
        trainer: Any = self.trainer
        ready = self._ready()
        data = ready.val or ready.train
        mine = range(trainer.global_rank, len(data), trainer.world_size)
        return PromptLoader(
            [int(data.ids[i]) for i in mine],
            [last_prompt(*data.sample(i)) for i in mine],
            size=PROMPTS_A_BATCH,
            common={
                "max_new_tokens": self.max_new_tokens,
                "stop_token_ids": self.stop_token_ids(),
                "pad_token_id": _pad_token_id(ready),
            },
        )


def last_prompt(tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> list[int]:
    """Return what stands before the last answer of a sample: all tokens up to its last run of supervised ones."""
    supervised = labels != IGNORED
    starts = np.flatnonzero(supervised & ~np.concatenate([[False], supervised[:-1]]))
    return [int(token) for token in tokens[: starts[-1]]]


def _global_batch(cut: Cut) -> str:
    """Name the samples of an optimizer step, whatever they are cut into."""
    if cut.samples is not None:
        return f"{cut.samples * cut.slots} samples"
    return f"{cut.slots} x {cut.tokens} tokens, {'packed' if cut.packing else 'padded'}"


def _largest_divisor(number: int, *, at_most: int) -> int:
    return max((d for d in range(1, at_most + 1) if number % d == 0), default=1)


def _pad_token_id(ready: Prepared) -> int:
    pad = ready.tokenizer.pad_token_id
    assert isinstance(pad, int)
    return pad


def _check_batch_settings(samples: int | None, tokens: int | None, global_batch: int | None) -> None:
    for name, value in {
        "micro_batch_size": samples,
        "micro_batch_tokens": tokens,
        "global_batch_size": global_batch,
    }.items():
        if value is not None and value < 1:
            raise InputError(f"data.{name} is {value}; it must be 1 or more.")
    if tokens is not None and (samples is not None or global_batch is not None):
        raise InputError(
            "data.micro_batch_tokens is given beside data.micro_batch_size or data.global_batch_size; "
            "a batch is counted in tokens or in samples, not in both."
        )
