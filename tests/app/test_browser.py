"""The page as people use it: headless Chromium, the bundled checkpoint, and the example images."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlight_hf.app.limits import Limits
from samlight_hf.app.segmenter import Segmenter
from samlight_hf.app.server import running
from samlight_hf.app.session import Session
from samlight_hf.commands.options import BUNDLED_CHECKPOINT, EXAMPLE_IMAGES
from samlight_hf.loading import load_model


pytest.importorskip("gradio", reason="the app's page needs gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is steered by playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]

EYE, CHEEK = (165, 115), (90, 200)  # of the cat, in pixels of its 451x300
LIMITS = Limits(upload_mb=2, pixels=3_000_000, clicks=20, points_per_side=8)


@pytest.fixture(scope="module")
def server():
    model, processor = load_model(BUNDLED_CHECKPOINT, "cpu")
    examples = sorted(EXAMPLE_IMAGES.glob("*.jpg"))
    with running(
        Segmenter(model, processor), "tiny", port=0, limits=LIMITS, examples=examples,
        points_per_side=4,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def browser():
    arguments = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Tab:
    """A browser tab with the page, and its session on the server."""

    def __init__(self, server, browser):
        self.server, self.key = server, ""
        self.context = browser.new_context(viewport={"width": 1360, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("request", lambda request: self._look_at(request.url))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}") or dialog.dismiss())
        self.page.goto(server.url)
        self.page.wait_for_selector("#sl-source input[type=file]", state="attached")

    def _look_at(self, url: str):
        if "/heartbeat/" in url:
            self.key = url.rpartition("/")[2]
        if not url.startswith((self.server.url, "data:", "blob:")):
            self.foreign.append(url)

    def pick(self, name: str = "cat"):
        self.page.click(f'.sl-examples button[title="{name}"]')
        self.wait_for_status(rf"{name}.* encoded in \d+ ms")
        return self

    def upload(self, path: Path):
        self.page.set_input_files("#sl-source input[type=file]", str(path))

    def wait_for_status(self, pattern: str):
        status = self.page.locator(".sl-status")
        sync_api.expect(status).to_have_text(re.compile(pattern), timeout=60_000)

    @property
    def session(self) -> Session:
        return self.server.page.store._sessions[self.key][0]

    def place(self, point) -> tuple[float, float]:
        """Return the place on the screen of a point of the image."""
        bounds = self.page.locator(".sl-canvas").bounding_box()
        width, height = self.session.image.size
        return (
            bounds["x"] + (point[0] + 0.5) * bounds["width"] / width,
            bounds["y"] + (point[1] + 0.5) * bounds["height"] / height,
        )

    def click(self, point, **options):
        with self.next_view():
            self.page.mouse.click(*self.place(point), **options)

    def press(self, selector: str):
        with self.next_view():
            self.page.click(selector)

    @contextlib.contextmanager
    def next_view(self):
        """Wait until the page has drawn the server's next answer."""
        count = int(self.page.get_attribute("#sl-stage [data-views], [data-views]", "data-views") or 0)
        yield
        self.page.wait_for_function(f"Number(document.querySelector('[data-views]').dataset.views) > {count}")

    def download(self, file_format: str) -> tuple[str, bytes]:
        with self.page.expect_download() as waiting:
            self.page.click(f"[data-format={file_format}]")
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()

    def mask(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.download("png")[1])))

    def pixels(self) -> np.ndarray:
        """Return what the canvas shows, (H, W, 4)."""
        uri = self.page.evaluate("document.querySelector('.sl-canvas').toDataURL('image/png')")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))

    def close(self):
        self.context.close()


@pytest.fixture
def open_tab(server, browser):
    tabs = []

    def open_one() -> Tab:
        tabs.append(Tab(server, browser))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.close()
    end = time.monotonic() + 30
    while len(server.page.store) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(server.page.store) == 0, "closed tabs leave no session"
    for tab in tabs:
        assert not tab.foreign, f"requests to other machines: {tab.foreign}"
        assert not tab.errors, tab.errors


