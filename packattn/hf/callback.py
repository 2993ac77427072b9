"""PackingCallback: what the rows of a training run hold, in the logs of transformers' Trainer."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DefaultFlowCallback, TrainerCallback

from packattn.boundaries import boundaries
from packattn.hf.conditions import Conditions
from packattn.hf.inputs import given_sequences, own_positions, tokens_of


class PackingCallback(TrainerCallback):  # type: ignore[misc]
    """Adds figures of packing to whatever Trainer logs, for packed and padded batches alike.

    packing/tokens_per_second: real tokens of all ranks, over the time of the steps, without evaluations and
        checkpoints.
    packing/tokens_per_row, packing/sequences_per_row: real tokens and sequences, on average.
    packing/fill: the share of the tokens computed that is real, from 0 to 1.

    All are of the steps since the log before, over all ranks. Nothing is read from the device but at a log.

    `Trainer(..., callbacks=[PackingCallback()])` shows them in what Trainer prints and in `trainer.state.log_history`.
    Reporters (TensorBoard, Weights & Biases, ...) write a log before the callbacks of the user see it;
    `PackingCallback().add_to(trainer)` stands before them.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._counts: list[Tensor] = []
        self._seconds, self._since = 0.0, 0.0
        self._figures: dict[str, float] = {}

    def add_to(self, trainer: Any) -> "PackingCallback":
        """Put this callback before the reporters of a Trainer; returns the callback."""
        callbacks = trainer.callback_handler.callbacks
        flow = [at for at, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback)]
        callbacks.insert(flow[-1] + 1 if flow else 0, self)  # which decides when there is a log
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Watch the forwards of the model."""
        self.on_train_end(args, state, control)  # of a run that ended by an error
        self._counts, self._seconds, self._figures = [], 0.0, {}
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the time of an evaluation."""
        self._since = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the time of a checkpoint."""
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Work the figures out, where a log follows: every rank comes by here, whoever logs."""
        if control.should_log and self._counts:
            counts = torch.stack(self._counts).sum(0)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            rows, size, real, sequences = counts.tolist()
            self._pass_time()
            self._figures = {
                "packing/tokens_per_second": real / self._seconds,
                "packing/tokens_per_row": real / rows,
                "packing/sequences_per_row": sequences / rows,
                "packing/fill": real / size,
            }
            self._counts, self._seconds = [], 0.0
        else:
            self._pass_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the figures to the log and to the history."""
        if logs is not None and self._figures:
            logs.update(self._figures)
            if state.log_history:
                state.log_history[-1].update(self._figures)
            self._figures = {}

    def _pass_time(self) -> None:
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: rows, their tokens, the real ones, and sequences, int64 (4,)."""
        tokens = tokens_of(kwargs)
        if not module.training or not isinstance(tokens, Tensor) or tokens.ndim < 2:
            return
        rows, n = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        positions = kwargs.get("position_ids")
        if positions is None or positions.ndim != 2:
            given = given_sequences(Conditions(), kwargs, tokens)  # the model looks at them
            positions = own_positions(tokens, mask) if given is None else given
        sequences, _, _, padding = boundaries(positions.expand(rows, n), mask).summary.long().unbind()
        size = torch.full_like(padding, rows * n)
        self._counts.append(torch.stack([torch.full_like(padding, rows), size, size - padding, sequences]))
