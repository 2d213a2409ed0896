"""The page of `samlight app` and its API, with gradio. What they do is in the modules beside this one."""

import base64
import html
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..images.reading import ImageError
from ..masks.files import coco_document
from ..utils.messages import one_line
from .actions import apply
from .exports import WRITERS, export
from .limits import Limits, read_upload
from .segmenter import Segmenter
from .session import Session, SessionClosed, SessionError
from .store import SessionStore
from .view import TABLE_COLUMNS, image_uri, summary, table, view


logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
CSS = (_FOLDER / "page.css").read_text(encoding="utf-8")
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the user's machine
THEME = gr.themes.Soft(primary_hue="emerald", secondary_hue="emerald", neutral_hue="slate", **_FONTS)
_CLICKS, _EVERYTHING = "clicks", "everything"  # groups of events: a long one never blocks clicks
_EXAMPLES_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('pick', { index: Number(button.dataset.index) });
});
"""
_FAILED_JS = "() => { window.samlightFailed?.(); }"


class Page:
    """The page, its events, and the API's functions.

    Args:
        segmenter: The model.
        model_name: Shown in the header.
        limits: See `Limits`.
        thresholds: Default thresholds of predicted IoU and stability in everything mode.
        examples: Image files to try.
        points_per_side: Default grid of everything mode.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        model_name: str,
        limits: Limits,
        thresholds: tuple[float, float] = (0.88, 0.95),
        examples: Sequence[Path] = (),
        points_per_side: int = 16,
    ):
        self.limits, self.examples, self.model_name = limits, list(examples), model_name
        self.thresholds, self.points_per_side = thresholds, min(points_per_side, limits.points_per_side)
        self.device = str(segmenter.device)
        self.store = SessionStore(segmenter, limits, on_drop=self._forget)
        self.blocks = self._build()
        _add_api(self)
        # Without the REST routes that go past the queue: its length bounds what is done.
        self.blocks.queue(max_size=limits.queue, api_open=False)

    def open(self, key: str | None, path: str | Path, name: str | None = None) -> Session:
        """Read an image file and begin the session of a key.

        Raises:
            ValueError: For a file that cannot be used.
        """
        return self.store.open(key, lambda: read_upload(path, self.limits), name or Path(path).name)

    def open_upload(self, key: str | None, upload: dict) -> Session:
        """Begin a session with an upload, and remove its file from the server's disk.

        Args:
            key: Of the session.
            upload: gradio's data of a file, which is read as it came, not by gradio.

        Raises:
            ValueError: For a file that is no upload, or cannot be used.
        """
        # gradio checks only files that come with `meta`, and a caller may leave that out.
        path = Path(str(upload.get("path") or "")).resolve()
        if Path(self.source.GRADIO_CACHE).resolve() not in path.parents:
            raise ValueError("this file is no upload: upload it first.")
        try:
            return self.open(key, path, upload.get("orig_name"))
        finally:
            path.unlink(missing_ok=True)

    def _forget(self, key: str):
        """Drop what gradio keeps of a session: the last values of its components."""
        app = getattr(self.blocks, "app", None)
        if app is not None:
            app.state_holder.session_data.pop(key, None)

    def _build(self) -> gr.Blocks:
        limits = self.limits
        with gr.Blocks(
            title="SAM-Lightening", analytics_enabled=False, fill_width=True, delete_cache=(30, 60)
        ) as blocks:
            blocks.enable_monitoring = False
            gr.HTML(
                '<div class="sl-header"><h1>SAM-Lightening</h1><p>Click on an object to segment it. '
                f"<code>{html.escape(self.model_name)}</code> on <code>{html.escape(self.device)}</code></p></div>",
                apply_default_css=False,
            )
            with gr.Column(visible=True) as start:
                self.source = gr.Image(
                    sources=["upload", "clipboard", "webcam"], type="filepath", height=380, elem_id="sl-source",
                    label=f"Image: up to {limits.upload_mb} MB and {limits.pixels / 1e6:g} million pixels",
                )  # fmt: skip
                examples = gr.HTML(
                    _examples_html(self.examples, limits), js_on_load=_EXAMPLES_JS, visible=bool(self.examples),
                    apply_default_css=False,
                )  # fmt: skip
                self.source.async_move_resource_to_block_cache = _only_uploads(self.source)
            with gr.Column(visible=False) as work:
                stage = gr.HTML(
                    html_template=(_FOLDER / "stage.html").read_text(encoding="utf-8"),
                    js_on_load=(_FOLDER / "stage.js").read_text(encoding="utf-8"),
                    elem_id="sl-stage",
                    apply_default_css=False,
                )
                with gr.Accordion("Everything", open=False, elem_id="sl-everything"):
                    with gr.Row(equal_height=True):
                        sliders = [
                            gr.Slider(1, limits.points_per_side, self.points_per_side, step=1, label="Points per side"),
                            gr.Slider(0, 1, self.thresholds[0], step=0.01, label="Predicted IoU above"),
                            gr.Slider(0, 1, self.thresholds[1], step=0.01, label="Stability above"),
                        ]
                    with gr.Row():
                        run = gr.Button("Segment everything", variant="primary", elem_id="sl-run")
                        keep_all = gr.Button("Keep all as objects", elem_id="sl-keep-all")
                    rows = gr.Dataframe(
                        headers=list(TABLE_COLUMNS), interactive=False, show_label=False, max_height=300,
                        elem_id="sl-table",
                    )  # fmt: skip
            self._outputs = [start, work, self.source, stage, rows]
            clicks: dict[str, Any] = {
                "outputs": self._outputs, "api_visibility": "private", "concurrency_id": _CLICKS,
                "concurrency_limit": 4, "show_progress": "hidden",
            }  # fmt: skip
            # "multiple": a paste is an empty input first, and the image must not be left out while that is answered.
            self.source.input(self._on_upload, self.source, **{
                **clicks, "show_progress": "full", "trigger_mode": "multiple", "preprocess": False,
            })  # fmt: skip
            examples.pick(self._on_example, None, trigger_mode="multiple", **clicks)  # the last one counts
            stage.fresh(self._on_fresh, None, **clicks)
            stage.act(self._on_act, None, trigger_mode="multiple", **clicks).failure(
                None, None, None, js=_FAILED_JS, api_visibility="private"
            )
            keep_all.click(self._on_keep_all, None, **clicks)
            run.click(self._on_everything, sliders, **{
                **clicks, "concurrency_id": _EVERYTHING, "concurrency_limit": 1, "show_progress": "full",
                "show_progress_on": rows,
            })  # fmt: skip
            blocks.unload(self._on_unload)
        return blocks

    def _show(self, session: Session, message: str | None = None, rows: Any = None, **options) -> list:
        """Return the outputs that show a session."""
        value = view(session, **options) | {"message": message}
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            gr.skip(),
            value,
            gr.skip() if rows is None else rows,
        ]

    def _start_again(self, message: str | None = None) -> list:
        """Return the outputs that show the beginning, without an image."""
        if message:
            gr.Warning(html.escape(message), duration=12)
        return [gr.update(visible=True), gr.update(visible=False), None, None, []]

    def _leave(self) -> list:
        """Return the outputs that leave the page as it is: another image was opened meanwhile, or the tab closed."""
        return [gr.skip()] * len(self._outputs)

    def _on_upload(self, upload: dict | None, request: gr.Request) -> list:
        if upload is None:  # cleared
            return self._leave()
        return self._begin(lambda: self.open_upload(request.session_hash, upload))

    def _on_example(self, event: gr.EventData, request: gr.Request) -> list:
        index = event._data.get("index") if isinstance(event._data, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            return self._start_again("There is no such example.")
        return self._begin(lambda: self.open(request.session_hash, self.examples[index]))

    def _begin(self, opened: Callable[[], Session]) -> list:
        try:
            return self._show(opened(), with_image=True, rows=[])
        except SessionClosed:
            return self._leave()
        except ValueError as error:
            return self._start_again(one_line(error, 400))
        except (RuntimeError, MemoryError, OSError) as error:
            return self._start_again(_told(error))

    def _on_fresh(self, request: gr.Request) -> list:
        self.store.drop(request.session_hash)
        return self._start_again()

    def _on_unload(self, request: gr.Request):
        self.store.drop(request.session_hash)
        self._forget(request.session_hash or "")

    def _on_act(self, event: gr.EventData, request: gr.Request) -> list:
        data = event._data if isinstance(event._data, dict) else {}
        known = data.get("known")
        known = frozenset(number for number in known if isinstance(number, int)) if isinstance(known, list) else ()
        actions = data.get("actions", [])
        return self._do(request, lambda session: apply(session, actions), frozenset(known), data.get("image"))

    def _on_keep_all(self, request: gr.Request) -> list:
        return self._do(request, lambda session: session.keep_everything())

    def _do(
        self,
        request: gr.Request,
        action: Callable[[Session], Any],
        known: frozenset[int] = frozenset(),
        image: str | None = None,
    ) -> list:
        """Do something on the session of a request, and show it; an error is shown too, and changes nothing.

        Nothing is done, or shown, where the page has gone on to another image than that of the key `image`.
        """
        try:
            session = self.store.get(request.session_hash)
        except SessionError as error:
            return self._leave() if self.store.is_opening(request.session_hash) else self._start_again(one_line(error))
        if image is not None and image != session.key:
            return self._leave()
        before, message, download = session.everything, None, None
        session.sent_bytes = 0
        try:
            download = action(session)
        except ValueError as error:
            message = one_line(error, 400)
        except (RuntimeError, MemoryError, OSError) as error:
            message = _told(error)
        except SessionClosed:
            pass
        if session.is_closed:  # no answer to what the page shows now
            if self.store.was_dropped(request.session_hash):
                return self._start_again("the image was dropped, to make room. Open it again.")
            return self._leave()
        found = session.everything
        rows = None if found is before else [] if found is None else table(found)
        outputs = self._show(session, message, rows, known=known)
        if download is not None:
            data = base64.b64encode(download.content).decode()
            session.sent_bytes = len(data)
            outputs[3]["download"] = {"name": download.name, "media_type": download.media_type, "data": data}
        return outputs

    def _on_everything(
        self,
        points_per_side,
        pred_iou_thresh,
        stability_score_thresh,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> list:
        def run(session: Session):
            total, done = points_per_side**2, 0

            def tell(num_points: int):
                nonlocal done
                done += num_points
                progress((min(done, total), total), unit="points")

            session.run_everything(points_per_side, pred_iou_thresh, stability_score_thresh, tell)

        return self._do(request, run)


def _only_uploads(source: gr.Image) -> Callable:
    """Return how gradio gets the files of an input: uploads alone. It would also download any address."""
    move = source.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if "://" in str(path):
            raise gr.Error("addresses are not read: upload the file.", print_exception=False)
        return await move(path)

    return move_upload


def _told(error: Exception) -> str:
    """Log an error that is not the user's, and return what the user is told."""
    logger.warning("the app could not answer: %s: %s", type(error).__name__, one_line(error))
    return f"the server could not do this ({type(error).__name__}). Try again, or with a smaller image."


def _examples_html(paths: Sequence[Path], limits: Limits) -> str:
    buttons = []
    for index, path in enumerate(paths):
        name = html.escape(path.stem)
        thumbnail = image_uri(read_upload(path, limits), 240)
        buttons.append(
            f'<button type="button" data-index="{index}" title="{name}"><img src="{thumbnail}" alt="{name}"></button>'
        )
    return f'<p class="sl-hint">Or try one of these:</p><div class="sl-examples">{"".join(buttons)}</div>'


def _add_api(page: Page):
    """Add the API: functions for gradio_client, with the names, types and docstrings that its users see."""

    def run(request: gr.Request, action: Callable[[Session], Any]):
        try:
            return action(page.store.get(request.session_hash))
        except (ValueError, ImageError) as error:
            raise gr.Error(one_line(error), print_exception=False) from error

    def open_image(image: dict | None, request: gr.Request) -> dict:
        """Open an image; the other functions then work on it, for this client alone."""
        if image is None:
            raise gr.Error("there is no image: give a file.", print_exception=False)
        try:
            return summary(page.open_upload(request.session_hash, image))
        except SessionClosed as error:
            raise gr.Error("another image was opened meanwhile.", print_exception=False) from error
        except ValueError as error:
            raise gr.Error(one_line(error), print_exception=False) from error

    def prompt(
        points: list[list[float]],
        labels: list[int],
        box: list[float] | None = None,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:
        """Segment one object. Points are [x, y] in pixels of the image, with a label each: 1 on the object, 0 beside
        it. The box is [x1, y1, x2, y2] or null. Returns candidates with COCO's run lengths, scores and boxes."""
        if not isinstance(labels, list) or not isinstance(points, list) or len(labels) != len(points):
            raise gr.Error("points and labels must be lists of the same length.", print_exception=False)
        triples = [[*point, label] if isinstance(point, list) else [] for point, label in zip(points, labels)]
        return run(request, lambda session: (session.set_prompt(triples, box), summary(session))[1])

    def choose(candidate: int, request: gr.Request) -> dict:
        """Choose a candidate by its number, from 0."""
        return run(request, lambda session: (session.choose(candidate), summary(session))[1])

    def undo(request: gr.Request) -> dict:
        """Go back one step."""
        return run(request, lambda session: (session.undo(), summary(session))[1])

    def clear(request: gr.Request) -> dict:
        """Drop the current prompt and the result of everything mode."""
        return run(request, lambda session: (session.clear(), summary(session))[1])

    def keep(name: str = "", request: gr.Request = None) -> dict:  # type: ignore[assignment]
        """Add the chosen mask to the list of objects, under a name, and begin a new object."""
        return run(request, lambda session: (session.keep(name), summary(session))[1])

    def everything(
        points_per_side: int = page.points_per_side, pred_iou_thresh: float = page.thresholds[0],
        stability_score_thresh: float = page.thresholds[1], request: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:  # fmt: skip
        """Segment everything in the image. Returns COCO's document, with predicted IoU and stability."""

        def segment(session: Session):
            result = session.run_everything(points_per_side, pred_iou_thresh, stability_score_thresh)
            return coco_document(session.name, session.image.size, result)

        try:
            return run(request, segment)
        except SessionClosed as error:
            raise gr.Error("the session was closed.", print_exception=False) from error

    def download(file_format: str, request: gr.Request) -> dict:
        """Return the kept objects and the current mask as a file: name, media_type and data in base64."""
        file = run(request, lambda session: export(session, file_format))
        return {"name": file.name, "media_type": file.media_type, "data": base64.b64encode(file.content).decode()}

    download.__doc__ = f"{download.__doc__} Formats: {', '.join(WRITERS)}."
    with page.blocks:
        # gr.api takes no files: an input of the page and a hidden output take them.
        answer, button = gr.JSON(visible=False), gr.Button(visible=False)
        clicks = {"concurrency_id": _CLICKS, "concurrency_limit": 4}
        button.click(open_image, page.source, answer, api_name="open_image", preprocess=False, **clicks)
        for function in (prompt, choose, undo, clear, keep, download):
            gr.api(function, api_name=function.__name__, **clicks)
        gr.api(everything, api_name="everything", concurrency_id=_EVERYTHING, concurrency_limit=1)
