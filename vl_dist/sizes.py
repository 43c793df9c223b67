"""Bytes in words."""


def in_bytes(num_bytes: float) -> str:
    """Three digits and a decimal unit, as disks are sold: `25 GB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
