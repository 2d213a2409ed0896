"""Small datasets on disk for the tests of the readers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


WIDTH, HEIGHT = 40, 30


def jpeg(width=WIDTH, height=HEIGHT, seed=0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def png(pixels: np.ndarray, mode=None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, "PNG")
    return file.getvalue()


def box_mask(x=5, y=4, width=10, height=8, image=(HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(image, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def rle(mask: np.ndarray) -> dict:
    """Encode a mask as compressed RLE, with counts as a string, as in the JSON files of SA-1B."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def uncompressed_rle(mask: np.ndarray) -> dict:
    """Encode a mask as uncompressed RLE with a plain loop: runs of 0 and 1 in turn, column by column."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def annotation(identifier=1, mask=None, **fields) -> dict:
    return {"id": identifier, "segmentation": rle(box_mask() if mask is None else mask), **fields}


def sa1b_json(*annotations, width=WIDTH, height=HEIGHT) -> bytes:
    return json.dumps({"image": {"width": width, "height": height}, "annotations": list(annotations)}).encode()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def coloured_objects(seed: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw three ellipses on black, one in each channel, which after resizing is the object's share of a pixel.

    Returns:
        Pixels, uint8 (H, W, 3), and masks, bool (3, H, W).
    """
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    masks = np.zeros((3, height, width), bool)
    for i, mask in enumerate(masks):
        x, y = (i + 0.5) * width / 3, generator.uniform(0.4, 0.6) * height
        across, down = generator.uniform(0.1, 0.15) * width, generator.uniform(0.2, 0.38) * height
        mask[:] = ((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 < 1
    return np.ascontiguousarray(masks.transpose(1, 2, 0)) * np.uint8(255), masks


def coloured_tar(path: Path, sizes: list[tuple[int, int]]) -> Path:
    """Write a tar of SA-1B with a lossless image of `coloured_objects` for each (width, height)."""
    members = {}
    for i, (width, height) in enumerate(sizes):
        pixels, masks = coloured_objects(i, width, height)
        members[f"sa_{i}.png"] = png(pixels)
        members[f"sa_{i}.json"] = sa1b_json(*(annotation(*a) for a in enumerate(masks)), width=width, height=height)
    return write_tar(path, members)


def write_coco(folder: Path, entries: list, annotations: list, images: dict[str, bytes]) -> tuple[Path, Path]:
    """Write a data set in COCO format; return the annotation file and the folder of images."""
    for name, content in images.items():
        file = folder / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations}))
    return path, folder / "pictures"


def counts(report) -> tuple[dict[str, int], dict[str, int]]:
    """Return the counts of skipped images and of skipped instances by reason."""
    return tuple({r: s.count for r, s in kind.items()} for kind in (report.images, report.instances))
