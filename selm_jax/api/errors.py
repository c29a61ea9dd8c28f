"""The error of the public API."""


class ApiError(ValueError):
    """An argument is wrong, or arguments do not fit together.

    The message says what is wrong and what to do.
    """
