"""What must hold of the values of a forward's inputs, and the errors where it does not.

Values lie on the device, and a forward must not wait for them (law 4). So all conditions of a forward are gathered and
looked at once: on the host where that waits for nothing (the CPU) and in the first forward of a patched model, which
compiles and allocates anyway; on the device in all others, by one assertion.
"""

import torch
from torch import Tensor

# CUDA refuses messages of 255 characters and more, whether the condition holds or not.
LONGEST_MESSAGE = 254
ON_THE_DEVICE = (
    "packattn: position_ids, attention_mask, labels or the cache of this batch break a condition of packed rows. Run "
    "the batch on the CPU, or in the first forward after packattn.patch, to read which one."
)


class Conditions:
    """The conditions of one forward: bool tensors on one device, each with the message of its error."""

    def __init__(self) -> None:
        self._gathered: list[tuple[Tensor, str]] = []

    def require(self, condition: Tensor, message: str) -> None:
        """Add a condition, bool of any shape, that must hold in every element."""
        self._gathered.append((condition.all(), message))

    def enforce(self, first: bool = False) -> None:
        """Look at all conditions that were gathered, and begin with none.

        Args:
            first: this is the first forward of a patched model, which may wait for the device.

        Raises:
            ValueError: with the message of the first condition that does not hold, where values are read on the host.
            RuntimeError: where they are looked at on the device; on CUDA it comes with a later call.
        """
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return
        together = torch.stack([condition for condition, _ in gathered])
        if _readable(together, first):
            for holds, (_, message) in zip(together.tolist(), gathered, strict=True):
                if not holds:
                    raise ValueError(message)
        else:
            message = gathered[0][1] if len(gathered) == 1 else ON_THE_DEVICE
            torch._assert_async(together.all(), message)


def _readable(x: Tensor, first: bool) -> bool:
    """Whether the host may read a tensor: never in a trace, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return first or x.device.type == "cpu"
