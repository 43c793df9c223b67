"""Reads back what W&B wrote offline: LevelDB's log format, each record a message of W&B's own."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, RECORD_HEADER = 7, 32 * 1024, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class WandbFile:
    """One start of a run."""

    directory: Path
    records: list[Any]

    def of(self, kind: str) -> list[Any]:
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    @property
    def run(self) -> Any:
        return self.of("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update}

    def files_of(self, type_name: str) -> dict[str, Path]:
        """By name, where the files of the last artifact of a type lie until they are uploaded."""
        artifact = [one for one in self.of("artifact") if one.type == type_name][-1]
        return {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}

    def rows(self, name: str = "") -> list[dict[str, Any]]:
        """What was logged, without W&B's own columns; those with a value of that name."""
        rows = [
            {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
            for history in self.of("history")
        ]
        rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
        return [row for row in rows if not name or name in row]


def read_starts(output_dir: Path) -> list[WandbFile]:
    """Every start of the run in an output directory, the oldest first."""
    paths = sorted(output_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return [WandbFile(path.parent, list(_messages(path))) for path in paths]


def _messages(path: Path) -> Iterator[Any]:
    content, at, parts = path.read_bytes(), HEADER, b""
    while at + RECORD_HEADER <= len(content):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # the end of a block that holds no more is padding
            at += BLOCK - at % BLOCK
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0 or at + RECORD_HEADER + length > len(content):
            return  # cut by a kill
        parts = (b"" if kind in (FULL, FIRST) else parts) + content[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind in (FULL, LAST):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(parts)
            yield message
