"""The LightningModule: a LLaMA-family model, trained with LoRA or in full, with a loss per supervised token.

`__init__` only stores plain settings; the weights come in `configure_model`. That keeps planning cheap, and lets a
strategy decide where and in which dtype the model is made. The module meets the data only in the batch, whose keys are
documented in `lit_tune.data.collate`.

What is stored in which dtype: frozen weights in the compute dtype; weights that train in fp32 under `*-mixed`, in the
compute dtype under `*-true`; LoRA adapters always as fp32 masters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from typing_extensions import override

from lit_tune.continuation import Setting, refuse_changes
from lit_tune.errors import InputError, NonFiniteError
from lit_tune.generate import generate
from lit_tune.memory import SavedTensors
from lit_tune.modules import load
from lit_tune.modules.checkpointing import GradientCheckpointing, checkpoint_blocks, checkpointed_blocks
from lit_tune.modules.load import Quantize
from lit_tune.modules.lora import (
    Lora,
    apply_lora,
    count_parameters,
    keep_activations_half,
    load_adapter,
)
from lit_tune.modules.loss import nll_sum
from lit_tune.modules.offload import ActivationOffload
from lit_tune.modules.optim import (
    OptimizerName,
    ScheduleName,
    StepInBackward,
    gradient_norm,
    learning_rate_factor,
    make_optimizer,
    warmup_steps,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["lora", "fft"]
Batch = dict[str, Any]

DEFAULT_LEARNING_RATE = {"lora": 2e-4, "fft": 2e-5}
MOST_IDS_NAMED = 20

# What the tensors of a checkpoint are: with any of it changed they do not fit.
FIXED_SETTINGS = (
    "model.method",
    "model.lora.rank",
    "model.lora.targets",
    "model.lora.bias",
    "model.lora.variant",
    "model.optimizer",
)


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the forward pass under a Lightning precision setting such as `bf16-mixed`."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return torch.float64 if precision.startswith("64") else torch.float32


def storage_dtype(precision: str, *, trains: bool) -> torch.dtype:
    """Return the dtype in which a base weight is stored, depending on whether it `trains`."""
    return torch.float32 if trains and precision.endswith("mixed") else compute_dtype(precision)


def make_trainable(
    model: PreTrainedModel, *, method: Method, lora: Lora, adapter: str | None
) -> PreTrainedModel | PeftModel:
    """Make a base ready to train by `method`; the one place where the methods part."""
    if method == "lora":
        return load_adapter(model, adapter) if adapter else apply_lora(model, lora)
    # PEFT has frozen the base; merged, all of it trains.
    return load_adapter(model, adapter).merge_and_unload().requires_grad_(True) if adapter else model


class LlamaTuner(LightningModule):
    """Fine-tune a LLaMA-family causal language model on instructions.

    Args:
        base: The model to start from: a hub id, a local directory of safetensors, or `smollm2-135m`.
        method: `lora` trains small adapters beside frozen weights; `fft` trains all parameters.
        quantize: Hold the frozen base in fewer bits: int8, nf4 or fp4 (LoRA only).
        adapter: Directory of a PEFT adapter to start a new run from (to go on with a run, use --ckpt_path).
        lora: The adapters' settings.
        learning_rate: Peak learning rate; left out, 2e-4 for LoRA and 2e-5 for fft.
        optimizer: adamw (fused where it can be) keeps two moments of each number that trains, 8 bytes in fp32;
            adamw_8bit keeps them in a quarter of that, with a little noise in the steps; paged_adamw_8bit lets them
            move to host memory where the GPU's runs short (CUDA only); adafactor keeps a row and a column of each
            matrix; sgd keeps nothing, and needs another learning rate.
        optimizer_in_backward: Step every parameter in the backward pass, as soon as its gradient is there, and drop
            that: gradients take next to nothing instead of as much as the weights, and the result is the same. fft on
            one device only, without accumulation and without clipping (trainer.gradient_clip_val null); it costs a
            wait for the GPU at every parameter.
        weight_decay: Decoupled decay of matrices; norms and biases never decay.
        warmup: Warm-up of the learning rate, as a fraction of all steps (below 1) or as a number of steps.
        schedule: How the rate falls after the warm-up: on half a cosine, linearly, or not at all.
        gradient_checkpointing: `full` keeps only each layer's input and computes the rest again in the backward pass:
            much less activation memory for a third to a half more time. A number N does so for every N-th layer,
            `mlp` only for the feed-forward half of each: a third to a half of what `full` saves, for half of its time.
            `none` keeps all; `auto` takes the cheapest of these that fits. Losses are the same to the bit.
        offload_activations: Keep what the backward pass needs of the forward pass in host memory, beside checkpointing
            or instead of it: the GPU holds a few layers' activations at a time, the host (pinned) all, and each goes
            over the bus twice. Losses are the same to the bit.
        skip_nonfinite: How many optimizer steps whose loss or gradient is NaN or infinite may be skipped, weights and
            optimizer untouched, before the run ends; 0 ends it at the first.
        attention: `auto` is the package's padding-free attention; or a name that transformers knows, such as sdpa,
            eager or flash_attention_2.
    """

    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        base: str = "smollm2-135m",
        method: Method = "lora",
        quantize: Quantize = "none",
        adapter: str | None = None,
        lora: Lora = Lora(),  # noqa: B008  # never changed; so that --help and --print_config show its settings
        learning_rate: float | None = None,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        schedule: ScheduleName = "cosine",
        gradient_checkpointing: GradientCheckpointing = "none",
        attention: str = "auto",
        skip_nonfinite: int = 0,
        offload_activations: bool = False,
        optimizer_in_backward: bool = False,
    ) -> None:
        super().__init__()
        if skip_nonfinite < 0:
            raise InputError(f"model.skip_nonfinite is {skip_nonfinite}; it must be 0 or more.")
        self.base = base
        self.method = method
        self.quantize = quantize
        self.adapter = adapter
        self.lora = lora
        self.learning_rate = DEFAULT_LEARNING_RATE[method] if learning_rate is None else learning_rate
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.schedule = schedule
        self.gradient_checkpointing = gradient_checkpointing
        self.attention = attention
        self.skip_nonfinite = skip_nonfinite
        self.offload_activations = offload_activations
        self.optimizer_in_backward = optimizer_in_backward
        self.saved_tensors: SavedTensors | None = None  # when set, counts what `nll` saves for the backward pass
        self.skipped_steps = 0
        self.allow_changed: Collection[str] = ()  # settings that a continued run may have otherwise
        # A LoRA checkpoint holds no base weights, so loading one must not miss them.
        self.strict_loading = method == "fft"
        self.val_nll = MeanMetric()
        self._step_parts: list[tuple[Sequence[int], Tensor]] = []  # of the step under way: sample ids, sum of their nll
        self._step_ids: list[int] = []  # of the step whose gradient is complete
        self._skip_step = False
        self._gradient_norm: Tensor | None = None
        self._offload = ActivationOffload() if offload_activations else None

    # -- what the module is made of ----------------------------------------------------------------------------------

    def settings(self) -> dict[str, Setting]:
        """Return what makes this model and its training what they are, by the names of the settings."""
        described: dict[str, Setting] = {
            "model.base": f"weights {self._fingerprint}",
            "model.method": self.method,
            "model.quantize": self.quantize,
        }
        if self.method == "lora":
            described |= {f"model.lora.{name}": value for name, value in vars(self.lora).items()}
        return described

    def training_settings(self) -> dict[str, Setting]:
        """Return what else decides how the weights change in an optimizer step."""
        clipping = self.trainer.gradient_clip_algorithm
        return {
            "model.optimizer": self.optimizer,
            "model.learning_rate": self.learning_rate,
            "model.weight_decay": self.weight_decay,
            "model.warmup": self.warmup,
            "model.schedule": self.schedule,
            "trainer.precision": str(self.trainer.precision),
            "trainer.gradient_clip_val": self.trainer.gradient_clip_val,
            "trainer.gradient_clip_algorithm": clipping and clipping.value,  # a checkpoint holds plain values
        }

    @cached_property
    def _fingerprint(self) -> str:
        # Every checkpoint holds it.
        return load.fingerprint(load.base_directory(self.base))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the base's tokenizer (a fresh object at every call)."""
        return load.load_tokenizer(load.base_directory(self.base))

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):  # Lightning calls this hook again for every stage
            return
        precision, directory = str(self.trainer.precision), load.base_directory(self.base)
        dtype = storage_dtype(precision, trains=self.method == "fft")
        # A strategy that hands out rank 0's weights needs them nowhere else.
        elsewhere = getattr(self.trainer.strategy, "loads_on_rank_zero", False) and not self.trainer.is_global_zero
        if elsewhere and self.method == "fft" and self.adapter is None:
            config = load.load_config(directory)
            self.adopt(load.empty_llama(config, dtype=dtype, quantize=self.quantize, attention_name=self.attention))
        else:
            self.adopt(load.load_llama(directory, dtype=dtype, quantize=self.quantize, attention_name=self.attention))

    def adopt(self, base: PreTrainedModel) -> None:
        """Make a base, loaded or of shapes alone, the model that this module trains."""
        self.model = make_trainable(base, method=self.method, lora=self.lora, adapter=self.adapter)
        checkpoint_blocks(checkpointed_blocks(self.decoder, self.gradient_checkpointing))
        if compute_dtype(str(self.trainer.precision)) in (torch.bfloat16, torch.float16):
            keep_activations_half(self.model)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper; its layers hold the adapters all the same."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]

    @property
    def decoder(self) -> Any:
        """The model without its head."""
        return getattr(self.causal_lm, self.causal_lm.base_model_prefix)

    def parameter_counts(self) -> tuple[int, int]:
        """Return (total, trainable) numbers of parameters."""
        return count_parameters(self.model)

    @override
    def to(self, *args: Any, **kwargs: Any) -> LlamaTuner:
        """Move to a device; dtypes stay as `configure_model` has chosen them.

        NOTE: Lightning's `*-true` asks for the whole module in half precision: it would round the adapters, and the
        frequencies of the rotary embedding, of which positions far apart would become one.
        """
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device=device, non_blocking=non_blocking)

    # -- training ----------------------------------------------------------------------------------------------------

    def nll(self, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropies (nats, fp32) of the supervised tokens of a micro-batch."""
        packed: dict[str, Any] = {}
        if "cu_seqlens" in batch:  # the names by which transformers' attention functions know sample boundaries
            cu, longest = batch["cu_seqlens"], batch["longest"]
            packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
        dtype = compute_dtype(str(self.trainer.precision))
        # fp32 adapters over a half-precision base meet under autocast; under `*-mixed` this repeats Lightning's own.
        # No cache: every weight is used once, and the copies of all would live until the forward pass is over.
        half = dtype in (torch.bfloat16, torch.float16)
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=half, cache_enabled=False)
        with autocast, self._saving():
            model = self.causal_lm
            hidden_BTD = self.decoder(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **packed
            ).last_hidden_state
            head = model.get_output_embeddings()
            vocabulary = model.config.get_text_config().vocab_size
            return nll_sum(hidden_BTD, batch["positions"], batch["targets"], head, vocabulary=vocabulary)

    def _saving(self) -> AbstractContextManager[None]:
        """Return what takes care of the tensors that a forward pass saves for its backward pass."""
        if self._offload is not None:
            return self._offload.saving(counted=self.saved_tensors)
        return self.saved_tensors.counting() if self.saved_tensors is not None else nullcontext()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        # Dropout depends on the seed and the micro-batch's place only: nothing random has to be saved to go on.
        torch.manual_seed(batch["rng_seed"])
        nll = self.nll(batch)
        self._step_parts.append((batch["sample_ids"], nll.detach()))
        if batch["last_of_step"]:
            self._close_step(batch["step_supervised"], batch["step"])
        # Lightning divides by the accumulation, DDP's and FSDP's averages by the world: undo both, divide by tokens.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["step_supervised"]
        return {"loss": nll * scale, "nll_sum": nll.detach()}

    def _close_step(self, supervised: int, step: int) -> None:
        """Log the loss of the optimizer step, the mean over its tokens of all ranks; it must be finite."""
        own = torch.stack([nll.double() for _, nll in self._step_parts]).sum()
        loss = float(self.trainer.strategy.reduce(own, reduce_op="sum")) / supervised
        if not math.isfinite(loss):
            broken = [i for ids, nll in self._step_parts if not math.isfinite(float(nll)) for i in ids]
            self._skip_or_stop(f"the loss of optimizer step {step} is {loss}", broken)
        self._step_ids = [i for ids, _ in self._step_parts for i in ids]
        self._step_parts = []
        self.log("train/loss", loss, prog_bar=True, rank_zero_only=True)

    def _skip_or_stop(self, fault: str, own_ids: Sequence[int]) -> None:
        """Have the step left out, if as many may be; all ranks come here together.

        Args:
            fault: What is not finite, and where.
            own_ids: The samples that it comes from, those of this rank.

        Raises:
            NonFiniteError: No more steps may be skipped.
        """
        self._skip_step = True
        self.skipped_steps += 1
        where = f"{fault} ({_named(_of_all_ranks(own_ids))})"
        if self.skipped_steps <= self.skip_nonfinite:
            self.print(
                f"Skipped: {where}; {self.skipped_steps} of at most {self.skip_nonfinite} (model.skip_nonfinite)"
            )
            return
        often = f" after {self.skip_nonfinite} skipped steps" if self.skip_nonfinite else ""
        raise NonFiniteError(
            f"{where}{often}; the weights were not updated with it. Lower model.learning_rate (now "
            f"{self.learning_rate}), use trainer.precision bf16-mixed or 32-true, look at the records with `lit-tune "
            "data --show`, or let model.skip_nonfinite skip some steps."
        )

    def _check_gradient(self, norm: Tensor) -> None:
        """Have the step left out, or end the run, if the gradient's norm is not finite."""
        if not torch.isfinite(norm):
            step = self.trainer.global_step
            self._skip_or_stop(f"the gradient of optimizer step {step} is {float(norm)}", self._step_ids)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, StepInBackward):  # gradients were checked and used, and are gone
            norm = optimizer.gradient_norm()
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = gradient_norm(gradients, sum_over_ranks=self._sum_over_ranks)
        # fp16's scaler skips a step whose gradients overflow, and lowers its scale; a broken loss is left to it too.
        if not self._scales_loss:
            if not self._skip_step:
                self._check_gradient(norm)
            if self._skip_step:  # an optimizer leaves alone what has no gradient
                optimizer.zero_grad(set_to_none=True)
        self._gradient_norm = None if self._skip_step else norm
        self._skip_step = False
        self.log("train/grad_norm", norm, rank_zero_only=True)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"], rank_zero_only=True)
        if self.skip_nonfinite:
            self.log("train/skipped_steps", float(self.skipped_steps), rank_zero_only=True)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        strategy = self.trainer.strategy
        return strategy.reduce(value.to(strategy.root_device), reduce_op="sum")

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None or self._gradient_norm is None:
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), self._gradient_norm)

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning does so behind the next forward pass, which gradients as large as the weights would lie beside.
        optimizer.zero_grad(set_to_none=True)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.optimizer,
            self.parameters(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=not self._scales_loss,
        )
        if self.optimizer_in_backward:
            optimizer = StepInBackward(optimizer, check=self._check_gradient)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._learning_rate_factor()), "interval": "step"},
        }

    @property
    def _scales_loss(self) -> bool:
        return str(self.trainer.precision) == "16-mixed"

    def _learning_rate_factor(self) -> Callable[[int], float]:
        data: Any = getattr(self.trainer, "datamodule", None)
        total = data.total_steps()
        return partial(
            learning_rate_factor,
            schedule=self.schedule,
            warmup=warmup_steps(self.warmup, total),
            total_steps=total,
        )

    # -- validation --------------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        nll = self.nll(batch)  # of an idle rank's filler, too: sharded weights are gathered by all ranks or none
        if supervised := batch["num_supervised"]:
            self.val_nll.update(nll / supervised, weight=supervised)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_held_out("val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        loss = self.val_nll.compute()
        self.val_nll.reset()
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val")
        self.log(f"{stage}/perplexity", loss.exp())

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[list[int]]:
        """Return the answers (token ids, without the token that ended them) to a batch of `prompts`."""
        return generate(
            self.model,
            batch["prompts"],
            max_new_tokens=batch["max_new_tokens"],
            stop_token_ids=batch["stop_token_ids"],
            pad_token_id=batch["pad_token_id"],
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.method == "fft":
            return state
        trains = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trains}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lit_tune"] = {
            "settings": self.settings() | self.training_settings(),
            "skipped_steps": self.skipped_steps,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trains = self.trainer.state.fn == TrainerFn.FITTING
        now = self.settings() | (self.training_settings() if trains else {})
        refuse_changes(checkpoint["lit_tune"]["settings"], now, allowed=self.allow_changed, fixed=FIXED_SETTINGS)
        if trains:
            self.skipped_steps = checkpoint["lit_tune"]["skipped_steps"]
            self._set_rates(checkpoint)

    def _set_rates(self, checkpoint: dict[str, Any]) -> None:
        """Let this run's learning rate, schedule and weight decay hold, not those that the optimizer was saved with.

        With unchanged settings and length of the run they are the same to the bit.
        """
        rate = self.learning_rate * self._learning_rate_factor()(checkpoint["global_step"])
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        for group in groups:
            group |= {"initial_lr": self.learning_rate, "lr": rate}
        if "model.weight_decay" in self.allow_changed:
            groups[0]["weight_decay"] = self.weight_decay  # of the matrices; the other group never decays
        checkpoint["lr_schedulers"][0] |= {
            "base_lrs": [self.learning_rate] * len(groups),
            "_last_lr": [rate] * len(groups),
        }


def _of_all_ranks(ids: Sequence[int]) -> list[int]:
    """Return the sample ids of all ranks, which all call this."""
    if not torch.distributed.is_initialized():
        return sorted(ids)
    gathered: list[Sequence[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, list(ids))
    return sorted(i for part in gathered for i in part)


def _named(ids: Sequence[int]) -> str:
    named = ", ".join(map(str, ids[:MOST_IDS_NAMED]))
    more = f" and {len(ids) - MOST_IDS_NAMED} more" if len(ids) > MOST_IDS_NAMED else ""
    return f"{'record' if len(ids) == 1 else 'records'} {named}{more}, counted from 0"
