"""Learning curves of a stage as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.plots import STYLE
from ..utils.atomic_files import atomic_write


# Title of a panel -> prefixes of the names that are drawn in it.
_PANELS = {
    "loss": ("loss",),
    "loss of each layer": ("layer_loss/",),
    "layer weights": ("layer_weight/",),
    "cosine with the teacher": ("embedding_cosine", "eval_embedding_cosine"),
    "IoU in training": ("iou/",),
    "mIoU on held-out images": ("eval_box", "eval_point"),
    "images a second": ("images_per_second",),
    "learning rate": ("learning_rate",),
}


def plot_learning_curves(log_history: Sequence[dict], path: Path, title: str):
    """Draw a panel for each kind of logged value, over the optimizer steps.

    Args:
        log_history: `state.log_history` of a Trainer.
        path: the PNG to write. Nothing is written where nothing was logged.
        title: title of the figure.
    """
    import matplotlib

    curves: dict[str, dict[str, list]] = {}
    for panel, prefixes in _PANELS.items():
        for entry in log_history:
            for name, value in entry.items():
                if name == "loss" if prefixes == ("loss",) else name.startswith(prefixes):
                    curves.setdefault(panel, {}).setdefault(name, []).append((entry["step"], value))
    if not curves:
        return
    with matplotlib.rc_context(STYLE):
        figure = _draw(curves, title)
        atomic_write(path, lambda aside: figure.savefig(aside, format="png"))


def _draw(curves: dict[str, dict[str, list]], title: str):
    from matplotlib.figure import Figure

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    for place, (panel, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for name, points in lines.items():
            axes.plot(*zip(*points), label=name, linewidth=1.4, marker="o" if len(points) < 12 else None, markersize=3)
        axes.set_title(panel)
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(fontsize=8)
    return figure
