"""The Triton kernels; the only part of packattn that imports triton."""
