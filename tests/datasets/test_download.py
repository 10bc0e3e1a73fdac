import hashlib
import random
import resource
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from loopback import Handler, Server, serving

from altopt.datasets import download
from altopt.datasets.download import exclusive, fetch
from altopt.errors import BusyError, DownloadError, ResourceError

CONTENT = random.Random(7).randbytes(300_000)
LIE = random.Random(8).randbytes(300_000)
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        server.url("/good", lambda handler: handler.ranged(CONTENT))
        yield server


def get(urls: list[str], folder: Path, **options: Any) -> bytes:
    settings: dict[str, Any] = {"size": SIZE, "checksum": f"sha256:{SHA256}", "timeout": 5.0, **options}
    path = fetch(urls, folder / "file.tar", **settings)
    assert path == folder / "file.tar"
    assert not (folder / "file.tar.part").exists()
    return path.read_bytes()


def failure(urls: list[str], folder: Path, **options: object) -> str:
    with pytest.raises(DownloadError) as caught:
        get(urls, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not (folder / "file.tar").exists()
    return message


def begin(folder: Path, part: bytes) -> None:
    (folder / "file.tar.part").write_bytes(part)


def test_fetches_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    content = get([server.url("/good")], tmp_path / "new" / "folder", progress=lambda *step: seen.append(step))
    assert content == CONTENT
    assert seen[0] == (0, SIZE)
    assert seen[-1] == (SIZE, SIZE)
    assert seen == sorted(seen)
    assert server.requests == [("/good", None)]


def test_right_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file.tar").write_bytes(CONTENT)
    assert get([], tmp_path) == CONTENT


@pytest.mark.parametrize("wrong", [CONTENT[:1000], LIE, b""])
def test_wrong_destination_is_replaced(server: Server, tmp_path: Path, wrong: bytes) -> None:
    (tmp_path / "file.tar").write_bytes(wrong)
    assert get([server.url("/good")], tmp_path) == CONTENT


def test_resumes_by_byte_range(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, CONTENT[:1234])
    seen: list[tuple[int, int]] = []
    assert get([server.url("/good")], tmp_path, progress=lambda *step: seen.append(step)) == CONTENT
    assert server.requests == [("/good", "bytes=1234-")]
    assert seen[0] == (1234, SIZE)


def test_whole_part_needs_no_mirror(tmp_path: Path) -> None:
    begin(tmp_path, CONTENT)
    assert get([], tmp_path) == CONTENT


@pytest.mark.parametrize("part", [LIE, CONTENT + b"x", LIE[:5000]])
def test_wrong_part_costs_only_time(server: Server, tmp_path: Path, part: bytes) -> None:
    begin(tmp_path, part)
    assert get([server.url("/good")], tmp_path) == CONTENT


def test_interruption_keeps_the_part(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get([server.url("/good")], tmp_path, progress=interrupt)
    assert not (tmp_path / "file.tar").exists()
    kept = (tmp_path / "file.tar.part").stat().st_size
    assert 0 < kept < SIZE
    assert get([server.url("/good")], tmp_path) == CONTENT
    assert server.requests[-1] == ("/good", f"bytes={kept}-")


def test_connection_that_breaks_is_resumed_as_long_as_it_helps(server: Server, tmp_path: Path) -> None:
    url = server.url("/drops", lambda handler: handler.ranged(CONTENT, sent=50_000))
    assert get([url], tmp_path) == CONTENT
    assert [asked for _, asked in server.requests] == [None] + [f"bytes={n}-" for n in range(50_000, SIZE, 50_000)]


def test_connection_that_brings_nothing_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.url("/empty", lambda handler: handler.ranged(CONTENT, sent=0))
    message = failure([url], tmp_path)
    assert f"{url}: closed the connection after 0 of {SIZE} bytes (3 times)" in message
    assert len(server.requests) == 3


def test_part_survives_failure_and_the_next_mirror_continues(server: Server, tmp_path: Path) -> None:
    def first_half_only(handler: Handler) -> None:
        handler.ranged(CONTENT, sent=max(0, SIZE // 2 - handler.offset()))

    broken = server.url("/half", first_half_only)
    failure([broken], tmp_path)
    assert (tmp_path / "file.tar.part").read_bytes() == CONTENT[: SIZE // 2]
    assert get([broken, server.url("/good")], tmp_path) == CONTENT
    assert server.requests[-1] == ("/good", f"bytes={SIZE // 2}-")


def test_server_without_ranges_restarts(server: Server, tmp_path: Path) -> None:
    url = server.url("/plain", lambda handler: handler.answer(200, CONTENT, Content_Length=str(SIZE)))
    begin(tmp_path, LIE[:1000])
    assert get([url], tmp_path) == CONTENT
    assert server.requests == [("/plain", "bytes=1000-")]


def test_server_without_ranges_that_always_breaks_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.url("/plain", lambda handler: handler.answer(200, CONTENT[:90_000], Content_Length=str(SIZE)))
    assert "closed the connection after 90000" in failure([url], tmp_path)
    assert len(server.requests) == 3  # the first one was useful, the two after it brought nothing new


@pytest.mark.parametrize("tail", [b"", b"x"])
def test_size_may_be_unstated_when_nothing_is_at_stake(server: Server, tmp_path: Path, tail: bytes) -> None:
    assert get([server.url("/bare", lambda handler: handler.answer(200, CONTENT + tail))], tmp_path) == CONTENT


def test_unstated_size_does_not_cost_the_part_while_another_mirror_resumes(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, CONTENT[:1000])
    bare = server.url("/bare", lambda handler: handler.answer(200, b"<html>please log in</html>"))
    assert get([bare, server.url("/good")], tmp_path) == CONTENT
    assert server.requests[-1] == ("/good", "bytes=1000-")


def refuse_ranges(handler: Handler) -> None:
    if handler.headers.get("Range"):
        handler.answer(416, b"", Content_Length="0")
    else:
        handler.answer(200, CONTENT, Content_Length=str(SIZE))


def other_range(handler: Handler) -> None:
    if handler.headers.get("Range"):
        handler.answer(206, CONTENT[500:], Content_Range=f"bytes 500-{SIZE - 1}/{SIZE}")
    else:
        handler.answer(200, CONTENT, Content_Length=str(SIZE))


def unstated_size(handler: Handler) -> None:
    handler.answer(200, CONTENT)


@pytest.mark.parametrize("behaviour", [refuse_ranges, other_range, unstated_size])
def test_mirror_that_cannot_resume_is_the_last_resort(
    server: Server, tmp_path: Path, behaviour: Callable[[Handler], None]
) -> None:
    begin(tmp_path, CONTENT[:1000])
    odd = server.url("/odd", behaviour)
    assert get([odd, server.url("/good")], tmp_path) == CONTENT
    assert server.requests == [("/odd", "bytes=1000-"), ("/good", "bytes=1000-")]
    (tmp_path / "file.tar").unlink()
    begin(tmp_path, CONTENT[:1000])
    assert get([odd], tmp_path) == CONTENT


def test_mirror_that_lies_is_followed_by_the_next(server: Server, tmp_path: Path) -> None:
    lies = server.url("/lies", lambda handler: handler.ranged(LIE))
    assert get([lies, server.url("/good")], tmp_path) == CONTENT
    assert server.requests == [("/lies", None), ("/good", None)]


def test_mirror_that_lies_alone_leaves_nothing(server: Server, tmp_path: Path) -> None:
    lies = server.url("/lies", lambda handler: handler.ranged(LIE))
    assert f"{lies}: serves a file of the right size with another SHA-256" in failure([lies], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lies_in_the_part_do_not_discredit_an_honest_mirror(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, LIE[:1000])
    assert get([server.url("/good")], tmp_path) == CONTENT
    assert server.requests == [("/good", "bytes=1000-"), ("/good", None)]


def test_liar_without_ranges_is_asked_once(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, CONTENT[:1000])
    lies = server.url("/lies", lambda handler: handler.answer(200, LIE, Content_Length=str(SIZE)))
    assert "another SHA-256" in failure([lies], tmp_path)
    assert len(server.requests) == 1


def test_liar_whose_connection_breaks_is_not_asked_for_ever(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, LIE[:1000])
    lies = server.url("/lies", lambda handler: handler.ranged(LIE, sent=200_000))
    assert "another SHA-256" in failure([lies], tmp_path)
    assert len(server.requests) == 4  # two for the rest of the part, two for a download of its own


@pytest.mark.parametrize("shown", [b"<html>gone</html>", CONTENT[:-1], CONTENT + b"x"])
def test_file_of_another_size_costs_neither_time_nor_part(server: Server, tmp_path: Path, shown: bytes) -> None:
    begin(tmp_path, CONTENT[:1000])
    page = server.url("/page", lambda handler: handler.answer(200, shown, Content_Length=str(len(shown))))
    ranged = server.url("/ranged", lambda handler: handler.ranged(shown + bytes(2000)))
    message = failure([page, ranged], tmp_path)
    assert f"{page}: offers {len(shown)} bytes instead of {SIZE}" in message
    assert f"{ranged}: offers {len(shown) + 2000} bytes instead of {SIZE}" in message
    assert (tmp_path / "file.tar.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (204, 1), (503, 3), (429, 3)])
def test_statuses(server: Server, tmp_path: Path, status: int, requests: int) -> None:
    url = server.url("/status", lambda handler: handler.answer(status, b""))
    assert f"{url}: HTTP {status}" in failure([url], tmp_path)
    assert len(server.requests) == requests


def test_redirect_is_followed_with_the_range(server: Server, tmp_path: Path) -> None:
    begin(tmp_path, CONTENT[:1000])
    url = server.url("/moved", lambda handler: handler.answer(302, b"", Location="/good"))
    assert get([url], tmp_path) == CONTENT
    assert server.requests == [("/moved", "bytes=1000-"), ("/good", "bytes=1000-")]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/file.tar"])
def test_redirect_leads_to_no_other_scheme(server: Server, tmp_path: Path, target: str) -> None:
    url = server.url("/moved", lambda handler: handler.answer(302, b"", Location=target))
    assert f"{url}: " in failure([url], tmp_path)


def test_redirect_in_a_circle_ends(server: Server, tmp_path: Path) -> None:
    url = server.url("/circle", lambda handler: handler.answer(302, b"", Location="/circle"))
    assert f"{url}: HTTP 302" in failure([url], tmp_path)


def test_silence_is_timed_out(server: Server, tmp_path: Path) -> None:
    awake = threading.Event()

    def silent(handler: Handler) -> None:
        awake.wait(10)

    url = server.url("/silent", silent)
    try:
        assert "timed out (3 times)" in failure([url], tmp_path, timeout=0.05)
    finally:
        awake.set()


def test_file_address(server: Server, tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    source = tmp_path / "stick" / "a file.tar"
    source.write_bytes(CONTENT)
    begin(tmp_path, LIE[:1000])
    missing = (tmp_path / "stick" / "none.tar").as_uri()
    assert get([missing, source.as_uri()], tmp_path) == CONTENT
    assert source.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/file.tar", "data:,x", "/mnt/file.tar", "server/file.tar", ""])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    assert f"{url}: is not an address of the kind http, https, file" in failure([url], tmp_path)


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/file.tar", "http:///file.tar", "http://127.0.0.1/a b", "http://[::1/"])
def test_malformed_addresses_are_reasons_not_bugs(tmp_path: Path, url: str) -> None:
    assert f"{url}: " in failure([url], tmp_path)


def test_offline_says_what_was_tried_and_what_to_bring(server: Server, tmp_path: Path) -> None:
    closed = f"http://127.0.0.1:{server.server_port}/gone"
    server.behaviours["/gone"] = lambda handler: handler.answer(410, b"")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stopped:
        refused = f"http://127.0.0.1:{stopped.server_port}/file"
    message = failure([closed, refused], tmp_path)
    assert message.startswith("file.tar could not be fetched (")
    assert f"{closed}: HTTP 410 Gone; {refused}: Connection refused" in message
    assert message.endswith(f"): bring the file ({SIZE} bytes, SHA-256 {SHA256}) as {tmp_path / 'file.tar'}")
    assert failure([refused], tmp_path, remedy="bring it").endswith(": bring it")
    assert failure([], tmp_path).startswith("file.tar could not be fetched (no mirror): ")


def test_space_is_checked_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, CONTENT[:100_000])

    def free(space: int) -> None:
        usage = download.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage._replace(free=space))

    free(199_999)
    with pytest.raises(ResourceError, match=r"file\.tar needs 0\.2 MB in .*, which has 0\.2 MB free: make room"):
        get([server.url("/good")], tmp_path)
    assert server.requests == []
    free(200_000)
    assert get([server.url("/good")], tmp_path) == CONTENT


def test_disk_that_refuses_keeps_what_was_written(server: Server, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"file\.tar\.part cannot be written: File too large"):
            get([server.url("/good")], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "file.tar.part").read_bytes() == CONTENT[:100_000]
    assert get([server.url("/good")], tmp_path) == CONTENT


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot be written: .*: choose another folder"):
        get([], tmp_path / "file" / "folder")


def test_one_process_at_a_time(server: Server, tmp_path: Path) -> None:
    with exclusive(tmp_path / "file.tar.part"), pytest.raises(BusyError, match=r"file\.tar\.part is in use"):
        get([server.url("/good")], tmp_path)
    assert get([server.url("/good")], tmp_path) == CONTENT


UNKNOWN: dict[str, Any] = {"size": None, "checksum": f"sha256:{SHA256[:8]}"}  # as in the names of published weights


@pytest.mark.parametrize("headers", [{"Content_Length": str(SIZE)}, {}])
def test_size_that_nobody_knows_beforehand(server: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    seen: list[tuple[int, int]] = []
    url = server.url("/plain", lambda handler: handler.answer(200, CONTENT, **headers))
    assert get([url], tmp_path, progress=lambda *step: seen.append(step), **UNKNOWN) == CONTENT
    assert seen[0] == (0, SIZE if headers else 0)
    assert seen[-1] == (SIZE, SIZE)


def test_part_of_a_file_of_unknown_size_is_resumed(server: Server, tmp_path: Path) -> None:
    url = server.url("/drops", lambda handler: handler.ranged(CONTENT, sent=120_000))
    begin(tmp_path, CONTENT[:1234])
    assert get([url], tmp_path, **UNKNOWN) == CONTENT
    assert [asked for _, asked in server.requests] == [f"bytes={n}-" for n in (1234, 121_234, 241_234)]


@pytest.mark.parametrize("part", [CONTENT, LIE, CONTENT + b"x"])
def test_whole_or_foreign_part_of_a_file_of_unknown_size(server: Server, tmp_path: Path, part: bytes) -> None:
    begin(tmp_path, part)
    urls = [] if part == CONTENT else [server.url("/good", refuse_ranges)]
    assert get(urls, tmp_path, **UNKNOWN) == CONTENT


@pytest.mark.parametrize("shown", [LIE, CONTENT[:-1], b""])
def test_unknown_size_and_wrong_hash(server: Server, tmp_path: Path, shown: bytes) -> None:
    url = server.url("/lies", lambda handler: handler.ranged(shown))
    message = failure([url], tmp_path, **UNKNOWN)
    assert f"{url}: serves a file with another SHA-256" in message
    assert message.endswith(f": bring the file (SHA-256 {SHA256[:8]}) as {tmp_path / 'file.tar'}")
    assert list(tmp_path.iterdir()) == []


def test_stated_size_that_the_disk_has_no_room_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage._replace(free=SIZE - 1))
    with pytest.raises(ResourceError, match=r"file\.tar needs 0\.3 MB in .*: make room"):
        get([server.url("/good")], tmp_path, **UNKNOWN)


def test_md5_where_a_file_is_known_by_nothing_better(server: Server, tmp_path: Path) -> None:
    checksum = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    assert get([server.url("/lies", lambda handler: handler.ranged(LIE)), server.url("/good")], tmp_path,
               checksum=checksum) == CONTENT
    (tmp_path / "file.tar").unlink()
    assert f"another MD5): bring the file ({SIZE} bytes, MD5 {checksum[4:]}) as" in failure(
        [server.url("/lies")], tmp_path, checksum=checksum)
