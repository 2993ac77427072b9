"""The Hugging Face side: the only part of packattn that imports transformers."""

from packattn.hf.patch import Patch, patch
from packattn.hf.verify import verify

__all__ = ["Patch", "patch", "verify"]
