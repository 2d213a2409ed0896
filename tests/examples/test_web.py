"""`examples/web`: the server; and with the real transformers.js, the model in Node and the page in a real Chromium."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samlight_hf.commands import cli
from samlight_hf.commands.options import BUNDLED_CHECKPOINT
from samlight_hf.loading import load_model


ROOT = Path(__file__).parents[2]
WEB = ROOT / "examples" / "web"
CAT = ROOT / "examples" / "images" / "cat.jpg"
POINT = 0.44, 0.5  # on the cat, as shares of width and height
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (WEB / "vendor" / "transformers.min.js").is_file()),
    reason="needs node, and transformers.js in examples/web: make web",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")


FULL_CACHE = """
const { readFileSync } = require('fs');
const files = new Map([['kept', 'from the cache']]);
const cache = {
  put: async () => { throw new DOMException('no room', 'QuotaExceededError'); },
  match: async ({ url }) => files.get(url),
};
globalThis.self = { addEventListener: () => null };
globalThis.caches = { open: async () => cache };
new Function(readFileSync('sw.js', 'utf8') + '; globalThis.answer = fromNetworkOrCache;')();
(async () => {
  globalThis.fetch = async () => new Response('from the network');
  console.log(await (await answer({ url: 'http://a/model' })).text());
  globalThis.fetch = async () => { throw new TypeError('no network'); };
  console.log(await answer({ url: 'kept' }));
})();
"""


@contextmanager
def served(folder: Path):
    """Serve a copy of the page and return its address."""
    process = subprocess.Popen(
        [sys.executable, str(folder / "serve.py"), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait(timeout=10)


def node(*arguments, timeout: int = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["node", *map(str, arguments)], cwd=WEB, capture_output=True, text=True, timeout=timeout, env=os.environ
    )


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_browser_without_room_for_the_model_loads_it_from_the_network():
    result = node("-e", FULL_CACHE)
    assert result.stdout.splitlines() == ["from the network", "from the cache"], result.stderr


def test_server_isolates_the_page_and_listens_on_this_machine_only():
    with served(WEB) as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as response:
            assert b"app.js" in response.read()
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        with urllib.request.urlopen(f"{address}worker.js") as response:
            assert response.headers.get_content_type() == "text/javascript"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}model/no-model.json")
        port = address.rstrip("/").rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, str(WEB / "serve.py"), "--port", port], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 1 and f"port {port} cannot be used" in second.stderr


def test_page_loads_nothing_from_another_server():
    for name in ("index.html", "style.css", "app.js", "sw.js", "worker.js"):
        text = (WEB / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text, name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a copy of the page with the bundled checkpoint."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'samlight-hf[export]'")
    folder = tmp_path_factory.mktemp("web") / "site"
    shutil.copytree(WEB, folder, ignore=shutil.ignore_patterns("node_modules", "model", "images"))
    arguments = ["export", str(BUNDLED_CHECKPOINT), "--out", str(folder / "model"), "--dtype", "fp32", "int8"]
    assert cli.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def expected():
    """Return a function from prompts in pixels of the cat to the mask of highest predicted IoU, by torch."""
    model, processor = load_model(BUNDLED_CHECKPOINT, "cpu")
    image = Image.open(CAT)

    @torch.no_grad()
    def predict(**prompts) -> np.ndarray:
        inputs = processor(images=image, return_tensors="pt", **prompts)
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        outputs = model(**inputs)
        masks = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0]
        return masks[outputs.iou_scores[0, 0].argmax()].numpy()

    x, y = POINT[0] * image.width, POINT[1] * image.height
    dx, dy = 0.3 * image.width, 0.3 * image.height
    return {
        "point": predict(input_points=[[[[x, y]]]], input_labels=[[[1]]]),
        "box": predict(input_boxes=[[[x - dx, y - dy, x + dx, y + dy]]]),
        "xy": (int(x), int(y)),
    }


def iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return (ours & theirs).sum() / (ours | theirs).sum()


@pytest.mark.slow
@needs_node
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_transformers_js_in_node(site, expected, tmp_path, dtype):
    x, y = expected["xy"]
    result = node("test/node.mjs", site / "model", CAT, tmp_path / "out.json", f"{x},{y}", dtype)
    assert result.returncode == 0, result.stderr
    output = json.loads((tmp_path / "out.json").read_text())
    mask = np.array(output["mask"], dtype=bool).reshape(output["height"], output["width"])
    assert output["dims"] == [1, 1, 3, 256, 256] and len(output["scores"]) == 3
    assert mask[y, x] and iou(mask, expected["point"]) >= 0.95


@pytest.mark.slow
@needs_node
@needs_chromium
def test_page_in_chromium(site, expected, tmp_path):
    x, y = expected["xy"]
    with served(site) as address:
        result = node("test/browser.mjs", address, CHROMIUM, tmp_path, CAT, f"{POINT[0]},{POINT[1]}", "?device=wasm")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert not report["problems"]
    for name in ("mask", "keys"):  # by a click, and by the keyboard alone
        mask = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) > 127
        assert mask[y, x] and iou(mask, expected["point"]) >= 0.95, name
    box = np.asarray(Image.open(tmp_path / "box.png").convert("L")) > 127
    assert iou(box, expected["box"]) >= 0.95
    cutout = Image.open(tmp_path / "cutout.png")
    assert cutout.mode == "RGBA" and cutout.size == (451, 300) and cutout.getpixel((x, y))[3] == 255
    assert (report["maskName"], report["cutoutName"]) == ("cat_mask.png", "cat_cutout.png")
    assert "notes.txt is not an image" in report["text"] and "broken.jpg is not an image" in report["broken"]
    assert report["messageAfterAnImage"] is None
    assert "huge.svg has 100 megapixels" in report["huge"] and "the limit is 64" in report["huge"]
    assert report["isolated"] and "WASM" in report["ready"] and "int8" in report["ready"] and " MB" in report["ready"]
    assert "encoded in" in report["encoded"] and "mask in" in report["hover"] and not report["savedByHover"]
    assert report["undoDisabled"] and report["clearDisabled"] and report["escapeClears"]
    assert "ready in" in report["offline"]


@pytest.mark.slow
@needs_node
@needs_chromium
@pytest.mark.parametrize(
    ("missing", "message"), [("model", "No model at /model/. Run “make web”"), ("vendor", "transformers.js is not in")]
)
def test_page_says_what_is_missing(tmp_path, missing, message):
    shutil.copytree(WEB, tmp_path / "site", ignore=shutil.ignore_patterns("node_modules", "images", "model", missing))
    with served(tmp_path / "site") as address:
        result = node("test/missing.mjs", address, CHROMIUM)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout
