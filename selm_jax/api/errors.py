"""The error of the public API."""


class ApiError(ValueError):
    """The arguments do not fit together. The message says what is wrong and what to do."""
