"""The one exception that means: the input is wrong, and the person who gave it can mend it."""


class UserError(ValueError):
    """What a user can cause and mend. Printed as one message without a traceback; the process ends with code 2.

    The message says what was got, the rule it breaks, and what to do.
    """
