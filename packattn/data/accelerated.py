"""What Accelerate's loaders, and so transformers' Trainer, do with a stream: refuse what would lose or repeat rows."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

from packattn.data.collator import PackingCollator

if TYPE_CHECKING:
    from packattn.data.stream import PackedStream

_TRAINER = "accelerator_config={{{0!r}: {1}}} of TrainingArguments, DataLoaderConfiguration({0}={1}) of Accelerate"


def check_loader(stream: "PackedStream") -> None:
    """Check the loader of Accelerate that is about to read `stream`, if there is one. All ranks find the same.

    Raises:
        ValueError: its settings would lose or repeat rows, or cannot work; the message names them.
    """
    loader = _loader_of(stream)
    if loader is None:
        return
    ranks = _ranks()
    if ranks > 1:
        _check_dealing(stream, ranks, loader)
    step = _rows_of_a_step(loader) * max(loader.num_workers, 1)
    if stream.rows_per_epoch is None and ranks > 1:
        warnings.warn(
            f"the last step of an epoch may lack rows for some of {ranks} ranks; Accelerate then repeats rows of the "
            f"first step, or drops the last ones with drop_last. rows_per_epoch, a multiple of {step}, avoids both.",
            stacklevel=4,
        )
    elif stream.rows_per_epoch is not None and stream.rows_per_epoch % step:
        raise ValueError(
            f"rows_per_epoch={stream.rows_per_epoch} must be a multiple of {step}, the rows of a step of {ranks} ranks "
            f"times {max(loader.num_workers, 1)} workers; otherwise rows would be repeated or lost in the last step."
        )


def _check_dealing(stream: "PackedStream", ranks: int, loader: Any) -> None:
    """Whether the loader can deal out the rows of `stream` to several ranks."""
    if stream.source.split is not None or stream.num_replicas > 1:
        raise ValueError(
            "the stream hands on the rows of one rank (split_dataset_by_node or num_replicas), and Accelerate deals "
            f"out the rows of one stream to {ranks} ranks, so most would be lost; give the stream the whole data set, "
            "or read it through a loader that Accelerate did not prepare."
        )
    if loader.use_stateful_dataloader:
        raise ValueError(
            f"use_stateful_dataloader=True saves a place that is not exact for a stream on {ranks} ranks; leave it "
            "out, and go on with loader.set_epoch(epoch) and accelerate.skip_first_batches(loader, batches)."
        )
    collator = _collator(loader.collate_fn)
    if isinstance(collator, PackingCollator) and _dispatches(loader):
        if loader.split_batches:
            raise ValueError(
                f"split_batches=True cuts a packed row into {ranks} pieces; give "
                f"{_TRAINER.format('split_batches', False)}."
            )
        if collator.pad_to is None or collator.return_flash_attn_kwargs:
            raise ValueError(
                f"dispatch_batches, the default for streams, joins the rows of {ranks} ranks into one tensor, so they "
                "must have one size: give PackingCollator(pad_to=capacity), without return_flash_attn_kwargs; or let "
                f"every rank read for itself: {_TRAINER.format('dispatch_batches', False)}."
            )


def check_skipped(stream: "PackedStream", rows: int) -> None:
    """Check that Accelerate's loader, as a resumed Trainer makes it, does not skip more than an epoch of `rows` rows.

    Raises:
        ValueError: it does. It would go on at the beginning of the next epoch, wherever the first run stood in it.
    """
    loader = _loader_of(stream)
    skipped = getattr(loader, "skip_batches", 0)
    if skipped and rows <= skipped * _rows_of_a_step(loader):
        raise ValueError(
            f"the run is resumed after {skipped} batches, and the epoch has only {rows} rows: without a length, "
            "Trainer cannot know in which epoch it was stopped. Give the stream rows_per_epoch, in the first run too."
        )


def reads_ahead(stream: "PackedStream") -> bool:
    """Whether Accelerate reads `stream` now, which it does a batch ahead, in a loader that does not save states."""
    loader = _loader_of(stream)
    return loader is not None and not loader.use_stateful_dataloader


def _rows_of_a_step(loader: Any) -> int:
    """Rows of one batch on every rank."""
    dealt = loader if _dispatches(loader) else loader.dataset
    size = getattr(dealt, "batch_size", None) or loader.batch_size or 1
    return int(size) * (1 if getattr(dealt, "split_batches", False) else _ranks())


def _ranks() -> int:
    return int(sys.modules["accelerate.state"].PartialState().num_processes)


def _dispatches(loader: Any) -> bool:
    """Whether rank 0 reads for all."""
    return isinstance(loader, sys.modules["accelerate.data_loader"].DataLoaderDispatcher)


def _loader_of(stream: "PackedStream") -> Any:
    """The loader of Accelerate that reads `stream` now."""
    if "accelerate.state" not in sys.modules:
        return None
    loader = sys.modules["accelerate.state"].GradientState().active_dataloader
    dataset = getattr(loader, "dataset", None)
    return loader if dataset is stream or getattr(dataset, "dataset", None) is stream else None


def _collator(collate: Any) -> Any:
    """The collator inside of what Trainer wraps it in."""
    while hasattr(collate, "data_collator"):
        collate = collate.data_collator
    return collate
