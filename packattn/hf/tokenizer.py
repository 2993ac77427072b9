"""A tokenizer by name or folder, for the command line."""

from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model on the Hub or in a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--tokenizer {name}: no tokenizer there ({first})") from error
