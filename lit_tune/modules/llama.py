"""The LightningModule: a LLaMA-family model, trained with LoRA or in full, with a loss per supervised token.

`__init__` only stores plain settings; the weights come in `configure_model`. That keeps planning cheap, and lets a
strategy decide where and in which dtype the model is made. The module meets the data only in the batch, whose keys are
documented in `lit_tune.data.collate`.

What is stored in which dtype: frozen weights in the compute dtype; weights that train in fp32 under `*-mixed`, in the
compute dtype under `*-true`; LoRA adapters always as fp32 masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from typing_extensions import override

from lit_tune.errors import InputError, NonFiniteError
from lit_tune.generate import generate
from lit_tune.modules import load
from lit_tune.modules.load import Quantize
from lit_tune.modules.lora import (
    Lora,
    apply_lora,
    count_parameters,
    is_adapter_parameter,
    keep_activations_half,
    load_adapter,
)
from lit_tune.modules.loss import nll_sum
from lit_tune.modules.optim import (
    OptimizerName,
    ScheduleName,
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


def build_model(
    directory: str,
    *,
    method: Method,
    lora: Lora,
    adapter: str | None,
    quantize: Quantize,
    precision: str,
    attention: str,
) -> PreTrainedModel | PeftModel:
    """Load the base of `directory` and make it ready to train by `method`; the one place where the methods part."""
    model = load.load_llama(
        directory,
        dtype=storage_dtype(precision, trains=method == "fft"),
        quantize=quantize,
        attention_name=attention,
    )
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
        optimizer: adamw (fused where it can be), adafactor or sgd.
        weight_decay: Decoupled decay of matrices; norms and biases never decay.
        warmup: Warm-up of the learning rate, as a fraction of all steps (below 1) or as a number of steps.
        schedule: How the rate falls after the warm-up: on half a cosine, linearly, or not at all.
        gradient_checkpointing: `full` keeps only each layer's input and computes the rest again in the backward pass:
            much less activation memory for a third to a half more time. `none` keeps all.
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
        gradient_checkpointing: Literal["none", "full"] = "none",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if method == "fft" and quantize != "none":
            raise InputError(
                f"model.quantize is {quantize} with model.method fft: quantised weights cannot train; "
                "use model.method lora, or model.quantize none."
            )
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
        # A LoRA checkpoint holds no base weights, so loading one must not miss them.
        self.strict_loading = method == "fft"
        self.val_nll = MeanMetric()
        self._step_nll: Tensor | float = 0.0  # summed over the micro-batches of the optimizer step under way
        self._gradient_norm: Tensor | None = None

    # -- what the module is made of ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return the settings that make this model what it is, as plain values for a checkpoint."""
        directory = load.base_directory(self.base)
        return {
            "base": self.base,
            "fingerprint": load.fingerprint(directory),
            "method": self.method,
            "quantize": self.quantize,
            "lora": asdict(self.lora) if self.method == "lora" else None,
        }

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the base's tokenizer (a fresh object at every call)."""
        return load.load_tokenizer(load.base_directory(self.base))

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):  # Lightning calls this hook again for every stage
            return
        self.model = build_model(
            load.base_directory(self.base),
            method=self.method,
            lora=self.lora,
            adapter=self.adapter,
            quantize=self.quantize,
            precision=str(self.trainer.precision),
            attention=self.attention,
        )
        if self.gradient_checkpointing == "full":
            self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # With a frozen base no input of a layer requires a gradient, and a checkpointed layer would give none.
            self.causal_lm.enable_input_require_grads()
        if self.method == "lora":
            self._keep_adapters_fp32()
        if compute_dtype(str(self.trainer.precision)) in (torch.bfloat16, torch.float16):
            keep_activations_half(self.model)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper; its layers hold the adapters all the same."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[no-any-return]

    def parameter_counts(self) -> tuple[int, int]:
        """Return (total, trainable) numbers of parameters."""
        return count_parameters(self.model)

    def _keep_adapters_fp32(self) -> None:
        """Undo the cast of adapters to half precision that Lightning's `*-true` makes of the whole module."""
        for name, parameter in self.model.named_parameters():
            if is_adapter_parameter(name) and parameter.requires_grad:
                parameter.data = parameter.data.float()

    # -- training ----------------------------------------------------------------------------------------------------

    def nll(self, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropies (nats, fp32) of the supervised tokens of a micro-batch."""
        packed: dict[str, Any] = {}
        if "cu_seqlens" in batch:  # the names by which transformers' attention functions know sample boundaries
            cu, longest = batch["cu_seqlens"], batch["longest"]
            packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
        dtype = compute_dtype(str(self.trainer.precision))
        # fp32 adapters over a half-precision base meet under autocast; under `*-mixed` this repeats Lightning's own.
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            model = self.causal_lm
            decoder = getattr(model, model.base_model_prefix)
            hidden_BTD = decoder(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **packed
            ).last_hidden_state
            head = model.get_output_embeddings()
            return nll_sum(hidden_BTD, batch["labels"], head, vocabulary=model.config.get_text_config().vocab_size)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        # Dropout depends on (seed, step, rank) only, so nothing random has to be saved to continue a run.
        torch.manual_seed(batch["rng_seed"])
        nll = self.nll(batch)
        self._step_nll = self._step_nll + nll.detach().double()
        if batch["last_of_step"]:
            self._close_step(batch["step_supervised"], batch["step"])
        # Lightning divides by the accumulation, DDP's and FSDP's averages by the world: undo both, divide by tokens.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["step_supervised"]
        return {"loss": nll * scale, "nll_sum": nll.detach()}

    def _close_step(self, supervised: int, step: int) -> None:
        """Log the loss of the optimizer step, the mean over its tokens of all ranks; it must be finite."""
        total = self.trainer.strategy.reduce(self._step_nll, reduce_op="sum")
        loss = float(total) / supervised
        self._step_nll = 0.0
        if not torch.isfinite(torch.tensor(loss)):
            raise NonFiniteError(
                f"the loss of optimizer step {step} is {loss}; the weights were not updated with it. Lower "
                f"model.learning_rate (now {self.learning_rate}), or use trainer.precision bf16-mixed or 32-true."
            )
        self.log("train/loss", loss, prog_bar=True, rank_zero_only=True)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # fp16's scaler skips a step whose gradients overflow, and lowers its scale; elsewhere that is the end.
        if not self.trainer.precision.startswith("16") and not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of optimizer step {self.trainer.global_step} is {float(norm)}; the weights were not "
                f"updated with it. Lower model.learning_rate (now {self.learning_rate}) or use another precision."
            )
        self._gradient_norm = norm
        self.log("train/grad_norm", norm, rank_zero_only=True)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"], rank_zero_only=True)

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
    def configure_optimizers(self) -> Any:
        if self.method == "lora":
            self._keep_adapters_fp32()
        optimizer = make_optimizer(
            self.optimizer,
            self.parameters(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=not str(self.trainer.precision).startswith("16"),
        )
        data: Any = getattr(self.trainer, "datamodule", None)
        total = data.total_steps()
        warmup = warmup_steps(self.warmup, total)

        def factor(step: int) -> float:
            return learning_rate_factor(step, schedule=self.schedule, warmup=warmup, total_steps=total)

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    # -- validation --------------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if supervised := batch["num_supervised"]:
            self.val_nll.update(self.nll(batch) / supervised, weight=supervised)

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
        checkpoint["lit_tune"] = self.describe()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved: Mapping[str, Any] = checkpoint.get("lit_tune", {})
        for key, now in self.describe().items():
            if key != "base" and saved.get(key) != now:
                raise InputError(
                    f"the checkpoint was made with {key} {saved.get(key)!r}, this run has {now!r}; "
                    "continue with the settings it was made with, or start a new run from its result (--model.adapter)."
                )
