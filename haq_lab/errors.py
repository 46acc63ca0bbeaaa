"""Errors that are the user's to solve: shown without a traceback."""


class UserError(Exception):
    """A setting, file or machine does not allow what was asked; the message says what would."""
