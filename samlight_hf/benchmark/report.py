"""Reports of a benchmark: targets and how far each is met, tables for the terminal, and the plot."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..inference.crops import DEFAULT_PRED_IOU_THRESH
from ..utils.messages import text_table
from .attention import BOTH
from .candidates import LEAST_IOU
from .clicks import WAYS
from .encoders import DILATED, EAGER, FULL, GRAPH, OPTIMIZED, OURS, SAME_GROUPS
from .start import COLD, WARM
from .sustained import PAUSE, WORK


Row = dict
Rows = list[Row]


class Target(NamedTuple):
    """A target for one H100 in bfloat16: at most or at least `limit`. `value` finds the number in the rows, or None."""

    name: str
    limit: float
    unit: str
    at_most: bool
    value: Callable[[Rows], float | None]

    def check(self, rows: Rows) -> Row:
        """Return a row for a table and for JSON: the value, the limit, and whether it is met or by which share it is
        missed.
        """
        value = self.value(rows)
        sign = "<=" if self.at_most else ">="
        result = {"target": self.name, "value": value, "limit": self.limit, "sign": sign, "unit": self.unit}
        if value is None:
            return {**result, "met": None, "says": "not measured"}
        met = value <= self.limit if self.at_most else value >= self.limit
        return {**result, "met": met, "says": "met" if met else f"missed by {abs(value / self.limit - 1):.1%}"}


def _values(rows: Rows, key: str, **wanted) -> list[float]:
    """Return the values of `key` in the rows that could run and have the wanted values."""
    return [row[key] for row in rows if key in row and all(row.get(name) == value for name, value in wanted.items())]


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _encoder_ms(rows: Rows) -> float | None:
    return _least(_values(rows, "ms", part="encoder", batch_size=1))


def _times_vit_h(dtype: str, attention: str) -> Callable[[Rows], float | None]:
    """Return the ratio to transformers' SAM ViT-H, not compiled: the faster of a call and a graph's replay."""
    peer = {"part": "peers", "model": "SAM ViT-H", "batch_size": 1, "attn_implementation": attention, "dtype": dtype}
    return lambda rows: _ratio(
        _least(ms for mode in (EAGER, GRAPH) for ms in _values(rows, "ms", **peer, mode=mode)), _encoder_ms(rows)
    )


def _prompt_ms(rows: Rows) -> float | None:
    """Return the time at the slowest image size of the mode that is fastest there; single steps are left out."""
    return _least(_slowest_prompt(rows).values())


def _prompt_memory(rows: Rows) -> float | None:
    """Return the memory for the smallest image in the mode of `_prompt_ms`, so that one mode meets both targets."""
    slowest = _slowest_prompt(rows)
    if not slowest:
        return None
    fastest = min(slowest, key=lambda mode: slowest[mode])
    return _least(_values(rows, "serving_memory_mb", part="prompt", mode=fastest))


def _slowest_prompt(rows: Rows) -> dict[str, float]:
    whole = [row for row in rows if row.get("part") == "prompt" and "step" not in row and "ms" in row]
    return {mode: max(_values(whole, "ms", mode=mode)) for mode in {row["mode"] for row in whole}}


def _resolution_gain(rows: Rows) -> float | None:
    return _over_dilated(rows, FULL)


def _dilation_overhead(rows: Rows) -> float | None:
    undilated = _over_dilated(rows, SAME_GROUPS)
    return None if undilated is None else 100 * (1 / undilated - 1)


def _over_dilated(rows: Rows, pattern: str) -> float | None:
    """Return an encoder's time divided by the dilated one's: optimized where that was measured, otherwise graphed."""
    largest = {"part": "resolution", "image_size": 4096}
    for mode in (OPTIMIZED, GRAPH):
        other, dilated = (_least(_values(rows, "ms", **largest, mode=mode, pattern=p)) for p in (pattern, DILATED))
        if other and dilated:
            return other / dilated
    return None


def _backward(rows: Rows) -> float | None:
    """Return the larger ratio of a training step's two kinds of layer, as the dispatcher runs them."""
    shapes = ([16, 2048, 12, 64], [128, 512, 6, 64])
    row = {"part": "attention", "backend": "auto", "direction": BOTH}
    return _most(_least(_values(rows, "backward_over_forward", **row, shape_blhd=shape)) for shape in shapes)


