"""Pass: one pass over the examples of a stream, packed, as one of several ranks gets it."""

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from packattn.data.examples import Example, mapping_with_tokens, read_example
from packattn.data.fit import BestFit
from packattn.data.packing import longest, too_long_error
from packattn.data.source import Digest

if TYPE_CHECKING:
    from packattn.data.stream import PackedStream

Examples = list[Example]


class Pass:
    """One pass over the examples, packed.

    Args:
        stream: says how to pack.
        epoch: of the examples.
    """

    def __init__(self, stream: "PackedStream", epoch: int | None) -> None:
        self.epoch = epoch
        self.rows = self.taken = self.split = self.dropped = self.dropped_tokens = self.left_out = 0
        self.taken_then, self.digest_then = 0, ""  # when the last row was handed on
        self._stream = stream
        self._source: Iterator[Mapping[str, Any]] | None = None
        self._digest, self._walk = Digest(), BestFit(stream.limits, stream.open_bins)
        self._held: dict[int, Examples] = {}
        self._closed: list[Examples] = []  # rows that wait until there is one for every rank
        self._ended = False

    @property
    def waiting(self) -> int:
        """Examples that were read and not handed on."""
        return sum(map(len, (*self._held.values(), *self._closed)))

    def next_row(self) -> Examples | None:
        """The examples of this rank's next row, None: there is none. To be followed by `handed_on`."""
        ranks = self._stream.num_replicas
        while len(self._closed) < 2 * ranks - 1 and not self._ended:  # so that the last rows can be filled up
            self._read()
        if not self._closed:
            return None
        rows, self._closed = self._closed[:ranks], self._closed[ranks:]
        return rows[self._stream.rank]

    def _read(self) -> None:
        """Take one more example, or close all bins if there is none."""
        if self._source is None:
            self._source = self._stream.examples_of(self.epoch)
        for example in self._source:
            self._take(example)
            return
        self._ended = True
        self._stream.source.ended(self.taken)
        self._closed += [self._held.pop(bin_) for bin_ in sorted(self._held)]
        self._fill_up()

    def _fill_up(self) -> None:
        """Make the number of the last rows a multiple of that of the ranks: halve those of the most examples."""
        ranks, rows = self._stream.num_replicas, self._closed
        while rows and len(rows) % ranks:
            at = max(range(len(rows)), key=lambda at: len(rows[at]))
            half = len(rows[at]) // 2
            if half:
                rows[at : at + 1] = rows[at][:half], rows[at][half:]
            else:
                whole = len(rows) - len(rows) % ranks
                self.left_out = sum(map(len, rows[whole:]))
                del rows[whole:]
                warnings.warn(
                    f"{self.left_out} examples at the end of the epoch were left out: too few for a row on each of "
                    f"{ranks} ranks. With rows_per_epoch they would come in the next epoch.",
                    stacklevel=5,
                )

    def handed_on(self) -> None:
        """Count a row."""
        self.rows += 1
        self.taken_then, self.digest_then = self.taken, str(self._digest)

    def skip_to(self, state: dict[str, Any]) -> None:
        """Read up to where `state` was taken.

        Raises:
            ValueError: what is read is not what had been read.
        """
        while self.rows < state["pass_rows"] and self.next_row() is not None:
            self.handed_on()
        if (self.rows, self.taken_then, self.digest_then) != (state["pass_rows"], state["taken"], state["digest"]):
            raise ValueError(
                f"the first {state['taken']} examples, which the saved state had packed into {state['pass_rows']} "
                "rows, are not the same now, or come in another order; give the same data in the same order (seed of "
                f"every shuffle, transformations, rank, epoch {state['epoch']}), or begin without the state."
            )

    def _take(self, example: Mapping[str, Any]) -> None:
        """Put one example into the open bins."""
        name = f"example {self.taken}"
        chosen = self._stream.packed_columns(mapping_with_tokens(example, name))
        found = read_example(chosen, name, self._stream.collator.start_position)
        tokens, most = found.tokens, longest(self._stream.limits)
        if tokens > most and self._stream.overlong == "error":
            raise too_long_error(name, tokens, most)
        self.taken += 1
        self._digest.add(example)
        if tokens > most and self._stream.overlong == "drop":
            self.dropped += 1
            self.dropped_tokens += tokens
            return
        self.split += tokens > most
        for start in range(0, tokens, most):
            piece = found.cut(start, min(start + most, tokens))
            bin_, closed = self._walk.place(piece.tokens)
            self._held.setdefault(bin_, []).append(piece)
            self._closed += [self._held.pop(full) for full in closed]
