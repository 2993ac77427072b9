"""PackingPlan: which examples lie in which bin; saved, read back, and checked against the data that it is used with."""

import ctypes
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packattn.data.values import write_whole

_FORMAT = 1


class Piece(NamedTuple):
    """A part of a bin: the tokens `start` to `stop` of an example."""

    example: int
    start: int
    stop: int


@dataclass(frozen=True, repr=False)
class PackingPlan:
    """Which examples lie in which bin. `len(plan)` bins; `plan[i]` is the list of Pieces of bin i, in row order.

    Attributes:
        capacity: tokens that a bin may hold.
        offsets: int64 (bins + 1,), bin i holds the pieces `offsets[i]` to `offsets[i + 1]`.
        examples: int64 (pieces,), the example of each piece.
        starts: int64 (pieces,), the first token of each piece in its example; None where no example was split.
        lengths: int64 (pieces,), the tokens of each piece.
        dropped: int64, the examples that were left out because they are too long, in order.
        dropped_tokens: their tokens.
        fingerprint: of the lengths, so that a plan is not used with other data.
        made_by: the arguments of `pack`, for the record.
    """

    capacity: int
    offsets: Tensor
    examples: Tensor
    starts: Tensor | None
    lengths: Tensor
    dropped: Tensor
    dropped_tokens: int
    fingerprint: str
    made_by: dict[str, Any]

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __iter__(self) -> Iterator[list[Piece]]:
        return (self[bin_] for bin_ in range(len(self)))

    def __getitem__(self, bin_: int) -> list[Piece]:
        if not -len(self) <= bin_ < len(self):
            raise IndexError(f"bin must lie in [0, {len(self)}), got {bin_}.")
        begin, end = self.offsets[bin_ % len(self) :][:2].tolist()
        starts = [0] * (end - begin) if self.starts is None else self.starts[begin:end].tolist()
        pieces = zip(self.examples[begin:end].tolist(), starts, self.lengths[begin:end].tolist(), strict=True)
        return [Piece(example, start, start + length) for example, start, length in pieces]

    @property
    def tokens(self) -> int:
        """Tokens in all bins."""
        return int(self.lengths.sum())

    @property
    def fill(self) -> float:
        """Tokens in the bins over the tokens that they could hold."""
        return self.tokens / (len(self) * self.capacity)

    @property
    def num_split(self) -> int:
        """Examples that were cut into pieces."""
        return 0 if self.starts is None else torch.unique(self.examples[self.starts > 0]).numel()

    @property
    def num_examples(self) -> int:
        """Examples of the data set, those that were dropped included."""
        packed = self.examples.numel() if self.starts is None else int((self.starts == 0).sum())
        return packed + self.dropped.numel()

    @cached_property
    def counted(self) -> Tensor:
        """The tokens that each example had when the plan was made, int64 (num_examples,); 0 for those dropped."""
        return torch.zeros(self.num_examples, dtype=torch.int64).index_add_(0, self.examples, self.lengths)

    def per_bin(self, values: Tensor) -> Tensor:
        """Sums over the pieces of each bin: (bins,), of one value per piece, e.g. `plan.lengths ** 2`."""
        sums = torch.zeros(values.numel() + 1, dtype=torch.float64 if values.is_floating_point() else torch.int64)
        torch.cumsum(values, 0, out=sums[1:])
        return sums[self.offsets].diff()

    def __repr__(self) -> str:
        parts = [f"{len(self):,} bins of {self.capacity:,} tokens", f"{self.fill:.2%} full"]
        parts.append(f"{torch.unique(self.examples).numel():,} examples, {self.tokens:,} tokens")
        if self.num_split:
            parts.append(f"{self.num_split:,} examples split")
        if self.dropped.numel():
            parts.append(f"{self.dropped.numel():,} examples dropped ({self.dropped_tokens:,} tokens)")
        return f"PackingPlan({', '.join(parts)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, whole or not at all; an existing file is replaced."""
        path = Path(path)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content = io.BytesIO()  # torch.save to a full disk raises a RuntimeError that does not name the cause
        torch.save({"format": _FORMAT, **fields}, content)
        write_whole(path, lambda unfinished: unfinished.write_bytes(content.getbuffer()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PackingPlan":
        """Read a plan that `save` wrote; its tensors are mapped from the file.

        Raises:
            ValueError: the file is not a plan, or a damaged one.
            OSError: the file cannot be opened.
        """
        try:
            fields = torch.load(Path(path), weights_only=True, mmap=True)
            if fields.pop("format") != _FORMAT:
                raise KeyError("format")
            plan = cls(**fields)
        except OSError:
            raise
        except Exception as error:  # torch.load raises almost anything for a file that torch.save did not write
            raise ValueError(f"{path} is not a packing plan of this version ({error}); make a new one.") from error
        problem = plan._problem()
        if problem:
            raise ValueError(f"{path} is a damaged packing plan: {problem}; make a new one.")
        return plan

    def check(self, lengths: Tensor | None = None) -> None:
        """Refuse to be used if the plan is damaged, or was made of other data.

        Args:
            lengths: of the data, int64 (examples,); None where they are not known.

        Raises:
            ValueError: a bin holds more than the capacity, or the bins and `dropped` do not hold every token of every
                example once; or `lengths` are not those that were packed.
        """
        problem = self._problem()
        if not problem and lengths is not None:
            if lengths.numel() != self.num_examples or fingerprint(lengths) != self.fingerprint:
                raise ValueError(
                    f"the plan was made for other data: the {lengths.numel():,} lengths given are not those that were "
                    "packed. Make a new plan, or give the data set, tokenizer and order of that plan."
                )
            kept = torch.ones_like(lengths).index_fill_(0, self.dropped, 0)
            if not torch.equal(self.counted, lengths * kept):
                problem = "its pieces have not the lengths of the examples"
        if problem:
            raise ValueError(f"the plan is damaged: {problem}; make a new one.")

    def _problem(self) -> str:
        """What is wrong with the plan in itself; empty if nothing is."""
        starts = self.examples if self.starts is None else self.starts
        tensors = (self.offsets, self.examples, self.lengths, self.dropped, starts)
        if not all(isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 1 for t in tensors):
            return "its tensors are not int64 of one dimension"
        if type(self.capacity) is not int or not isinstance(self.made_by, dict):
            return "its capacity is no int, or the record of its arguments no dict"
        pieces = self.examples.numel()
        if self.lengths.numel() != pieces or starts.numel() != pieces:
            return f"{pieces} pieces have {self.lengths.numel()} lengths and {starts.numel()} starts"
        sizes = self.offsets.diff()
        if not sizes.numel() or self.offsets[0] != 0 or self.offsets[-1] != pieces or bool((sizes < 1).any()):
            return "its offsets do not rise from 0 to the number of pieces"
        if bool((self.lengths < 1).any()):
            return f"piece {int((self.lengths < 1).nonzero()[0])} has no tokens"
        over = (self.per_bin(self.lengths) > self.capacity).nonzero().flatten()
        if len(over):
            return f"bin {int(over[0])} holds more than the capacity of {self.capacity} tokens"
        held = torch.cat([self.examples if self.starts is None else self.examples[starts == 0], self.dropped])
        if not held.numel():
            return "no piece begins an example"
        for number in (int(held.min()), int(held.max())):
            if not 0 <= number < held.numel():
                return f"of {held.numel()} examples one has the number {number}"
        times = torch.bincount(held, minlength=held.numel())
        if int(times.max()) > 1:
            example = int((times != 1).nonzero()[0])
            return f"example {example} is there {int(times[example])} times"
        return "" if self.starts is None else self._gap()

    def _gap(self) -> str:
        """Where the pieces of an example that is split do not follow each other; empty if nowhere."""
        assert self.starts is not None
        order = self.starts.argsort(stable=True)
        order = order[self.examples[order].argsort(stable=True)]
        examples, starts = self.examples[order], self.starts[order]
        ends = starts + self.lengths[order]
        follows = torch.zeros_like(starts, dtype=torch.bool)
        follows[1:] = (starts[1:] == ends[:-1]) & (examples[1:] == examples[:-1])
        wrong = ((starts != 0) & ~follows).nonzero().flatten()
        return f"example {int(examples[wrong[0]])} lacks tokens, or has some twice" if len(wrong) else ""


def fingerprint(lengths: Tensor) -> str:
    """A digest of lengths, int64 (n,)."""
    digest = hashlib.sha256()
    for part in torch.split(lengths, 1 << 20):
        digest.update(ctypes.string_at(part.data_ptr(), 8 * part.numel()))
    return digest.hexdigest()