def _equal(key: str, choose: Callable) -> Callable[[Rows], float | None]:
    return lambda rows: choose(_values(rows, key, part="equality", mode=OPTIMIZED, against="eager, float32"))


def _least_iou(rows: Rows) -> float | None:
    """Return the least IoU of all masks of everything mode at its default thresholds, in `optimize`'s default dtype."""
    wanted = {"part": "candidates", "mode": OPTIMIZED, "dtype": "bfloat16", "pred_iou_thresh": DEFAULT_PRED_IOU_THRESH}
    return _least(_values(rows, "mask_iou_min", **wanted))


def _start(key: str, cache: str) -> Callable[[Rows], float | None]:
    return lambda rows: _most(_values(rows, key, part="start", mode=cache))


def _boxes(count: int) -> Callable[[Rows], float | None]:
    return lambda rows: _least(_values(rows, "ms", part="boxes", num_boxes=count))


def _generation(key: str, what: str) -> Callable[[Rows], float | None]:
    return lambda rows: _least(_values(rows, key, part="generation", what=what, points_per_side=32))


def _optimized_ms(rows: Rows) -> float | None:
    return _least(_values(rows, "ms", part="encoder", batch_size=1, mode=OPTIMIZED))


def _clicks(rows: Rows) -> float | None:
    """Return the rate in the way that `samlight evaluate` takes."""
    found = (_values(rows, "images_per_second_of_next_clicks", part="clicks", mode=m, picture_height=683) for m in WAYS)
    return _least(next(filter(None, found), []))


def _best_throughput(rows: Rows) -> float | None:
    return _most(_values(rows, "images_per_second", part="encoder"))


def _best_rate(work: str) -> Callable[[Rows], float | None]:
    return lambda rows: _most(_values(rows, "images_per_second", part="sustained", work=work, dtype="bfloat16"))


def _training_throughput(rows: Rows) -> float | None:
    return _most(_values(rows, "images_per_second", part="training", batch_size=16))


TARGETS = (
    Target("encoder, batch 1", 0.33, "ms", True, _encoder_ms),
    Target("SAM ViT-H, sdpa, bfloat16: times as long", 90, "x", False, _times_vit_h("bfloat16", "sdpa")),
    Target("SAM ViT-H, eager, float32: times as long", 400, "x", False, _times_vit_h("float32", "eager")),
    Target("encoder, best batch", 3800, "images/s", False, _best_throughput),
    Target("encoder, best batch, after a pause", 3800, "images/s", False, _best_rate(PAUSE)),
    Target("encoder, best batch, in continuous work", 3800, "images/s", False, _best_rate(WORK)),
    Target("image in to mask of one point", 1.0, "ms", True, _prompt_ms),
    Target("memory, one image (1024 px) and one prompt", 120, "MB", True, _prompt_memory),
    Target("4096 px: full attention against w=4096, r=4", 7, "x", False, _resolution_gain),
    Target("4096 px: dilation's overhead over the same groups", 5, "%", True, _dilation_overhead),
    Target("attention, backward against forward", 3.5, "x", True, _backward),
    Target("training step of the encoder, batch 16", 350, "images/s", False, _training_throughput),
    Target("embeddings, relative error to float32", 1e-2, "", True, _equal("embedding_error", _most)),
    Target("masks, lowest mean IoU of a photograph", 0.99, "", False, _equal("mask_iou_mean", _least)),
    Target("masks of everything mode, lowest IoU of any", LEAST_IOU, "", False, _least_iou),
    Target("first use in a process, cold cache", 10, "s", True, _start("optimize_seconds", COLD)),
    Target("first use in a process, warm cache", 1, "s", True, _start("optimize_seconds", WARM)),
    Target("memory of optimize's graphs", 450, "MB", True, _start("report_graph_memory_mb", WARM)),
    *(Target(f"{count} boxes on an encoded image", limit, "ms", True, _boxes(count))
      for count, limit in ((4, 0.35), (16, 0.8), (64, 1.5), (256, 6.0))),
    Target("optimize's encoder, batch 1", 0.39, "ms", True, _optimized_ms),
    Target("everything mode, one image, 32x32 points", 25, "ms", True, _generation("ms", "one image")),
    Target("everything mode, a folder", 45, "images/s", False, _generation("images_per_second", "a folder")),
    Target("clicks of 32 instances, 683x1024", 30, "images/s", False, _clicks),
)  # fmt: skip


