"""What the model says to the same few prompts before, during and after training.

A loss says little about answers; a handful of them, greedy so that they differ by training alone, says much. Costs one
batched generation per epoch.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from typing_extensions import override

from lit_tune.generate import generate

PROMPTS = (
    "Explain in one sentence why the sky is blue.",
    "List three things to check before a long bicycle tour.",
    "Rewrite politely: Send me the report now.",
)


def literal_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is: neither its Markdown nor its HTML takes effect.

    Lines are joined by `<br>`, so that none begins a list, a heading or a code block.
    """
    escaped = html.escape(text, quote=False).replace("\\", "\\\\")
    escaped = re.sub(r"([`*_{}\[\]()#+\-.!|])", r"\\\1", escaped)
    return "<br>".join(line.replace("  ", "&nbsp; ") for line in escaped.strip().splitlines())


def sample_markdown(prompt: str, answer: str) -> str:
    """Return a prompt and its answer as Markdown for TensorBoard."""
    return f"**Prompt**\n\n{literal_markdown(prompt)}\n\n**Answer**\n\n{literal_markdown(answer)}"


def is_sharded(model: nn.Module) -> bool:
    """Say whether ranks hold only parts of the weights, so that a forward pass needs all of them."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 (dear, and for runs on several devices)

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@dataclass(frozen=True)
class Dialogue:
    """How a run turns prompts into tokens, and tokens into text."""

    encode_prompt: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    stop_token_ids: Sequence[int]
    pad_token_id: int


class Samples(Callback):
    """Let the model answer fixed prompts before training, after every epoch and at the end, as text in TensorBoard.

    Decoding is greedy, and training goes on to the bit as it would have without.

    Args:
        prompts: Instructions to answer, put into the run's prompt template.
        every_n_steps: Also sample after every so many optimizer steps; 0 for epoch ends alone.
        max_new_tokens: The most tokens of an answer.
    """

    def __init__(self, prompts: Sequence[str] = PROMPTS, every_n_steps: int = 0, max_new_tokens: int = 48) -> None:
        self.prompts = list(prompts)
        self.every_n_steps = every_n_steps
        self.max_new_tokens = max_new_tokens
        self.history: list[tuple[int, list[str]]] = []  # optimizer steps done, and an answer to each prompt
        self._dialogue: Dialogue | None = None
        self._before_sampling: Callable[[], None] | None = None

    def bind(
        self,
        *,
        encode_prompt: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        before_sampling: Callable[[], None] | None = None,
    ) -> None:
        """Give the callback what it needs of a run; without it, it does nothing.

        Args:
            encode_prompt: Puts an instruction into the run's prompt template and tokenises it, as training does.
            decode: Turns the tokens of an answer into text.
            stop_token_ids: Tokens that end an answer.
            pad_token_id: Fills up answers that end early.
            before_sampling: Called ahead of every generation, such as `Throughput.pause`.
        """
        self._dialogue = Dialogue(encode_prompt, decode, stop_token_ids, pad_token_id)
        self._before_sampling = before_sampling

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and batch["last_of_step"] and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, model = trainer.global_step, pl_module.model
        assert isinstance(model, nn.Module)
        if self._dialogue is None or not self.prompts or (self.history and self.history[-1][0] == step):
            return
        if self._before_sampling is not None:
            self._before_sampling()
        # Replicas need no one's help to generate; shards need every rank, which then all do the same.
        if trainer.is_global_zero or is_sharded(model):
            with trainer.precision_plugin.forward_context():
                self.history.append((step, self._answers(model, self._dialogue)))
            self._log(trainer, step)

    def _answers(self, model: nn.Module, dialogue: Dialogue) -> list[str]:
        answers = generate(
            model,
            [dialogue.encode_prompt(prompt) for prompt in self.prompts],
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=dialogue.stop_token_ids,
            pad_token_id=dialogue.pad_token_id,
        )
        return [dialogue.decode(answer) for answer in answers]

    def _log(self, trainer: Trainer, step: int) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for board in boards:
            for index, (prompt, answer) in enumerate(zip(self.prompts, self.history[-1][1], strict=True)):
                # Numbered as the step that led to them, like its loss: a run that goes on keeps what lies before.
                board.experiment.add_text(f"samples/{index}", sample_markdown(prompt, answer), max(step - 1, 0))
