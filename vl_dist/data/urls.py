"""Images on the web: each URL is downloaded once, whole or not at all, into a folder of its own."""

import hashlib
import os
import time
import urllib.request
import uuid
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path

TIMEOUT_S = 20.0  # longest single wait
DEADLINE_S = 120.0  # a server that drips bytes must not hold up the run
CHUNK_BYTES = 2**16


class DownloadError(ValueError):
    """This URL cannot be fetched; the message says why, without the URL."""


def cached_path(url: str, cache: Path) -> Path:
    """Where a URL's image is kept."""
    return cache / hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()


def download(
    url: str, cache: Path, *, max_bytes: int, timeout_s: float = TIMEOUT_S, deadline_s: float = DEADLINE_S
) -> Path:
    """The file that holds what the URL gave when it was first fetched.

    Args:
        cache: a folder, made if it is not there; ranks and workers may share it.
        max_bytes: larger answers are refused.
        timeout_s: longest wait for the connection and for each part.
        deadline_s: longest time for all of it.

    Raises:
        DownloadError: not http(s), no whole answer in time, an answer that is an error, or too many bytes.
    """
    kept = cached_path(url, cache)
    if kept.is_file():
        return kept
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError("only http and https are fetched")
    partial = cache / f".{kept.name}.{os.getpid()}-{uuid.uuid4().hex}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "vl_dist"})
        with _opener().open(request, timeout=timeout_s) as response, partial.open("wb") as file:
            for chunk in _chunks(response, max_bytes, time.monotonic() + deadline_s):
                file.write(chunk)
        partial.replace(kept)
    except DownloadError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(str(error) or type(error).__name__) from None
    finally:
        partial.unlink(missing_ok=True)
    return kept


def _chunks(response: HTTPResponse, max_bytes: int, deadline: float) -> Iterator[bytes]:
    """The answer's body, all of it or an error."""
    received = 0
    while chunk := response.read1(CHUNK_BYTES):
        received += len(chunk)
        if received > max_bytes:
            raise DownloadError(f"it has more bytes than data.max_image_bytes={max_bytes:,}")
        if time.monotonic() > deadline:
            raise DownloadError("it took too long")
        yield chunk
    if response.length:  # what Content-Length still promised; read1 itself does not complain
        raise DownloadError(f"the answer ended {response.length:,} bytes early")


def _opener() -> urllib.request.OpenerDirector:
    """Without urllib's handlers for ftp and file, which a redirect could lead to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
