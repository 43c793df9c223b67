"""Small data sets in every format that `prepare` reads, and what its output is checked with."""

import json
from pathlib import Path
from typing import Any

from vl_dist.cli import main
from vl_dist.data.image_files import load_image, resolve_path
from vl_dist.data.record_files import read_records
from vl_dist.data.records import Record

CAPTIONS = {
    "cat": ["A cat.", "A cat looks up.", "The cat sits.", "One cat, indoors.", "A cat's face."],
    "coffee": ["A cup of coffee.", "Coffee on a table.", "A cup, a spoon.", "Some coffee.", "A full cup."],
    "rocket": ["A rocket.", "A rocket stands.", "The rocket, ready.", "One rocket.", "A tall rocket, at night."],
}
IDS = {"cat": 318556, "coffee": 116100, "rocket": 9}


def prepare(*words: str | Path) -> int:
    """The command, in this process."""
    return main(["prepare", *map(str, words)])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_back(file: Path, image_root: Path | None = None) -> list[Record]:
    """Records as training reads them; each image is there, under the image root, and decodes."""
    records = read_records(file, default_prompt="COCO Yes:")
    for record in records:
        for path in record.image_paths:
            load_image(resolve_path(path, image_root or file.parent))
    return records


def answers(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """Captions by record."""
    return {record.id: record.answers for record in records}


def skipped(out: Path) -> dict[str, str]:
    """Reasons by row."""
    lines = (out / "prepare_skipped.jsonl").read_text().splitlines()
    return {row["row"]: row["reason"] for row in map(json.loads, lines)}


def official_coco(root: Path, photos: Path, split: str = "train") -> Path:
    """COCO's own layout with three photographs; captions come caption by caption, their images interleaved."""
    folder = root / f"{split}2014"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    images: list[dict[str, Any]] = []
    for name in sorted(CAPTIONS):
        file_name = f"COCO_{split}2014_{IDS[name]:012d}.jpg"
        (folder / file_name).write_bytes((photos / f"{name}.jpg").read_bytes())
        images.append({"id": IDS[name], "file_name": file_name, "license": 3})
    notes = [{"image_id": IDS[name], "id": k, "caption": CAPTIONS[name][k]} for k in range(5) for name in CAPTIONS]
    content = {"info": {}, "licenses": [], "images": images, "annotations": notes}
    (root / "annotations" / f"captions_{split}2014.json").write_text(json.dumps(content))
    return root


def csv_file(folder: Path, photos: Path) -> Path:
    """The tutorial's columns; a row for each caption, the images beside the file."""
    (folder / "pictures").mkdir(parents=True)
    lines = ["image_path,caption"]
    for name, texts in CAPTIONS.items():
        (folder / "pictures" / f"{name}.jpg").write_bytes((photos / f"{name}.jpg").read_bytes())
        lines += [f'pictures/{name}.jpg,"{text}"' for text in texts]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def parquet_file(path: Path, photos: Path) -> Path:
    """Encoded images with lists of captions, as `datasets` writes them."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [{"bytes": (photos / f"{name}.jpg").read_bytes(), "path": None} for name in CAPTIONS],
        "caption": list(CAPTIONS.values()),
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path
