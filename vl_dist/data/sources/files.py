"""Writing so that nothing half-written is ever taken for whole, and an output folder that remembers what it is for."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vl_dist.errors import UserError

MARKER = "prepare.json"  # what is prepared here; written before anything else


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file: under another name first, then, once it is on the disk, renamed.

    Raises:
        UserError: it cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}). Make space or give another --out, then start again."
        ) from None


def settle(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, so that files written later are never there without them."""
    if not folder.is_dir():
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """A whole JSON file.

    Raises:
        UserError: it cannot be written.
    """
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def read_marker(out: Path) -> dict[str, Any] | None:
    """What the folder was prepared from; None where nothing was.

    Raises:
        UserError: the marker is not this project's.
    """
    path = out / MARKER
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("source"), dict) or not isinstance(value.get("made"), list):
        raise UserError(f"{path} was not written by prepare. Give another --out.")
    return value


@contextmanager
def claimed(out: Path, source: Mapping[str, Any], made: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """The output folder, kept from other preparations while the block runs.

    Args:
        out: made if it is not there; may hold other things.
        source: all that decides what is written, as JSON.
        made: names of what is written into `out`; the last one says that all is there.

    Yields:
        The result given to `mark`, if the same was prepared here to the end; else None.

    Raises:
        UserError: the folder holds another preparation, or files of these names that none made, or is in use.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is a file. Give a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"The folder {out} cannot be used ({error}). Give another --out.") from None
    try:
        _lock(handle, out)
        marker = read_marker(out)
        _refuse_others(out, marker, source, made)
        complete = marker is not None and marker["source"] == source and (out / made[-1]).is_file()
        yield marker.get("result") if complete and marker is not None else None
    finally:
        os.close(handle)


def mark(out: Path, source: Mapping[str, Any], made: Sequence[str], result: Mapping[str, Any] | None = None) -> None:
    """Says what is prepared here, before anything is written; and again, with what was counted, before the last file is."""
    write_json(out / MARKER, {"source": source, "made": list(made), "result": result})


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another prepare is writing to {out}. Wait for it, or give another --out.") from None
    except OSError:  # some network file systems cannot lock a folder; then two starts at once are the user's to avoid
        return


def _refuse_others(out: Path, marker: dict[str, Any] | None, source: Mapping[str, Any], made: Sequence[str]) -> None:
    ours = marker["made"] if marker is not None else []
    strange = [name for name in made if name not in ours and (out / name).exists()]
    if strange:
        raise UserError(
            f"{out / strange[0]} is there already, and was not written by prepare. Give another --out, or move it away."
        )
    there = [name for name in ours if (out / name).exists()]
    if marker is None or marker["source"] == source or not there:
        return
    before = marker["source"]
    names = [name for name in {**before, **source} if before.get(name) != source.get(name)]
    changed = "\n".join(f"  {name}: {before.get(name)} -> {source.get(name)}" for name in names)
    raise UserError(
        f"{out} holds what was prepared from something else:\n{changed}\n"
        f"Give another --out, or remove {', '.join(there)} from it."
    )
