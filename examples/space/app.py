"""A page on which clicks become masks: the Space of org/sam-lightening, written by `samlight publish --space`.

`python app.py` runs it on any machine, for this machine alone. SAMLIGHT_MODEL names another model or a folder.
"""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from samlight_hf.app.segmenter import Segmenter
from samlight_hf.app.server import serve
from samlight_hf.loading import load_model


MODEL = os.environ.get("SAMLIGHT_MODEL", "org/sam-lightening")
REVISION = None  # a commit, or None: the newest
THRESHOLDS = (0.88, 0.95)  # of predicted IoU and stability, to begin with
IS_SPACE = "SPACE_ID" in os.environ

if __name__ == "__main__":
    if Path(MODEL).is_dir():
        folder = MODEL
    else:  # weights and settings alone: no code is downloaded
        folder = snapshot_download(MODEL, revision=REVISION, allow_patterns=["*.json", "*.safetensors"])
    model, processor = load_model(folder)
    serve(
        Segmenter(model, processor),
        MODEL,
        host="0.0.0.0" if IS_SPACE else "127.0.0.1",
        port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
        thresholds=THRESHOLDS,
        examples=sorted(Path(__file__).parent.glob("images/*.jpg")),
        points_per_side=8 if model.device.type == "cpu" else 32,
    )
