"""Source: the examples of a stream, read from the beginning in every pass; who gives them is not changed."""

import copy
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info


class Source:
    """What a stream reads, and who reads which part of it.

    Args:
        examples: to be iterated over, once for every pass. A `datasets.IterableDataset` keeps in itself how far it was
            read, so a pass reads a copy of it that stands at the beginning. So does a pass over anything else with a
            `state_dict`: it reads a copy of `examples` as they were when they were given.
    """

    def __init__(self, examples: Iterable[Mapping[str, Any]]) -> None:
        if isinstance(examples, Mapping):
            raise TypeError(
                f"examples must be iterable over mappings with input_ids, got a {type(examples).__name__}, which "
                f"iterates over its keys ({', '.join(map(repr, itertools.islice(examples, 3)))}, ...); give its "
                "values() or one of them."
            )
        if not hasattr(examples, "__iter__"):
            raise TypeError(f"examples must be iterable, got {type(examples).__name__}.")
        if isinstance(examples, Iterator):
            raise TypeError(
                "examples must be iterable again in every epoch, got an iterator; give what makes it, for instance a "
                "class with __iter__, or datasets.IterableDataset.from_generator."
            )
        self._examples = examples
        self._keeps_its_place = hasattr(examples, "state_dict") and not _is_datasets(examples)
        if self._keeps_its_place:
            self._examples = self._copied()
        self._read: Iterator[Mapping[str, Any]] | None = None
        self.gave_any = False  # in a whole pass in this process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None, "gave_any": False}

    def start(self, epoch: int | None, of_all_ranks: bool) -> Iterator[Mapping[str, Any]]:
        """This worker's examples, from the first one of `epoch` (None: of the epoch that the examples are set to).

        `of_all_ranks`: also those that `datasets.distributed.split_dataset_by_node` gives to other ranks.
        """
        examples: Any = self._examples
        if _is_datasets(examples):
            examples = _from_the_beginning(examples)
            if of_all_ranks:
                examples._distributed = None
        elif self._keeps_its_place:
            examples = self._copied()
        if epoch is not None and hasattr(examples, "set_epoch"):
            examples.set_epoch(epoch)
        read: Iterator[Mapping[str, Any]] = iter(examples)
        worker = get_worker_info()
        if read is self._read:
            raise _once(f"iter() of the {type(examples).__name__} gives the same {type(read).__name__} again")
        self._read = read
        if worker is None or isinstance(examples, IterableDataset):
            return read
        return itertools.islice(read, worker.id, None, worker.num_workers)

    def ended(self, taken: int) -> None:
        """Note that a pass ended after `taken` examples.

        Raises:
            ValueError: there were none, while an earlier pass had some.
        """
        if not taken and self.gave_any:
            raise _once("an earlier pass had examples, this one has none")
        self.gave_any = taken > 0

    @property
    def split(self) -> tuple[int, int] | None:
        """Rank and number of ranks, if `datasets.distributed.split_dataset_by_node` made the examples."""
        found = getattr(self._examples, "_distributed", None) if _is_datasets(self._examples) else None
        return None if found is None else (found.rank, found.world_size)

    def _copied(self) -> Any:
        try:
            return copy.deepcopy(self._examples)
        except Exception as error:
            raise TypeError(
                f"examples have a state_dict, so they keep their place in themselves, and a copy must be read; "
                f"{type(self._examples).__name__} cannot be copied ({error}). Give examples without a state_dict, or "
                "define __deepcopy__."
            ) from error


def _once(seen: str) -> ValueError:
    return ValueError(
        f"examples can be read only once: {seen}. Every epoch reads them from the beginning: give a class whose "
        "__iter__ begins again, or datasets.IterableDataset.from_generator."
    )


def share_of(ranks: int) -> dict[str, int]:
    """Who reads here: of how many ranks (if one, those of torch.distributed), which of how many workers of a loader."""
    if ranks == 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    worker = get_worker_info()
    if worker is None:
        return {"ranks": ranks, "workers": 0, "worker": 0}
    return {"ranks": ranks, "workers": worker.num_workers, "worker": worker.id}


class Digest:
    """What was read so far, in 16 bytes: the numbers of all fields of all examples, in their order."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)

    def add(self, example: Mapping[str, Any]) -> None:
        """Read one more example."""
        for name in sorted(example, key=str):
            values = example[name]
            if hasattr(values, "tolist"):
                values = values.tolist()
            if isinstance(values, (list, tuple, int, float)):
                self._hash.update(f"{name}={values if isinstance(values, (int, float)) else list(values)};".encode())
        self._hash.update(b"\n")

    def __str__(self) -> str:
        return self._hash.hexdigest()


def _is_datasets(examples: object) -> bool:
    """Whether these are a `datasets.IterableDataset`; if so, datasets has been imported."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(examples, module.IterableDataset)


def _from_the_beginning(dataset: Any) -> Any:
    """A copy of a `datasets.IterableDataset` that has been neither read nor resumed, in the same epoch.

    The steps of its pipeline (`_ex_iterable`) each count what they have read, so all of them are copied. Tokenizers,
    functions and data are not.
    """
    fresh = object.__new__(type(dataset))
    fresh.__dict__.update(dataset.__dict__)  # copy.copy would share one __dict__ between the two
    fresh._starting_state_dict = None
    fresh._epoch = copy.deepcopy(dataset._epoch)
    fresh._ex_iterable = _steps_copied(dataset._ex_iterable)
    return fresh


def _steps_copied(step: Any) -> Any:
    fresh = copy.copy(step)
    for name, value in vars(step).items():
        if hasattr(value, "_init_state_dict"):
            setattr(fresh, name, _steps_copied(value))
        elif isinstance(value, (list, tuple)) and any(hasattr(part, "_init_state_dict") for part in value):
            setattr(fresh, name, type(value)(_steps_copied(part) for part in value))
    return fresh
