"""Downloads: once, whole, within limits, and never from anywhere but http(s)."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from vl_dist.data.collate import Collator
from vl_dist.data.image_files import ImageLimits, load_image, resolve_path
from vl_dist.data.images import ImageError, PatchShape
from vl_dist.data.lengths import HeaderReader
from vl_dist.data.records import Example, ImagePart, Message
from vl_dist.data.urls import DownloadError, cached_path, download
from vl_dist.data.validate import image_limits
from vl_dist.settings import DataConfig


class Site(ThreadingHTTPServer):
    """Serves a photograph under several kinds of trouble; `asked` are the paths it was asked for."""

    daemon_threads = True

    def __init__(self, photo: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.photo = photo
        self.asked: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to?"))
            self.end_headers()
            return
        if self.path == "/absent.jpg":
            self.send_error(404)
            return
        photo = self.server.photo
        self.send_response(200)
        if self.path != "/no-length.jpg":
            self.send_header("Content-Length", str(len(photo)))
        self.end_headers()
        if self.path == "/slow.jpg":
            time.sleep(1.5)
        if self.path == "/drip.jpg":
            for n in range(30):
                self.wfile.write(photo[n : n + 1])
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(photo[: len(photo) // 2] if self.path == "/cut.jpg" else photo)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(photos: Path) -> Iterator[Site]:
    server = Site((photos / "cat.jpg").read_bytes())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded_once_and_then_used_like_a_file(site: Site, tmp_path: Path) -> None:
    limits = ImageLimits(url_cache=tmp_path / "cache")
    url = site.url("/cat.jpg")
    first, second = (resolve_path(url, tmp_path / "root", limits) for _ in range(2))
    assert first == second == cached_path(url, tmp_path / "cache")
    assert first.read_bytes() == site.photo
    assert load_image(first).size == (451, 300)
    assert site.asked == ["/cat.jpg"]
    assert resolve_path(site.url("/no-length.jpg"), tmp_path, limits).read_bytes() == site.photo
    assert resolve_path(site.url("/to?/cat.jpg"), tmp_path, limits).read_bytes() == site.photo


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/absent.jpg", "404"),
        ("/slow.jpg", "timed out"),
        ("/drip.jpg", "took too long"),
        ("/cut.jpg", "bytes early"),
        ("/to?file:///etc/hostname", "not allowed"),
        ("/to?ftp://127.0.0.1/x", "ftp"),
    ],
)
def test_trouble_is_an_error_in_bounded_time_and_leaves_nothing_behind(
    site: Site, tmp_path: Path, path: str, reason: str
) -> None:
    started = time.perf_counter()
    with pytest.raises(DownloadError, match=reason):
        download(site.url(path), tmp_path / "cache", max_bytes=10**6, timeout_s=0.4, deadline_s=0.5)
    assert time.perf_counter() - started < 3
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("path", ["/cat.jpg", "/no-length.jpg"])
def test_more_bytes_than_allowed_are_not_kept(site: Site, tmp_path: Path, path: str) -> None:
    with pytest.raises(ImageError, match=r"data\.max_image_bytes=1,000"):
        resolve_path(site.url(path), tmp_path, ImageLimits(max_bytes=1000, url_cache=tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.jpg", "file:///etc/hostname", "gopher://x/y"])
def test_only_http_is_fetched_even_where_urls_are_allowed(tmp_path: Path, url: str) -> None:
    with pytest.raises(ImageError, match="only http and https"):
        resolve_path(url, tmp_path, ImageLimits(url_cache=tmp_path / "cache"))


def test_nobody_answering_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refused"):
        download("http://127.0.0.1:9/a.jpg", tmp_path / "cache", max_bytes=10, timeout_s=1)


def test_training_sees_the_downloaded_photograph_where_settings_allow_urls(
    site: Site, tmp_path: Path, photos: Path, collator: Collator, processor: Any, shape: PatchShape
) -> None:
    limits = image_limits(DataConfig(allow_urls=True, url_cache=tmp_path / "cache"))
    assert image_limits(DataConfig(url_cache=tmp_path / "cache")).url_cache is None
    at_home, away = (Example("e", (Message("user", (ImagePart(p),)),), "A cat.") for p in ("cat.jpg", site.url("/cat.jpg")))
    headers = HeaderReader(photos, collator.budget, shape, limits)
    online = Collator(
        collator.encoder, processor.image_processor, roots=[photos], budget=collator.budget, shape=shape, limits=limits
    )
    assert headers.grids(away) == headers.grids(at_home)
    assert torch.equal(online.pack([away]).pixel_values, collator.pack([at_home]).pixel_values)
    assert site.asked == ["/cat.jpg"]
