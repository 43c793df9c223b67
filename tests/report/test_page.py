"""The page: complete on any run, small, escaped, and one clear message where there is no run."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.report.made import HOSTILE, make_run
from vl_dist import cli
from vl_dist.report.gallery import spread
from vl_dist.report.read import read_runs


def report(*words: str | Path) -> int:
    return cli.main(["report", *map(str, words)])


def sections(page: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)"', page))


def test_a_page_is_one_file_that_names_nothing_outside_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report(run) == 0
    page = (run / "report.html").read_text()
    assert sections(page) == {"curves", "captions", "settings"}
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)\w""", page.replace(_escaped_hostile(), ""))
    assert "default-src &#x27;none&#x27;" in page
    for title in ("Loss", "Learning rate", "Gradient norm", "CIDEr-D", "Exact match", "Throughput", "Memory"):
        assert f"<b>{title}</b>" in page
    assert "MFU" not in page, "a column that is always null has no chart"


def _escaped_hostile() -> str:
    return (
        HOSTILE.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&quot;")
        .replace("'", "&#x27;")
    )


def test_markup_in_a_caption_a_setting_or_a_name_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", words=(f"data.prompt={HOSTILE}", "optim.lr=2e-4"))
    assert report(run) == 0
    page = (run / "report.html").read_text()
    assert page.count(_escaped_hostile()) > 2 and "<b>run" not in page.replace("<b>run0", "")
    assert re.findall(r"<script", page) == ["<script"]
    assert "onerror=&quot;" in page and "<img src=x" not in page


def test_a_run_of_ten_thousand_rows_makes_a_page_under_five_megabytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_rows=10_000, evaluations=(0, 5_000, 10_000), num_images=0)
    assert report(run, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert len(page.encode()) < 1e6, "an order of magnitude below the bound: a run has more columns some day"
    assert "thinned out" in page and "10,000" in page


def test_images_are_small_jpegs_a_limited_number_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_images=12)
    assert report(run, "--images", 5) == 0
    page = (run / "report.html").read_text()
    data = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(data) == 5
    for one in data:
        image = Image.open(io.BytesIO(base64.b64decode(one)))
        assert image.format == "JPEG" and image.size == (320, 224)
    # From the worst at the last evaluation to the best.
    assert re.findall(r'<p class="id">circle-(\d+)', page) == [str(n) for n in (11, 8, 5, 3, 0)]
    assert report(run, "--images", 0) == 0
    assert sections((run / "report.html").read_text()) == {"curves", "settings"}


def test_an_image_that_is_gone_is_said_and_the_rest_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "images" / "2.png").unlink()
    assert report(run) == 0
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg") == 5 and "2.png: there is no such file" in page


def test_settings_show_what_differs_from_the_defaults_or_between_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one" / "run", words=("optim.lr=3e-4",))
    other = make_run(tmp_path / "other" / "run", words=("optim.lr=5e-4", "lora.target_modules=[q_proj]"))

    def shown(page: str) -> dict[str, list[str]]:
        first_table = page.split('id="settings"')[1].split("</table>")[0]
        rows = re.findall(r"<tr><th[^>]*><code>([^<]+)</code></th>(.*?)</tr>", first_table)
        return {name: re.findall(r"<td>([^<]*)</td>", cells) for name, cells in rows}

    assert report(one) == 0
    alone = shown((one / "report.html").read_text())
    assert alone.keys() == {"optim.lr", "data.train", "data.image_root"}
    assert alone["optim.lr"] == ["0.0003"]
    assert report(one, other, "--out", tmp_path / "both.html") == 0
    both = (tmp_path / "both.html").read_text()
    differing = shown(both)
    assert differing["optim.lr"] == ["0.0003", "0.0005"]
    assert differing.keys() == {"optim.lr", "lora.target_modules", "data.train", "data.image_root"}
    assert "one/run" in both and "other/run" in both, "names tell runs apart"


def test_a_run_under_way_a_resumed_one_and_one_without_evaluation_have_a_page(tmp_path: Path) -> None:
    started = make_run(tmp_path / "started", num_rows=1, evaluations=(), num_images=0, outcome=None)
    (started / "metrics.jsonl").unlink()
    cut = make_run(tmp_path / "cut", evaluations=(), num_images=0, outcome=None)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "train/loss": 7.5}\n{"step": 51, "train/loss": NaN}\n{"step": 52, "tr')
    for run in (started, cut):
        assert report(run) == 0
        assert "under way" in (run / "report.html").read_text()
    assert "No step has been logged yet" in (started / "report.html").read_text()
    page = (cut / "report.html").read_text()
    assert sections(page) == {"curves", "settings"} and "1 values are not finite" in page
    rows = read_runs([cut])[0].rows
    assert [row["step"] for row in rows] == [*range(1, 52)]
    assert rows[11]["train/loss"] == 7.5, "of a step that was repeated, the last row counts"


def test_samples_of_steps_that_a_resumed_run_has_yet_to_repeat_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 40]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    with (run / "samples" / "step-000040.jsonl").open("a") as file:
        file.write('{"prediction": "of nothing"}\n{"id": "cut", "predic')
    samples = read_runs([run])[0].samples
    assert {step: len(rows) for step, rows in samples.items()} == {0: 6, 20: 6, 40: 6}


def test_what_is_no_run_is_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", num_images=0)
    damaged = make_run(tmp_path / "damaged", num_images=0)
    (damaged / "config.yaml").write_text("a: [")
    for words, part in (
        ([tmp_path], "has no config.yaml"),
        ([tmp_path / "absent"], "is no directory"),
        ([run, damaged], "cannot be read"),
        ([run, "--out", tmp_path / "absent" / "page.html"], "--out"),
        ([run, "--images", "-1"], "--images"),
    ):
        assert report(*words) == 2
        message = capsys.readouterr().err
        assert part in message and message.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_spread_takes_the_ends_and_what_lies_evenly_between() -> None:
    assert spread(range(11), 3) == [0, 5, 10]
    assert spread([1, 2], 3) == [1, 2]
    assert spread([1, 2, 3], 1) == [1]
    assert spread([1], 0) == spread([], 4) == []
