"""What packattn raises when it refuses: always before the first wrong number, always with every reason."""


class UnsupportedModelError(NotImplementedError):
    """The model cannot be isolated; the message lists every reason."""


class UnsupportedMaskError(NotImplementedError):
    """The mask is not one contiguous span of keys per token, or packattn does not know it."""