def check_targets(rows: Rows) -> Rows:
    return [target.check(rows) for target in TARGETS]


def targets_table(checked: Rows) -> str:
    lines = [
        [row["target"], _number(row["value"]), f"{row['sign']} {row['limit']:g} {row['unit']}".strip(), row["says"]]
        for row in checked
    ]
    return format_table(["target", "value", "wanted", ""], lines)


def encoders_table(rows: Rows) -> str | None:
    """Return a table of image encoders: ms and images a second by batch size; memory and GFLOP at the smallest."""
    encoders = [row for row in rows if row.get("part") in ("encoder", "peers") and "ms" in row]
    if not encoders:
        return None
    sizes = sorted({row["batch_size"] for row in encoders})
    lines: dict[tuple, Row] = {}
    for row in encoders:
        name = row["model"], row["mode"], row.get("attn_implementation") or row.get("memory_format") or "", row["dtype"]
        lines.setdefault(name, {})[row["batch_size"]] = row
    table = []
    for name, by_size in lines.items():
        first = by_size[min(by_size)]
        times = [_number(by_size.get(size, {}).get("ms")) for size in sizes]
        best = max(row["images_per_second"] for row in by_size.values())
        fraction = max(row.get("ceiling_fraction", 0) for row in by_size.values())
        table.append(
            [*name, *times, _number(best), _number(first.get("peak_memory_mb")),
             _number(first["gflop"] / first["batch_size"]), f"{fraction:.1%}" if fraction else "-"]
        )  # fmt: skip
    heads = ["encoder", "mode", "", "dtype", *(f"ms, batch {size}" for size in sizes)]
    return format_table([*heads, "images/s", "peak MB", "GFLOP", "of ceiling"], table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a table: columns as wide as their longest entry, flush right where they hold numbers."""
    numeric = [column for column in range(len(heads)) if all(line[column][:1] in "-0123456789" for line in lines)]
    return text_table([heads, *lines], numeric, rule=True)


def plot_resolution(rows: Rows, path: Path, device: str) -> bool:
    """Plot time against resolution as a PNG: full attention, dilated, and the time of the arithmetic alone.

    Returns:
        False where there is nothing to draw.

    Raises:
        ImportError: without matplotlib.
    """
    measured = [row for row in rows if row.get("part") == "resolution" and "ms" in row]
    if not measured:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for pattern, color in ((FULL, "C3"), (DILATED, "C0")):
        for mode, marker in ((EAGER, "s"), (GRAPH, "s"), (OPTIMIZED, "o")):
            points = sorted(
                (r["image_size"], r["ms"]) for r in measured if (r["pattern"], r["mode"]) == (pattern, mode)
            )
            if points:
                line = "-" if mode == OPTIMIZED else "--"
                axes.plot(*zip(*points), line, marker=marker, color=color, label=f"{pattern}, {mode}")
        floors = sorted({(r["image_size"], r["floor_ms"]) for r in measured if r["pattern"] == pattern})
        if floors:
            axes.plot(*zip(*floors), ":", color=color, label=f"{pattern}, floor by arithmetic")
    axes.set(xscale="log", yscale="log", xlabel="side of the image [px]", ylabel="time of the encoder, batch 1 [ms]")
    axes.set_xticks(sorted({row["image_size"] for row in measured}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{OURS}, {measured[0]['dtype']}, {device}")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
