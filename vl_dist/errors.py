"""The exceptions that mean: the input is wrong, and the person who gave it can mend it."""


class UserError(ValueError):
    """What a user can cause and mend. Printed as one message without a traceback; the process ends with code 2.

    The message says what was got, the rule it breaks, and what to do.
    """


class SharedError(UserError):
    """A user's error that every rank raises, so that one of them is enough to say it."""
