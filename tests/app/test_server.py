"""The server and its API as programs use them, with gradio's own client, and as nobody should."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlight_hf.app.limits import Limits
from samlight_hf.app.server import check_port, running
from samlight_hf.commands import cli
from samlight_hf.loading import load_model

from .conftest import noise, processor_of


gradio = pytest.importorskip("gradio", reason="the app's server needs gradio")
from gradio_client import Client, handle_file  # noqa: E402  it comes with gradio


pytestmark = pytest.mark.slow

LIMITS = Limits(upload_mb=1, pixels=400_000, sessions=8, queue=6, points_per_side=8)


@pytest.fixture(scope="module")
def server(segmenter):
    with running(segmenter, "a/<b>model</b>", port=0, limits=LIMITS, points_per_side=3) as server:
        yield server


@pytest.fixture
def client(server):
    with contextlib.closing(Client(server.url, verbose=False)) as client:
        yield client


def image_file(folder: Path, seed: int = 0, name: str = "noise.png") -> str:
    noise(seed).save(folder / name)
    return str(folder / name)


def request(server, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    call = urllib.request.Request(server.url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(call, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_for(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_api_is_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {
        "/open_image", "/prompt", "/choose", "/undo", "/clear", "/keep", "/everything", "/download",
    }  # fmt: skip
    names = [parameter["parameter_name"] for parameter in endpoints["/prompt"]["parameters"]]
    assert names == ["points", "labels", "box"]
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_a_program_segments_keeps_and_downloads(client, server, tmp_path):
    opened = client.predict(handle_file(image_file(tmp_path)), api_name="/open_image")
    assert (opened["width"], opened["height"]) == (96, 64) and opened["candidates"] == []
    found = client.predict([[20, 30]], [1], None, api_name="/prompt")
    segmenter, image = server.page.store.segmenter, Image.open(tmp_path / "noise.png")
    encoded = segmenter.predictor.encode(image)
    expected = segmenter.predictor.predict([[(20, 30)]], [[1]], image=encoded)
    assert [candidate["score"] for candidate in found["candidates"]] == expected.scores[0].tolist()
    assert [candidate["area"] for candidate in found["candidates"]] == expected.masks[0].sum((1, 2)).tolist()
    assert client.predict(2, api_name="/choose")["chosen"] == 2
    assert client.predict(api_name="/undo")["chosen"] == found["chosen"]
    kept = client.predict("cat", api_name="/keep")
    assert [kept_object["name"] for kept_object in kept["objects"]] == ["cat"] and kept["candidates"] == []
    client.predict([], [], [10, 20, 60, 50], api_name="/prompt")
    client.predict(api_name="/clear")
    file = client.predict("png", api_name="/download")
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(file["data"]))))
    assert file["name"] == "noise_mask.png" and np.array_equal(mask, expected.masks[0, found["chosen"]])
    document = client.predict(3, 0.0, 0.0, api_name="/everything")
    assert document["annotations"] and document["images"][0]["file_name"] == "noise.png"


def test_two_users_stay_apart(server, tmp_path):
    with contextlib.closing(Client(server.url, verbose=False)) as a, contextlib.closing(Client(server.url)) as b:
        a.predict(handle_file(image_file(tmp_path, 1)), api_name="/open_image")
        with pytest.raises(Exception, match="there is no image here: open one first"):
            b.predict([[20, 30]], [1], None, api_name="/prompt")
        b.predict(handle_file(image_file(tmp_path, 2)), api_name="/open_image")
        of_a, of_b = (user.predict([[20, 30]], [1], None, api_name="/prompt") for user in (a, b))
        assert of_a["candidates"] != of_b["candidates"]
        a.predict("mine", api_name="/keep")
        assert b.predict([[20, 30]], [1], None, api_name="/prompt")["objects"] == []


def test_a_client_that_leaves_takes_its_image_along(server, tmp_path):
    store, holder = server.page.store, server.page.blocks.app.state_holder
    client = Client(server.url, verbose=False)
    client.predict(handle_file(image_file(tmp_path)), api_name="/open_image")
    key = client.session_hash
    assert store.get(key) and key in holder.session_data
    client.close()
    wait_for(lambda: key not in store._sessions and key not in holder.session_data)


def test_uploads_do_not_stay_on_the_disk(server, client, tmp_path):
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    client.predict(handle_file(image_file(tmp_path, 7)), api_name="/open_image")
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert folder.stat().st_mode & 0o077 == 0, "other users of the machine cannot look into it"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "/etc/../etc/passwd", "%2Fetc%2Fpasswd", str(Path(__file__)), "pyproject.toml",
        "../../../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/", "//etc/passwd",
    ],
)  # fmt: skip
def test_no_file_of_the_machine_is_served(server, path):
    for route in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file/{path}", f"/static/{path}"):
        status, body = request(server, route)
        assert b"root:" not in body and b"pytest" not in body and (status >= 400 or b"<!doctype html" in body.lower())


def call(server, name: str, data: list) -> str:
    """Call an endpoint as curl does, and return the stream of its events."""
    body = json.dumps({"data": data}).encode()
    status, answer = request(server, f"/gradio_api/call/{name}", body, **{"Content-Type": "application/json"})
    if status != 200:
        return f"refused: {status}"
    return request(server, f"/gradio_api/call/{name}/{json.loads(answer)['event_id']}")[1].decode()


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "http://127.0.0.1:9/x.png", "../x"])
def test_no_file_or_address_is_read_as_an_upload(server, path):
    data = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    events = call(server, "open_image", [data])
    assert "event: error" in events and "root:" not in events and "complete" not in events
    if path.startswith("http"):
        assert "addresses are not read" in events, "it was not asked for"
    assert Path(__file__).is_file()


@pytest.mark.parametrize("more", [{}, {"is_stream": True}, {"is_stream": True, "meta": {"_type": "gradio.FileData"}}])
def test_a_file_that_is_no_upload_is_neither_read_nor_removed(server, tmp_path, more):
    """gradio checks files with `meta` alone."""
    victim = tmp_path / "photo.png"
    Image.new("RGB", (64, 48)).save(victim)
    events = call(server, "open_image", [{"path": str(victim), **more}])
    assert "event: error" in events and "complete" not in events
    assert victim.is_file()


def test_calls_without_a_session_share_nothing(server):
    assert "open one first" in call(server, "prompt", [[[20, 30]], [1], None])
    assert "open one first" in call(server, "undo", [])


def test_the_queue_cannot_be_passed(server):
    body = json.dumps({"data": []}).encode()
    for route in ("run", "api"):
        status, _ = request(server, f"/gradio_api/{route}/undo", body, **{"Content-Type": "application/json"})
        assert status in (401, 403, 404, 405), route


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jpg", b"hello", "text.jpg: not an image that can be read"),
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.svg: not an image"),
        ("empty.png", b"", "empty.png: the file is empty"),
    ],
)
def test_wrong_files_get_a_message(client, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=words) as raised:
        client.predict(handle_file(str(tmp_path / name)), api_name="/open_image")
    assert "/samlight-app-" not in str(raised.value)


def test_large_images_get_a_message(client, tmp_path):
    Image.new("RGB", (1000, 401)).save(tmp_path / "large.png")
    with pytest.raises(Exception, match="401,000 pixels, and the limit is 400,000"):
        client.predict(handle_file(str(tmp_path / "large.png")), api_name="/open_image")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert client.predict(handle_file(str(tmp_path / "dot.png")), api_name="/open_image")["width"] == 1
    assert client.predict([[0, 0]], [1], None, api_name="/prompt")["candidates"]


def test_large_requests_are_refused_unread(server):
    """200 MB as an upload, and as JSON: the server says no when it sees the length, and goes on."""
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        with socket.create_connection(("127.0.0.1", int(server.url.rstrip("/").rpartition(":")[2]))) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {200 * 2**20}\r\n\r\nx".encode())
            assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
    status, body = request(server, "/gradio_api/queue/join", b"x" * (2 * 2**20))
    assert status == 413 and b"limit of 1 MB" in body


def test_a_body_of_unknown_length_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rstrip("/").rpartition(":")[2]))) as connection:
        connection.settimeout(20)
        connection.sendall(
            b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk, received = b"10000\r\n" + b"x" * 65536 + b"\r\n", b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(64):
                connection.sendall(chunk)
            received = connection.recv(4096)
        assert not received or received.split(b"\r\n")[0].split()[1] in (b"413", b"400")
    assert request(server, "/config")[0] == 200


def test_a_full_queue_refuses_and_the_server_goes_on(server, tmp_path):
    """A hundred calls in a second: some are done, some are refused, all are answered."""
    client = Client(server.url, verbose=False)
    client.predict(handle_file(image_file(tmp_path)), api_name="/open_image")
    jobs = [client.submit([[number % 90, 30]], [1], None, api_name="/prompt") for number in range(100)]
    done, refused = 0, []
    for job in jobs:
        try:
            done += bool(job.result(timeout=120)["candidates"])
        except Exception as error:  # what the client raises differs by version
            refused.append(str(error))
    assert done >= 1 and refused and done + len(refused) == 100
    assert all("ueue" in text for text in refused), set(refused)
    assert client.predict([[20, 30]], [1], None, api_name="/prompt")["candidates"]
    client.close()


def test_a_client_that_leaves_stops_everything_mode(server, tmp_path):
    client = Client(server.url, verbose=False)
    client.predict(handle_file(image_file(tmp_path)), api_name="/open_image")
    session = server.page.store.get(client.session_hash)
    started, decode = threading.Event(), server.page.store.segmenter.generator._decode_crop

    def slow(*arguments, **more):
        started.set()
        wait_for(lambda: session.is_closed)
        return decode(*arguments, **more)

    server.page.store.segmenter.generator._decode_crop = slow
    try:
        client.submit(8, 0.0, 0.0, api_name="/everything")
        assert started.wait(20)
        client.close()
        wait_for(lambda: session.is_closed)
    finally:
        del server.page.store.segmenter.generator._decode_crop
    time.sleep(0.5)
    assert session.everything is None, "its result is not computed to the end"
    assert request(server, "/config")[0] == 200


def test_it_listens_on_this_machine_alone(server):
    port = int(server.url.rstrip("/").rpartition(":")[2])
    assert server.url.startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_the_name_of_the_model_is_text(server):
    page = request(server, "/config")[1].decode()
    assert "a/&lt;b&gt;model&lt;/b&gt;" in page and "<b>model" not in page


def test_nothing_is_left(segmenter):
    before = os.environ.get("GRADIO_TEMP_DIR")
    with running(segmenter, "m", port=0) as server:
        folder, port = Path(os.environ["GRADIO_TEMP_DIR"]), int(server.url.rstrip("/").rpartition(":")[2])
        assert folder.is_dir()
        with pytest.raises(ValueError, match="Choose another --port"):
            check_port("127.0.0.1", port)
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") == before
    check_port("127.0.0.1", port)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_it_listens_on_addresses_of_ipv6(segmenter, host):
    with running(segmenter, "m", host=host, port=0) as server:
        assert server.url.startswith("http://[::1]:")
        assert request(server, "/config")[0] == 200
        with pytest.raises(ValueError, match=r"cannot listen on \[::1?\]:"):
            check_port(host, int(server.url.rstrip("/").rpartition(":")[2]))


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing(model, tmp_path, kill):
    model.save_pretrained(tmp_path / "model")
    processor_of(model).save_pretrained(tmp_path / "model")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "samlight_hf.commands.cli", "app", "--port", "0", "--model", tmp_path / "model"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("Open http://127.0.0.1:")
        assert list((tmp_path / "tmp").glob("samlight-app-*"))
        process.send_signal(kill)
        assert process.wait(60) == 0 and process.stdout.read() == "Stopped.\n"
    assert not list((tmp_path / "tmp").glob("samlight-app-*"))


def test_code_of_a_checkpoint_is_never_run(model, tmp_path, capsys):
    """The package has the code: that of a folder or of the Hub is not needed, and there is no option that runs it."""
    model.save_pretrained(tmp_path / "model")
    marker = tmp_path / "was-run"
    for file in (tmp_path / "model").glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit")
    assert list((tmp_path / "model").glob("*.py")), "the folder has code"
    load_model(tmp_path / "model", "cpu")
    assert not marker.exists()
    assert cli.main(["app", "--trust-remote-code"]) == 2
