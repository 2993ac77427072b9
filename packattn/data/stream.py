"""PackedStream: packs examples as they come, and goes on exactly where it was stopped."""

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from packattn.data.accelerated import check_loader, check_skipped, reads_ahead
from packattn.data.collator import PackingCollator, packed_row
from packattn.data.examples import holds_tokens, left_out
from packattn.data.packing import Overlong, make_limits
from packattn.data.passes import Pass
from packattn.data.source import Source, share_of
from packattn.data.state import check_fields, check_same, of_epoch, said
from packattn.data.values import whole

_PLAIN = PackingCollator()
_NEVER = -1


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """Packed rows of an endless or unknown number of examples, by best-fit over a bounded number of open bins.

    A row is handed on when it is full, or when it is the fullest of the open ones and another bin is needed; what is
    open at the end of the examples comes last. A pass over the examples begins at the first of them, whatever was read
    before, and every iteration over the stream is independent of the others. An epoch is a pass, or `rows_per_epoch`
    rows.

    `state_dict` counts the rows handed on, and holds a digest of the examples read. To resume, the examples of the pass
    are read again up to there: that costs what reading them costs (a `map` that tokenizes runs again), and is exact
    over whatever gives the same examples in the same order: `shuffle` with a seed, `interleave_datasets`, `batch`,
    `filter`, `map`. Other examples, another order, another number of ranks or workers raise.

    In the workers of a loader every worker packs its own examples: those that the data set deals out itself, if it is a
    torch IterableDataset (`datasets.IterableDataset` is), else every n-th.

    On several ranks there are three ways. `num_replicas` and `rank`: every rank reads all examples and hands on its own
    of the rows; the last rows are halved until every rank has as many. Examples of one rank, made by
    `datasets.distributed.split_dataset_by_node`, are read so too, unless `rows_per_epoch` is given: then every rank
    reads its own examples only. Accelerate and Trainer deal out the rows of one stream of all examples themselves.

    Args:
        examples: mappings with input_ids, to be iterated over. Of examples with a `state_dict` a copy is read.
        capacity: tokens that a row may hold.
        open_bins: rows that are open at a time: more fill better, fewer keep the order.
        max_per_bin, max_square, overlong: as for `pack`; `split` and `dropped` count what was done.
        rows_per_epoch: rows of an epoch of this rank, shared by the workers of a loader; `len` of the stream. None: an
            epoch is a pass over the examples. Epoch e is the rows from e * rows_per_epoch on, of one pass after another
            (pass p calls `set_epoch(p)` of the examples): what an epoch leaves comes in the next, and an epoch may hold
            the end of a pass and the beginning of another. An epoch that does not follow on the one before in the same
            process reads again all that comes before it.
        num_replicas, rank: of how many ranks this is which.
        columns: as for `pack_dataset`; the first example shows which hold one number per token.
        collator: packs the examples of a row.
    """

    def __init__(
        self,
        examples: Iterable[Mapping[str, Any]],
        capacity: int,
        *,
        open_bins: int = 64,
        max_per_bin: int | None = None,
        max_square: int | None = None,
        overlong: Overlong = "error",
        rows_per_epoch: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        columns: Collection[str] | None = None,
        collator: PackingCollator = _PLAIN,
    ) -> None:
        if overlong not in get_args(Overlong):
            raise ValueError(f"overlong must be one of {', '.join(get_args(Overlong))}, got {overlong!r}.")
        whole("open_bins", open_bins, 1)
        self.columns = columns
        self._left_out: frozenset[str] | None = None  # once an example has been read
        if rows_per_epoch is not None:
            whole("rows_per_epoch", rows_per_epoch, 1)
        whole("num_replicas", num_replicas, 1)
        whole("rank", rank, 0, num_replicas - 1)
        self.source = Source(examples)
        if self.source.split is not None:
            if num_replicas != 1:
                raise ValueError(
                    f"num_replicas={num_replicas} was given, and split_dataset_by_node split the examples already; "
                    "leave out one of the two."
                )
            if rows_per_epoch is None:
                rank, num_replicas = self.source.split
                warnings.warn(
                    f"so that all of {num_replicas} ranks have as many rows, each of them reads the examples of all; "
                    "with rows_per_epoch each reads its own.",
                    stacklevel=2,
                )
        self.num_replicas, self.rank = num_replicas, rank
        self.examples, self.collator, self.overlong = examples, collator, overlong
        self.limits, self.open_bins = make_limits(capacity, max_per_bin, max_square), open_bins
        self.rows_per_epoch = rows_per_epoch
        # Shared with the workers of a loader: the epoch that was set, how often one was set, how often workers began to
        # read, and how often an epoch had been set by then.
        self._shared = torch.tensor([_NEVER, 0, 0, 0])
        self._share_memory()
        self._resume: dict[str, Any] | None = None
        self._next_epoch = self._sets_seen = 0
        self._not_iterated()

    def _not_iterated(self) -> None:
        self._run = _Run(self)  # the iteration that began, or handed on a row, last
        self._left: _Run | None = None  # the last finished epoch of rows_per_epoch rows, where the next one goes on
        self._process = _NEVER  # that iterated last

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, has not been iterated over."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_run", "_left", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_memory()
        self._not_iterated()

    def _share_memory(self) -> None:
        self._shared.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        if self.rows_per_epoch is None:
            raise TypeError("the number of rows is not known before they are packed; rows_per_epoch states it.")
        return self.rows_per_epoch

    def __bool__(self) -> bool:
        return True

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, also in workers that live on; examples may shuffle by it.

        Raises:
            ValueError: the loaded state is of another epoch; or Accelerate's loader, which calls this on every rank
                when it begins to read, has settings under which rows would be lost or repeated.
        """
        whole("epoch", epoch, 0)
        check_loader(self)
        if self._resume is not None and not of_epoch(self._resume, epoch):
            self._resume = None
        self._shared[0], self._shared[1] = epoch, self._shared[1] + 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        run = self._run = _Run(self, self._resume)
        self._resume = None
        return self._rows(run)

    def _rows(self, run: "_Run") -> Iterator[dict[str, Tensor]]:
        self._start(run)
        while not run.ended:
            examples = run.passing.next_row()
            if examples is not None:
                row = packed_row(self.collator, examples)
                self._handed_on(run)
                yield row
            elif run.quota is None:
                if run.share["workers"] == 0:
                    check_skipped(self, run.rows)
                run.ended = True
            else:
                run.passing = self._next_pass(run.passing)

    def _handed_on(self, run: "_Run") -> None:
        run.passing.handed_on()
        run.rows += 1
        run.ended = run.rows == run.quota
        self._run = run
        if run.ended:
            self._left, self._next_epoch = run, run.number + 1

    def _start(self, run: "_Run") -> None:
        """Bring `run` to its first row."""
        state, run.share = run.state, self._share()
        self._check_workers(run)
        run.quota, run.epoch = self._quota(run.share), self._epoch()
        if state is not None and state["epoch"] is not None:
            run.epoch = state["epoch"]
        if state is not None:
            check_same(state, run.share)
        if state is not None and state["rows"]:
            run.rows, run.ended = state["rows"], state["ended"]
            run.passing = Pass(self, run.epoch if run.quota is None else state["pass"])
            run.passing.skip_to(state)
            if run.ended:
                self._left = run
        elif run.quota is None:
            run.passing = Pass(self, run.epoch)
            run.ended = state is not None and state["ended"]
        elif self._left is not None and (self._left.number + 1, self._left.share) == (run.number, run.share):
            run.passing, self._left = self._left.passing, None
        else:
            run.passing = Pass(self, 0)
            for _ in range(run.number * run.quota):
                while run.passing.next_row() is None:
                    run.passing = self._next_pass(run.passing)
                run.passing.handed_on()
        run.started, run.ended = True, run.ended or run.quota == 0

    def examples_of(self, epoch: int | None) -> Iterator[Mapping[str, Any]]:
        """The examples that are packed here, those of all ranks if each hands on some of their rows."""
        return self.source.start(epoch, of_all_ranks=self.num_replicas > 1)

    def packed_columns(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of an example that are packed."""
        if self._left_out is None:
            holding = {name: holds_tokens(values) for name, values in example.items()}
            self._left_out = left_out(holding, self.columns, stacklevel=7)
        return {name: values for name, values in example.items() if name not in self._left_out}

    def _share(self) -> dict[str, int]:
        return share_of(self.num_replicas if self.source.split is None else self.source.split[1])

    def _next_pass(self, ended: "Pass") -> "Pass":
        if ended.rows == 0:
            raise ValueError(
                f"rows_per_epoch={self.rows_per_epoch} rows were asked for, and a whole pass over the examples gave "
                f"none ({ended.taken} examples read, {ended.dropped} dropped; {said(self._share())}); give every rank "
                "and worker examples, for instance by more shards."
            )
        return Pass(self, (ended.epoch or 0) + 1)

    def _quota(self, share: dict[str, int]) -> int | None:
        """This worker's part of the rows of an epoch."""
        if self.rows_per_epoch is None:
            return None
        workers = max(share["workers"], 1)
        return self.rows_per_epoch // workers + (share["worker"] < self.rows_per_epoch % workers)

    def _epoch(self) -> int | None:
        """The epoch to come: the one that was set; else the next one of `rows_per_epoch` rows, or None."""
        if self.rows_per_epoch is None:
            return int(self._shared[0]) if self._shared[1] else None
        if self._shared[1] != self._sets_seen:
            self._sets_seen, self._next_epoch = int(self._shared[1]), int(self._shared[0])
        return self._next_epoch

    def _check_workers(self, run: "_Run") -> None:
        """Note that workers read, and refuse those that cannot know which epoch it is."""
        if run.share["workers"] == 0:
            self._shared[2] = 0
        elif run.share["worker"] == 0:
            known = self._shared[1] != self._shared[3] or self._process == os.getpid() or run.state is not None
            if self.rows_per_epoch is not None and self._shared[2] and not known:
                raise RuntimeError(
                    "workers of a loader that end with an epoch do not know which rows_per_epoch rows come next; call "
                    "set_epoch(epoch) of the stream before every epoch, or load with persistent_workers=True."
                )
            self._shared[2], self._shared[3] = self._shared[2] + 1, self._shared[1]
        self._process = os.getpid()

    @property
    def taken(self) -> int:
        """Examples read in the present pass. In a loader's workers, each counts for itself, as for all counts here."""
        return self._run.passing.taken

    @property
    def split(self) -> int:
        """Examples of the present pass that were split."""
        return self._run.passing.split

    @property
    def dropped(self) -> int:
        """Examples of the present pass that were dropped."""
        return self._run.passing.dropped

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the dropped examples."""
        return self._run.passing.dropped_tokens

    @property
    def waiting(self) -> int:
        """Examples (or pieces of split ones) that were read and not handed on yet: the next rows hold them."""
        return self._run.passing.waiting

    @property
    def left_out(self) -> int:
        """Examples (or pieces) of the present pass that no rank got, as they were too few for a row on each."""
        return self._run.passing.left_out

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last row that it handed on: some numbers and strings, for any serialiser.

        In the workers of a StatefulDataLoader (torchdata) that loader's state_dict holds those of its workers.

        Raises:
            RuntimeError: a loader reads ahead of what it hands on, so the stream is not where training is.
        """
        if self._resume is not None:
            return self._resume
        if get_worker_info() is None:
            if self._shared[2]:
                raise RuntimeError(
                    "workers of a loader read the stream, each at a place of its own; take the state_dict of a "
                    "StatefulDataLoader (torchdata), or num_workers=0."
                )
            if reads_ahead(self):
                raise RuntimeError(
                    "Accelerate's loader reads a batch ahead, so the stream is beyond the batches that were trained "
                    "on; save how many batches were, and go on with accelerate.skip_first_batches(loader, batches) "
                    "after loader.set_epoch(epoch)."
                )
        run = self._run
        if run.state is not None and not run.started:
            return run.state
        passing = run.passing
        return {
            **self._packing(), **(run.share if run.started else self._share()),
            "epoch": run.epoch if run.started else self._epoch(), "rows": run.rows, "ended": run.ended,
            "pass": passing.epoch, "pass_rows": passing.rows, "taken": passing.taken_then,
            "digest": passing.digest_then, "split": passing.split, "dropped": passing.dropped,
            "dropped_tokens": passing.dropped_tokens, "left_out": passing.left_out,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next iteration hands on the rows that were still to come.

        That iteration reads the examples of the pass again, and raises ValueError if they are not those that had been
        read.

        Raises:
            TypeError, ValueError: this is no state of a PackedStream; or of one that packs in another way, on another
                number of ranks or workers; or of another epoch than the one that was set.
        """
        wanted = self._packing()
        check_fields(state, wanted)
        check_same(state, wanted)
        check_same(state, self._share())
        keep = not self._shared[1] or of_epoch(state, int(self._shared[0]))
        self._resume, self._left = dict(state) if keep else None, None
        if self.rows_per_epoch is not None:
            self._next_epoch, self._sets_seen = state["epoch"] + state["ended"], int(self._shared[1])

    def _packing(self) -> dict[str, Any]:
        return {
            "limits": list(self.limits), "open_bins": self.open_bins, "overlong": self.overlong,
            "rows_per_epoch": self.rows_per_epoch, "collator": repr(self.collator),
        }  # fmt: skip


class _Run:
    """An iteration over a stream: where it stands."""

    def __init__(self, stream: PackedStream, state: dict[str, Any] | None = None) -> None:
        self.state, self.started, self.ended = state, False, False
        self.passing = Pass(stream, None)
        self.share: dict[str, int] = {}
        self.epoch: int | None = None
        self.rows = 0
        self.quota: int | None = None  # the rows of the epoch, None: a pass

    @property
    def number(self) -> int:
        """The epoch, where it was not set the first."""
        return self.epoch or 0