@pytest.fixture
def tab(open_tab) -> Tab:
    return open_tab()


def test_a_click_on_the_eye(tab):
    """The mask covers the click, the canvas shows it, and a background click changes it."""
    tab.pick()
    plain = tab.pixels()
    tab.click(EYE)
    assert tab.session.state.prompt.points[0] == pytest.approx((165.5, 115.5, 1), abs=1)
    assert tab.page.locator(".sl-card").count() == 3
    scores = [float(text) for text in tab.page.locator(".sl-card b").all_inner_texts()]
    chosen = [card.get_attribute("aria-pressed") for card in tab.page.locator(".sl-card").all()].index("true")
    assert scores[chosen] == max(scores)
    tab.wait_for_status(r"masks in \d+ ms")
    mask = tab.mask()
    assert mask.shape == (300, 451) and mask[EYE[1], EYE[0]]
    changed = (tab.pixels() != plain).any(axis=2)
    shown = np.asarray(Image.fromarray(changed).resize((451, 300)))
    assert (shown & mask).sum() > 0.95 * mask.sum() and (shown & ~mask).sum() < 0.2 * shown.size
    background = tuple(reversed(np.argwhere(mask)[len(np.argwhere(mask)) // 9]))  # inside, away from the click
    tab.click(background, button="right")
    assert tab.session.state.prompt.points[1][2] == 0
    assert not np.array_equal(tab.mask(), mask)
    tab.press("[data-do=undo]")
    assert np.array_equal(tab.mask(), mask)


def test_a_candidate_is_chosen(tab):
    tab.pick()
    tab.click(EYE)
    for index in range(3):
        tab.press(f".sl-card >> nth={index}")
        assert np.array_equal(tab.mask(), tab.session.state.candidates.masks[index])


def test_a_box_by_dragging_and_by_two_clicks(tab):
    tab.pick()
    tab.page.click("[data-tool=box]")
    corners = (288, 108), (352, 162)
    start, end = map(tab.place, corners)
    tab.page.mouse.move(*start)
    tab.page.mouse.down()
    tab.page.mouse.move(*end, steps=5)
    with tab.next_view():
        tab.page.mouse.up()
    dragged = tab.session.state.prompt.box_xyxy
    assert dragged == pytest.approx((288.5, 108.5, 352.5, 162.5), abs=1)
    tab.press("[data-do=clear]")
    tab.page.mouse.click(*end)
    tab.wait_for_status("opposite corner")
    with tab.next_view():
        tab.page.mouse.click(*start)
    assert tab.session.state.prompt.box_xyxy == pytest.approx(dragged, abs=0.5)


def test_corners_of_the_image_and_clicks_beside_it(tab, tmp_path):
    """A narrow image leaves room beside the canvas, where clicks do nothing. Clicks at its corners are its corners."""
    Image.open(EXAMPLE_IMAGES / "cat.jpg").crop((100, 0, 200, 300)).save(tmp_path / "narrow.png")
    tab.upload(tmp_path / "narrow.png")
    tab.wait_for_status("narrow.png, 100.300")
    for corner in ((0, 0), (99, 0), (0, 299), (99, 299)):
        tab.click(corner)
        assert tab.session.state.prompt.points[-1][:2] == pytest.approx((corner[0] + 0.5, corner[1] + 0.5), abs=0.6)
        tab.press("[data-do=clear]")
    bounds = tab.page.locator(".sl-canvas").bounding_box()
    tab.page.mouse.click(bounds["x"] - 30, bounds["y"] + 50)
    tab.page.wait_for_timeout(500)
    assert not tab.session.state.prompt


def test_everything_gives_a_table_and_a_drawing(tab):
    tab.pick("coffee")
    plain = tab.pixels()
    tab.page.click("#sl-everything button >> nth=0")
    tab.page.click("#sl-run")
    tab.wait_for_status(r"everything: \d+ masks in")
    found = tab.session.everything
    assert len(found) and str(len(found)) in tab.page.inner_text(".sl-status")
    score = tab.page.inner_text("#sl-table [data-testid=cell-0-1]")
    assert float(score) == pytest.approx(float(found.scores[0]), abs=0.001)
    assert (tab.pixels() != plain).any(axis=2).mean() > 0.1
    tab.press("#sl-keep-all")
    assert tab.page.locator(".sl-objects li").count() == len(found)
    tab.press("[data-do=undo]")
    tab.press("[data-do=clear]")
    assert np.array_equal(tab.pixels(), plain)


def test_objects_are_named_coloured_hidden_removed_and_downloaded(tab):
    tab.pick()
    tab.click(EYE)
    tab.press("[data-do=keep]")
    tab.click(CHEEK)
    tab.press("[data-do=keep]")
    name = '<img src=x onerror="alert(1)">'
    with tab.next_view():
        tab.page.locator(".sl-objects input[type=text]").first.fill(name)
        tab.page.keyboard.press("Tab")
    assert tab.session.state.objects[0].name == name.replace("/", " ")
    with tab.next_view():
        tab.page.locator(".sl-objects input[type=color]").first.fill("#ff0000")
    assert tab.session.state.objects[0].colour == "#ff0000"
    files = dict(map(tab.download, ("png", "labels", "coco", "yolo", "labelme", "cutout")))
    assert set(files) == {
        "cat_masks.zip", "cat_labels.png", "cat_coco.json", "cat_yolo.zip", "cat.json", "cat_cutout.png",
    }  # fmt: skip
    assert len(json.loads(files["cat_coco.json"])["annotations"]) == 2
    assert len(zipfile.ZipFile(io.BytesIO(files["cat_masks.zip"])).namelist()) == 2
    assert Image.open(io.BytesIO(files["cat_cutout.png"])).mode == "RGBA"
    tab.press(".sl-objects li:first-child button >> nth=0")
    assert not tab.session.state.objects[0].is_visible
    tab.press(".sl-objects li:first-child button >> nth=1")
    assert [kept.number for kept in tab.session.state.objects] == [2]


def test_keys(tab):
    tab.pick()
    tab.click(EYE)
    for key in ("3", "2", "1"):
        tab.page.keyboard.press(key)
    assert tab.page.get_attribute('[data-tool="1"]', "aria-pressed") == "true"
    tab.page.locator(".sl-canvas").focus()
    with tab.next_view():
        tab.page.keyboard.press("Enter")
    assert len(tab.session.state.objects) == 1
    with tab.next_view():
        tab.page.keyboard.press("Control+z")
    assert not tab.session.state.objects


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jpg", b"hello", "text.jpg: not an image that can be read"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not an image that can be"),
        ("large.jpg", b"\xff\xd8" + bytes(3 * 2**20), "exceed the maximum allowed size"),
    ],
)
def test_wrong_files_get_a_message(tab, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    tab.upload(tmp_path / name)
    sync_api.expect(tab.page.locator(".toast-body").first).to_contain_text(words)
    tab.upload(EXAMPLE_IMAGES / "coffee.jpg")
    tab.wait_for_status("coffee.jpg")
    tab.errors.clear()  # the browser's own: it could not show the file


def test_an_image_with_too_many_pixels_gets_a_message(tab, tmp_path):
    Image.new("RGB", (2000, 1501)).save(tmp_path / "x.png")
    tab.upload(tmp_path / "x.png")
    sync_api.expect(tab.page.locator(".toast-body").first).to_contain_text(
        "3,002,000 pixels, and the limit is 3,000,000"
    )
    tab.errors.clear()  # the browser's own: the file was removed while it was shown


def test_an_image_of_one_pixel(tab, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    tab.upload(tmp_path / "dot.png")
    tab.wait_for_status("dot.png, 1.1")
    tab.click((0, 0))
    assert tab.session.state.candidates is not None


def test_two_users_at_once_stay_apart(server, open_tab):
    first = open_tab()
    first.pick("cat")
    second = open_tab()
    second.pick("coffee")
    first.click(EYE)
    second.page.wait_for_timeout(500)
    assert second.page.locator(".sl-card").count() == 0 and second.session.state.candidates is None
    second.click((355, 270))
    assert first.mask().shape != second.mask().shape
    assert first.session is not second.session and first.session.name == "cat.jpg"


def test_a_hundred_clicks_a_second(tab):
    """All arrive in their order, up to the limit; the rest is told, and the page goes on."""
    tab.pick()
    tab.page.evaluate(
        """() => { const canvas = document.querySelector('.sl-canvas'), bounds = canvas.getBoundingClientRect();
        for (let n = 0; n < 100; n++) setTimeout(() => {
            for (const type of ['pointerdown', 'pointerup']) canvas.dispatchEvent(new PointerEvent(type,
                { bubbles: true, pointerId: 1, clientX: bounds.left + 20 + n * 5, clientY: bounds.top + 80 }));
        }, n * 10); }"""
    )
    tab.errors.clear()
    tab.wait_for_status("20 clicks are the most for one object")
    xs = [point[0] for point in tab.session.state.prompt.points]
    assert 1 <= len(xs) <= 20 and xs == sorted(xs)
    tab.page.wait_for_function("!document.querySelector('.sl-busy')")
    tab.errors = [error for error in tab.errors if "setPointerCapture" not in error]  # of events that no mouse made
    tab.press("[data-do=clear]")
    tab.click(EYE)
    assert len(tab.session.state.prompt.points) == 1


def test_a_tab_closed_in_mid_run_leaves_nothing(server, open_tab):
    first = open_tab().pick()
    session = first.session
    first.page.click("#sl-everything button >> nth=0")
    first.page.fill("#sl-everything input[type=number] >> nth=0", "8")
    first.page.click("#sl-run")
    first.page.wait_for_timeout(300)
    first.close()
    end = time.monotonic() + 30
    while not session.is_closed:
        assert time.monotonic() < end
        time.sleep(0.1)
    second = open_tab().pick()
    second.click(EYE)
    assert second.session.state.candidates is not None


def test_a_dropped_session_is_told(server, tab):
    tab.pick()
    server.page.store.drop(tab.key)
    tab.page.mouse.click(*_middle(tab))
    sync_api.expect(tab.page.locator(".toast-body").first).to_contain_text("open one first")
    tab.pick("coffee")


def _middle(tab) -> tuple[float, float]:
    bounds = tab.page.locator(".sl-canvas").bounding_box()
    return bounds["x"] + bounds["width"] / 2, bounds["y"] + bounds["height"] / 2


def test_a_fault_of_the_server_and_a_full_queue_are_told(server, tab, monkeypatch):
    tab.pick()
    monkeypatch.setattr(tab.session, "add_points", {}.__getitem__, raising=False)  # a bug: TypeError
    tab.page.mouse.click(*_middle(tab))
    tab.wait_for_status("could not do this")
    monkeypatch.undo()
    monkeypatch.setattr(server.page.blocks._queue, "max_size", 0)
    tab.page.mouse.click(*_middle(tab))
    tab.page.wait_for_function("!document.querySelector('.sl-busy')")
    sync_api.expect(tab.page.locator(".toast-body").first).to_contain_text("busy")
    monkeypatch.undo()
    tab.errors.clear()
    tab.click(EYE)
    assert len(tab.session.state.prompt.points) == 1


def test_a_new_image_replaces_the_old_one(tab):
    tab.pick("cat")
    tab.click(EYE)
    tab.page.click("[data-do=fresh]")
    tab.pick("rocket")
    assert tab.page.locator(".sl-card").count() == 0 and tab.session.name == "rocket.jpg"


def test_of_two_examples_opened_quickly_the_later_stays(server, tab, monkeypatch):
    encode, waited = server.page.store.segmenter.encode, []

    def slowly(image):
        if not waited:
            waited.append(time.sleep(2))
        return encode(image)

    monkeypatch.setattr(server.page.store.segmenter, "encode", slowly)
    tab.page.click('.sl-examples button[title="cat"]')
    tab.pick("rocket")
    tab.page.wait_for_timeout(3000)
    tab.wait_for_status("rocket")
    assert tab.page.locator(".sl-canvas").is_visible() and tab.session.name == "rocket.jpg"


def test_of_two_images_the_later_is_drawn_though_it_is_loaded_first(tab):
    """The browser takes long for the first image; the second one, of another shape, stays in its place."""
    tab.page.evaluate(
        """() => { const { set } = Object.getOwnPropertyDescriptor(HTMLImageElement.prototype, 'src'), Plain = Image;
        window.Image = function () { const image = new Plain(); Object.defineProperty(image, 'src', { set(uri) {
          if (uri.startsWith('data:image/jpeg') && !window.goOn) window.goOn = () => set.call(image, uri);
          else set.call(image, uri); } }); return image; }; }"""
    )
    tab.page.click('.sl-examples button[title="cat"]')
    tab.page.wait_for_function("!!window.goOn")
    tab.page.click("[data-do=fresh]")
    tab.pick("rocket")
    drawn = tab.pixels()
    tab.page.evaluate("() => window.goOn()")
    tab.page.wait_for_timeout(500)
    tab.wait_for_status("rocket")
    tab.page.set_viewport_size({"width": 1200, "height": 900})  # it is drawn again
    tab.page.wait_for_timeout(200)
    assert np.array_equal(tab.pixels(), drawn)


@pytest.mark.parametrize("what", ["everything", "candidates"])
def test_answers_about_an_image_that_is_left_do_not_reach_the_next(server, tab, monkeypatch, what):
    """Neither the end of everything mode, which is stopped, nor clicks, of which two wait for the first's answer."""
    tab.pick("cat")
    run, begun, go_on = getattr(server.page.store.segmenter, what), threading.Event(), threading.Event()

    def slowly(*arguments):
        begun.set()
        go_on.wait(60)
        return run(*arguments)

    monkeypatch.setattr(server.page.store.segmenter, what, slowly)
    if what == "everything":
        tab.page.click("#sl-everything button >> nth=0")
        tab.page.click("#sl-run")
    else:
        for point in (EYE, CHEEK, EYE):
            tab.page.mouse.click(*tab.place(point))
    assert begun.wait(30)
    tab.page.click("[data-do=fresh]")
    tab.pick("rocket")
    go_on.set()
    tab.page.wait_for_timeout(2000)
    tab.wait_for_status("rocket")
    assert not tab.session.state.prompt and tab.page.locator(".sl-canvas").is_visible()


def test_the_webcam(tab):
    tab.page.get_by_label("Capture from camera").click()
    tab.page.get_by_text("Click to Access Webcam").click()
    tab.page.wait_for_function("document.querySelector('#sl-source video')?.videoWidth > 0")
    tab.page.get_by_label("capture photo").click()
    tab.wait_for_status("encoded in")
    tab.errors.clear()  # gradio's own: it asks for the progress of an upload that has none


def test_an_image_from_the_clipboard(tab):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.evaluate(
        """async () => { const canvas = document.createElement('canvas'); canvas.width = 64; canvas.height = 48;
        const context = canvas.getContext('2d'); context.fillStyle = 'red'; context.fillRect(8, 8, 30, 30);
        const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));
        await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]); }"""
    )
    tab.page.locator('#sl-source [aria-label*="lipboard"]').first.click()
    tab.wait_for_status("64.48")
