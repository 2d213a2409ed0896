"""The plots of a report. They need matplotlib (the extra `eval`), which is imported only to draw."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.atomic_files import atomic_write
from .files import is_missing, slug
from .statistics import SIZES, ModelResult, values_of


_MASK_TAKEN = {"single": "the single mask", "predicted": "best predicted IoU", "oracle": "best true IoU (oracle)"}
# Okabe and Ito's colors, which color-blind readers can distinguish.
_COLOURS = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E8", "axes.axisbelow": True,
    "axes.edgecolor": "#78787F", "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip


def require_matplotlib():
    """Raise ImportError, naming the extra to install, where matplotlib is missing. To be called before a long run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'samlight-hf[eval]', or leave the plots out.") from error


def protocols_of(results: Sequence[ModelResult]) -> list[str]:
    return list(dict.fromkeys(protocol for result in results for protocol in result.protocols))


def names_of(protocol: str) -> tuple[str, str]:
    prompt, _, taken = protocol.partition("/")
    return prompt, _MASK_TAKEN.get(taken, taken or "not said")


def write_plots(folder: Path, results: Sequence[ModelResult]) -> dict[str, str]:
    """Draw the plots that have data; return for each plot the name of its file, or the reason why there is none."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no window, no global state, Agg by itself

    notes: dict[str, str] = {}
    for name, draw in {
        "IoU histogram": _plot_histogram, "IoU by object size": _plot_sizes, "IoU by clicks": _plot_clicks,
        "latency against mIoU": _plot_latency,
    }.items():  # fmt: skip
        with matplotlib.rc_context(STYLE):
            figure = Figure(layout="constrained")
            notes[name] = draw(figure, results)
            if not notes[name]:
                notes[name] = f"{slug(name.lower())}.png"
                atomic_write(folder / notes[name], partial(figure.savefig, format="png"))
    return notes


def _plot_histogram(figure, results: Sequence[ModelResult]) -> str:
    """Draw the share of instances by IoU, a panel for each prompt. Return why there is none, or "", as all plots do."""
    edges = np.linspace(0, 1, 26)
    panels = _panels(figure, _by_prompt(results), results)
    for axes, protocol in panels:
        for result, colour in zip(results, itertools.cycle(_COLOURS)):
            if (mean := result.score(protocol)["mean"]) is not None:
                counts, _ = np.histogram(values_of(result.records, "iou", [protocol]), edges)
                percent = 100 * counts / counts.sum()
                axes.stairs(percent, edges, fill=True, color=colour, alpha=0.12)
                axes.stairs(percent, edges, color=colour, linewidth=1.6)
                axes.axvline(mean, color=colour, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set(xlim=(0, 1), xlabel="IoU (dashed: mean)", ylabel="instances (%)")
    return "" if panels else "no model has a mean IoU"


def _plot_sizes(figure, results: Sequence[ModelResult]) -> str:
    panels = _panels(figure, _by_prompt(results), results)
    for axes, protocol in panels:
        counts = [{f"{r.score(protocol, 'by_size', size)['n']:,}" for r in results} for size in SIZES]
        labels = [f"{size}\nn = {min(n)}" if len(n) == 1 else f"{size}\nn differs" for size, n in zip(SIZES, counts)]
        axes.set(xticks=range(len(SIZES)), xticklabels=labels, xlim=(-0.5, 2.5), ylim=(0, 1), ylabel="mean IoU")
        axes.grid(False, axis="x")
        for result, colour, shift in zip(results, itertools.cycle(_COLOURS), _shifts(results, 0.12)):
            scores = [result.score(protocol, "by_size", size) for size in SIZES]
            _error_bars(axes, np.arange(len(SIZES)) + shift, scores, colour, linestyle="none")
    return "" if panels else "no model has a mean IoU"


def _plot_clicks(figure, results: Sequence[ModelResult]) -> str:
    """Draw the mean IoU by number of clicks, a panel for each way of choosing the mask."""
    by_choice: dict[str, dict[int, str]] = {}
    for protocol in protocols_of(results):
        if match := re.fullmatch(r"(\d+) clicks?(?:/.*)?", protocol):
            by_choice.setdefault(names_of(protocol)[1], {})[int(match[1])] = protocol
    by_choice = {taken: by_clicks for taken, by_clicks in by_choice.items() if len(by_clicks) > 1}
    panels = _panels(figure, by_choice, results)
    for axes, taken in panels:
        clicks = sorted(by_choice[taken])
        for result, colour, shift in zip(results, itertools.cycle(_COLOURS), _shifts(results, 0.06)):
            scores = [result.score(by_choice[taken][number]) for number in clicks]
            _error_bars(axes, np.array(clicks) + shift, scores, colour)
        axes.set(xticks=clicks, ylim=(0, 1), xlabel="clicks", ylabel="mean IoU")
    return "" if panels else "fewer than two numbers of clicks were evaluated"


def _plot_latency(figure, results: Sequence[ModelResult]) -> str:
    latency: dict[str, float | None] = {}
    for result in results:
        latencies = result.settings.get("latency_ms") or {}
        parts: list[Any] = [latencies.get(part) for part in ("encoder", "decoder")]
        latency[result.name] = None if any(map(is_missing, parts)) else sum(parts)
    if not any(latency.values()):
        return "no model has the latencies of both encoder and decoder"
    panels = _panels(figure, _by_prompt(results), results)
    for axes, protocol in panels:
        axes.set(xscale="log", ylim=(0, 1), xlabel="latency, encoder + decoder (ms, log scale)", ylabel="mean IoU")
        known = [milliseconds for milliseconds in latency.values() if milliseconds]
        axes.set_xlim(min(known) / 2, max(known) * max(4, (max(known) / min(known)) ** 0.4))  # room for the last label
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        for result, colour in zip(results, itertools.cycle(_COLOURS)):
            if (ms := latency[result.name]) and (mean := result.score(protocol)["mean"]) is not None:
                _error_bars(axes, [ms], [result.score(protocol)], colour)
                text = f"{mean:.3f}\n{ms:,.0f} ms" if ms >= 100 else f"{mean:.3f}\n{ms:.3g} ms"
                axes.annotate(text, (ms, mean), (9, 0), textcoords="offset points", va="center", fontsize=9)
    absent = ", ".join(name for name, milliseconds in latency.items() if not milliseconds)
    if absent:
        figure.supxlabel(f"no latency was measured for {absent}", fontsize=9)
    return "" if panels else "no model has a mean IoU"


def _panels(figure, keys: Iterable[str], results: Sequence[ModelResult]) -> list[tuple]:
    """Create axes for each key, under a legend of all models; return (axes, key) pairs.

    The panel of a protocol names the models that have no score for it.
    """
    from matplotlib.lines import Line2D

    keys = list(keys)
    columns = len(keys) if len(keys) <= 3 else 2
    rows = math.ceil(len(keys) / columns) if keys else 0
    width = max(6.4, 4.4 * columns)
    figure.set_size_inches(width, max(1, 2.9 * rows + 0.5))
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    panels = [(figure.add_subplot(rows, columns, place + 1), key) for place, key in enumerate(keys)]
    for axes, key in panels:
        protocol = key in protocols_of(results)
        axes.set_title(" · ".join(names_of(key)) if protocol else key)
        if absent := [r.name for r in results if protocol and r.score(key)["mean"] is None]:
            axes.text(0.02, 0.97, f"no number: {', '.join(absent)}", transform=axes.transAxes, va="top", fontsize=8)
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=5, label=result.name)
        for result, colour in zip(results, itertools.cycle(_COLOURS))
    ]
    entry = 0.8 + 0.08 * max(len(result.name) for result in results)  # inches, about
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, int(width / entry)))
    return panels


def _shifts(results: Sequence[ModelResult], step: float) -> np.ndarray:
    """Return offsets that draw the points of the models side by side."""
    return step * (np.arange(len(results)) - (len(results) - 1) / 2)


def _error_bars(axes, positions: Sequence[float], scores: Sequence[Mapping], colour: str, linestyle: str = "-"):
    """Draw means with their intervals. A score without a mean leaves a gap, one without an interval has no bar."""
    mean, low, high = np.array([[score[k] for k in ("mean", "low", "high")] for score in scores], dtype=float).T
    bars = np.nan_to_num(np.stack([mean - low, high - mean])).clip(min=0)
    axes.errorbar(positions, mean, bars, color=colour, marker="o", markersize=5, linestyle=linestyle, capsize=3)


def _by_prompt(results: Sequence[ModelResult]) -> list[str]:
    """Choose one protocol for each prompt; for clicks, which are ambiguous, the mask of the best predicted IoU."""
    chosen: dict[str, str] = {}
    for protocol in protocols_of(results):
        prompt, _, taken = protocol.partition("/")
        if prompt not in chosen or ("click" in prompt and taken == "predicted"):
            chosen[prompt] = protocol
    return [p for p in chosen.values() if any(result.score(p)["mean"] is not None for result in results)]
