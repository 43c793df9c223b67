"""Permissions of files that libraries write for their owner alone."""

import os
import uuid
from pathlib import Path


def give_usual_mode(*files: Path) -> None:
    """Gives files the permissions that any new file has in their folder.

    safetensors (0.8) makes every file readable by its owner alone, whatever the umask: a server that runs under another
    account could not load an adapter.

    Raises:
        OSError: the disk takes no new file.
    """
    for file in files:
        probe = file.parent / f".mode-{uuid.uuid4().hex[:8]}"
        try:
            descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = os.fstat(descriptor).st_mode
            os.close(descriptor)
        finally:
            probe.unlink(missing_ok=True)
        file.chmod(mode & 0o777)
