"""The page: figures, curves, held-out captions and settings of some runs in one file that needs nothing else.

Nothing is fetched: style, script and images are inside, and the page's own policy forbids the rest, scripts that are not
this one included.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from vl_dist import __version__
from vl_dist.config import keys
from vl_dist.report.curves import NUM_BUCKETS, NUM_MEDIANS, Curve, chart, number
from vl_dist.report.gallery import gallery
from vl_dist.report.html import Html, element, joined
from vl_dist.report.read import RunRecord

# Charts in their order: title, what is drawn (a column of metrics.jsonl, and whether it is an evaluation's).
CHARTS: tuple[tuple[str, str, tuple[tuple[str, bool], ...]], ...] = (
    ("Loss", "per target; line: training, dots: held out", (("train/loss", False), ("eval/loss", True))),
    ("CIDEr-D", "held out, 0 to 10", (("eval/cider", True),)),
    ("BLEU-4", "held out, 0 to 1", (("eval/bleu4", True),)),
    ("ROUGE-L", "held out, 0 to 1", (("eval/rouge_l", True),)),
    ("Exact match", "held out, share of captions", (("eval/exact_match", True),)),
    ("Gradient norm", "before clipping", (("train/grad_norm", False),)),
    ("Learning rate", "", (("train/lr", False),)),
    ("Throughput", "examples a second, waits included", (("perf/examples_per_s", False),)),
    ("Tokens", "a second, without padding", (("perf/tokens_per_s", False),)),
    ("MFU", "useful share of the devices' peak", (("perf/mfu", False),)),
    ("Memory", "peak on one device, GiB", (("perf/peak_memory_gib", False),)),
    ("Data wait", "seconds of each row spent waiting for the loader", (("perf/data_wait_s", False),)),
    ("Padding", "share of tokens", (("perf/padding", False),)),
)
MAY_BE_LOG = ("Loss", "Gradient norm", "Data wait")
OUTCOMES = {0: ("finished", "good"), 2: ("wrong input", "bad"), 85: ("stopped, can go on", "fair")}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'"


def page(runs: Sequence[RunRecord], *, num_images: int) -> str:
    """The whole file.

    Args:
        num_images: held-out prompts in the gallery.
    """
    style, script = (resources.files("vl_dist.report").joinpath(f"page.{kind}").read_text() for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = "vl_dist: " + ", ".join(run.name for run in runs)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY.format(digest)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element("main", _header(runs), _curves(runs), gallery(runs, num_images), _settings(runs), _footer()),
        element("script", Html(script)),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def _header(runs: Sequence[RunRecord]) -> Html:
    heading = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return element(
        "header",
        element("p", "vl_dist \u00b7 LoRA fine-tuning of Qwen2-VL", class_="over"),
        element("h1", heading),
        *(_summary(n, run, named=len(runs) > 1) for n, run in enumerate(runs)),
    )


def _summary(number_of_run: int, run: RunRecord, *, named: bool) -> Html:
    """One run: how it stands, and its figures; its name where there are others."""
    s = run.settings
    about = " \u00b7 ".join(
        text
        for name, text in (
            ("model.path", f"{s.get('model.path')}"),
            ("lora.r", f"rank {s.get('lora.r')}, alpha {_plain(s.get('lora.alpha'))}"),
            ("data.train", f"{s.get('data.train')}"),
            ("batch.examples_per_step", f"{s.get('batch.examples_per_step')} examples a step"),
        )
        if s.get(name) is not None
    )
    tiles = [
        element("div", element("dt", label), element("dd", value, element("small", beside) if beside else None))
        for label, value, beside in figures(run)
    ]
    text, kind = _state(run)
    name = [element("i", class_="key"), element("b", run.name)] if named else []
    return element(
        "section",
        element("p", *name, element("span", text, class_=f"state {kind}")),
        element("p", about, class_="about"),
        element("dl", *tiles, class_="tiles"),
        class_=f"summary run{number_of_run % 8}",
    )


def _state(run: RunRecord) -> tuple[str, str]:
    if run.outcome is None:
        return "under way, or ended without a word", "fair"
    code = run.outcome.get("code")
    text, kind = OUTCOMES.get(code, (f"ended with code {code}", "bad")) if isinstance(code, int) else ("unknown", "bad")
    return text, kind


def figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """The numbers one asks for first: label, value, and what stands small beside it. Only those the run has."""
    found = []
    if run.rows:
        last = run.rows[-1]
        epoch = f"epoch {last['epoch']:.2f}" if isinstance(last.get("epoch"), int | float) else ""
        found.append(("Steps", f"{last['step']:,}", epoch))
    lowest: Callable[..., tuple[float, float]] = min
    for label, column, choose in (
        ("Best CIDEr-D", "eval/cider", max),
        ("Best exact match", "eval/exact_match", max),
        ("Lowest held-out loss", "eval/loss", lowest),
    ):
        points = series(run, column)
        if points:
            step, value = choose(points, key=lambda point: point[1])
            found.append((label, number(value), f"step {step:,.0f}"))
    for label, column, beside in (
        ("Last training loss", "train/loss", ""),
        ("Examples/s", "perf/examples_per_s", "median"),
        ("Peak memory", "perf/peak_memory_gib", "GiB"),
    ):
        points = series(run, column)
        if points:
            values = sorted(value for _, value in points)
            value = {"median": values[len(values) // 2], "GiB": values[-1], "": points[-1][1]}[beside]
            found.append((label, number(value), beside))
    return found


def series(run: RunRecord, column: str) -> list[tuple[float, float]]:
    """(step, value) of a column's finite values."""
    return [(float(row["step"]), float(row[column])) for row in run.rows if _finite(row.get(column))]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(runs: Sequence[RunRecord]) -> Html:
    charts = [made for title, unit, columns in CHARTS if (made := _chart(runs, title, unit, columns)) is not None]
    if not charts:
        return element("section", element("h2", "Curves"), element("p", "No step has been logged yet.", class_="note"))
    most = max(len(run.rows) for run in runs)
    note = (
        f"Curves of many rows (here up to {most:,}) are thinned out to the lowest and the highest value of each of "
        f"{NUM_BUCKETS} stretches: no peak is lost and nothing is averaged. "
        if most > 2 * NUM_BUCKETS
        else "Every logged value is drawn. "
    )
    if most >= 3 * NUM_MEDIANS:
        note += f"Where a curve is faint, the strong line is the median of each of {NUM_MEDIANS} stretches. "
    return element(
        "section",
        element("h2", "Curves"),
        element("p", note + "Point at a curve to read it.", class_="note"),
        element("div", *charts, class_="charts"),
        id="curves",
    )


