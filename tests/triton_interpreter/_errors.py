"""Errors of the hardened interpreter."""


class OutOfBoundsError(IndexError):
    """A kernel touched memory outside of the tensors that it was given."""


class LivelockError(RuntimeError):
    """Programs wait for each other for ever."""
