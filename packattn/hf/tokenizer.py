"""A tokenizer by name or folder, for the command line."""

from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model on the Hub or in a folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except ImportError:
        raise  # it names the package that this tokenizer needs
    except Exception as error:  # of damaged files the tokenizers library raises nothing narrower
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--tokenizer {name}: no tokenizer there ({first})") from error
