"""BalancedTrainer: transformers' Trainer over a BalancedPackingSampler, whose steps are those of a plain run."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from packattn.data import BalancedPackingSampler, Cost, PackingCollator
from packattn.data.counts import count_tokens, is_indexed
from packattn.data.values import lengths_tensor
from packattn.hf.patch import is_patched

# What Trainer and its heirs decide of a loader, besides which examples it takes.
_SETTINGS = (
    "collate_fn", "generator", "in_order", "multiprocessing_context", "num_workers", "persistent_workers", "pin_memory",
    "prefetch_factor", "timeout", "worker_init_fn",
)  # fmt: skip


class BalancedTrainerMixin:
    """Gives any Trainer the micro-batches of a `BalancedPackingSampler`; stands before it among the base classes.

    Every optimiser step has the examples that a plain run with the same arguments draws: per_device_train_batch_size *
    gradient_accumulation_steps * ranks of them, in gradient_accumulation_steps micro-steps; ranks and micro-steps get
    equal work. The seed, the loader's settings and the removal of unused columns are the Trainer's own. A run that is
    resumed from a checkpoint goes on with the very examples that it would have had.

    `class BalancedSFTTrainer(BalancedTrainerMixin, SFTTrainer): pass` is TRL's. The collator has to pack:
    PackingCollator, or TRL's own with padding_free=True.

    Args:
        *args, **kwargs: those of the Trainer.
        token_budget: tokens that a micro-batch may hold, what memory allows. None: any number. A step that does not fit
            raises before its epoch begins.
        cost: of an example; `Cost.of_model(model.config)`, or tokens alone.
        lengths: tokens of each example of train_dataset, where they are known; otherwise its input_ids are counted.
    """

    def __init__(
        self,
        *args: Any,
        token_budget: int | None = None,
        cost: Cost = Cost(),  # noqa: B008  (immutable)
        lengths: Iterable[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._balance: dict[str, Any] = {"token_budget": token_budget, "cost": cost}
        self._lengths = None if lengths is None else lengths_tensor(lengths)

    def get_train_dataloader(self: Any) -> DataLoader[Any]:
        """The loader of the Trainer, with the micro-batches of this rank.

        Raises:
            TypeError: the data set has no length.
            ValueError: an argument asks for what balanced steps cannot be; the lengths are not those of the data set.
        """
        args, dataset = self.args, self.train_dataset
        if not is_indexed(dataset):
            raise TypeError(
                f"a balanced train_dataset must have a length and numbered examples, got {type(dataset).__name__}: a "
                "step is spread once its examples are known. Give a list or a datasets.Dataset, or "
                "use Trainer with pack_dataset's rows."
            )
        accelerator = args.accelerator_config
        for name, given, wanted in (
            ("train_sampling_strategy", args.train_sampling_strategy, ("random", "sequential")),
            ("dataloader_in_order", getattr(args, "dataloader_in_order", True), (True,)),
            ("accelerator_config.split_batches", accelerator.split_batches, (False,)),
            ("accelerator_config.dispatch_batches", accelerator.dispatch_batches, (False, None)),
        ):
            if given not in wanted:
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, wanted))}, got {given!r}: which rank takes which examples, "
                    "and in which order, is decided by the balanced steps."
                )
        if isinstance(self.data_collator, PackingCollator) and not _is_isolated(self.model):
            warnings.warn(
                f"{type(self.model).__name__} is trained on packed rows without packattn.patch, so that the examples "
                "of a row see each other in most calls. Call packattn.patch(model) first.",
                stacklevel=2,
            )
        plain = super().get_train_dataloader()  # type: ignore[misc]
        counted = lengths_tensor(count_tokens(dataset, False) if self._lengths is None else self._lengths)
        if counted.numel() != len(dataset):
            raise ValueError(
                f"lengths must hold one length for each of the {len(dataset)} examples of train_dataset, got "
                f"{counted.numel()}."
            )
        global_batch = self.get_total_train_batch_size(args)
        sampler = BalancedPackingSampler(
            counted,
            global_batch,
            micro_steps=args.gradient_accumulation_steps,
            num_replicas=global_batch // (self._train_batch_size * args.gradient_accumulation_steps),
            rank="all",
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
            **self._balance,
        )
        settings = {name: getattr(plain, name) for name in _SETTINGS}
        loader: DataLoader[Any] = self.accelerator.prepare(DataLoader(plain.dataset, batch_sampler=sampler, **settings))
        if loader.batch_sampler is not sampler:
            # Where a loader from skip_first_batches looks for set_epoch, two wrappers down.
            loader.batch_sampler.sampler = sampler  # type: ignore[union-attr]
        return loader


def _is_isolated(model: nn.Module) -> bool:
    """Whether something keeps the examples of a row apart, or this is no model of transformers."""
    pretrained = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    by_flash = any("flash" in str(module.config._attn_implementation) for module in pretrained)
    return not pretrained or by_flash or is_patched(model)


class BalancedTrainer(BalancedTrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with balanced ranks: the steps of a plain run, no rank that waits, resumed exactly.

    The arguments are those of Trainer and of `BalancedTrainerMixin`; the data_collator is a `PackingCollator` unless
    one is given. The model has to keep the examples apart: `packattn.patch(model)`.
    """

    def __init__(
        self, model: Any = None, args: Any = None, data_collator: Any = None, *others: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, args, PackingCollator() if data_collator is None else data_collator, *others, **kwargs)
