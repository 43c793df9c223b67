"""How long something may take, as people write it."""

import math

from vl_dist.errors import UserError


def duration_s(text: str) -> float:
    """Seconds of `run.max_time`: a number of them, or [[D-]HH:]MM:SS.

    A bare number is seconds and not minutes, because YAML reads an unquoted 1:30:00 as the number 5400.

    Raises:
        UserError: neither, or not above 0.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    try:
        numbers = [float(part) for part in parts]
        seconds = 86400.0 * int(days if dash else 0) + sum(n * 60.0**power for power, n in enumerate(reversed(numbers)))
    except ValueError:
        seconds = math.nan
    if len(parts) > 3 or not 0 < seconds < math.inf:
        raise UserError(f"run.max_time is {text!r}; write seconds, or [[D-]HH:]MM:SS like 11:30:00, above 0.")
    return seconds