def _chart(runs: Sequence[RunRecord], title: str, unit: str, columns: Sequence[tuple[str, bool]]) -> Html | None:
    curves, num_lost = [], 0
    for n, run in enumerate(runs):
        for column, sparse in columns:
            points = series(run, column)
            num_lost += sum(isinstance(row.get(column), float) and not _finite(row[column]) for row in run.rows)
            if points:
                label = " ".join([*([run.name] if len(runs) > 1 else []), *([column] if len(columns) > 1 else [])])
                curves.append(Curve(label, points, n, sparse))
    if not curves and not num_lost:
        return None
    drawn = chart(curves, f"{title} over steps", may_be_log=title in MAY_BE_LOG) if curves else None
    lost = element("p", f"{num_lost:,} values are not finite and not drawn", class_="lost") if num_lost else None
    caption = element("figcaption", element("b", title), element("span", unit), element("output"))
    return element("figure", caption, drawn, lost)


def _settings(runs: Sequence[RunRecord]) -> Html:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    defaults = {key.path: key.default for key in keys()}
    meanings = {key.path: key.meaning for key in keys()}
    if len(runs) > 1:
        title = "What differs between the runs"
        shown = [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]
    else:
        title = "What differs from the defaults"
        shown = [name for name in names if name in defaults and not _same(runs[0].settings[name], defaults[name])]
    beside = defaults if len(runs) == 1 else None
    differing = _table(runs, shown, meanings, defaults=beside) if shown else element("p", "Nothing.", class_="note")
    everything = element("details", element("summary", f"All {len(names)} settings"), _table(runs, names, meanings))
    return element("section", element("h2", "Settings"), element("h3", title), differing, everything, id="settings")


def _same(value: Any, default: Any) -> bool:
    """config.yaml writes tuples as lists and paths as text."""
    if isinstance(default, tuple):
        return bool(list(default) == value)
    return value is None if default is None else str(value) == str(default)


def _table(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    meanings: dict[str, str],
    *,
    defaults: dict[str, Any] | None = None,
) -> Html:
    """A row for each key, a column for each run, and one of the defaults if they are given."""
    heads = [element("th", element("i", class_="key"), run.name, class_=f"run{n % 8}") for n, run in enumerate(runs)]
    rows = [
        element(
            "tr",
            element("th", element("code", name), scope="row", title=meanings.get(name)),
            *(element("td", _plain(run.settings[name]) if name in run.settings else "") for run in runs),
            element("td", _plain(defaults[name]), class_="default") if defaults is not None else None,
        )
        for name in names
    ]
    head = element("tr", element("th", "key"), *heads, element("th", "default") if defaults is not None else None)
    return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _footer() -> Html:
    return element("footer", joined([f"Made by vl_dist {__version__}. This file holds all it shows and fetches nothing."]))
