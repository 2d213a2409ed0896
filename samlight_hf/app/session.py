"""What one user does on one image: prompts, candidates, kept objects, undo. Knows nothing of the page."""

import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import PurePath

import numpy as np
from PIL import Image

from ..inference.crops import MaskGenerationSettings
from ..masks.drawing import COLOURS
from ..masks.results import GeneratedMasks
from ..masks.rle import RunLengthMasks
from .limits import Limits, short_name
from .segmenter import Segmenter
from .state import KeptObject, Prompt, State


class SessionError(ValueError):
    """Something that a user asked for and that cannot be done; the message says what to do instead."""


class SessionClosed(Exception):
    """Raised where a session ends while everything mode runs on its image."""


class Session:
    """One user's image, and what was done on it. Methods may be called from several threads.

    Args:
        segmenter: The model.
        image: RGB.
        name: The image's file name.
        limits: Of clicks, objects and steps.

    Raises:
        ValueError: For an image that is too thin for the model.
    """

    def __init__(self, segmenter: Segmenter, image: Image.Image, name: str, limits: Limits):
        self.segmenter, self.image, self.limits = segmenter, image, limits
        self.name = short_name(name)
        self.key = uuid.uuid4().hex  # names the image in the page
        self.sent_bytes = 0  # of the last file that was downloaded, which gradio keeps as a component's value
        self.lock = threading.RLock()
        self.is_closed = False
        self.decode_ms: float | None = None
        self.everything_ms: float | None = None
        self._past: list[State] = []
        self._state = State()
        self._next_number = 1
        start = time.perf_counter()
        self.encoded = segmenter.encode(image)
        self.encode_ms = 1000 * (time.perf_counter() - start)

    @property
    def stem(self) -> str:
        """The image's name without its suffix, for names of files."""
        return PurePath(self.name).stem or "image"

    @property
    def state(self) -> State:
        """The present state, with its candidates."""
        with self.lock:
            if self._state.prompt and self._state.candidates is None:
                self._state = self._decoded(self._state)
            return self._state

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    @property
    def everything(self) -> GeneratedMasks | None:
        """The present result of everything mode."""
        return self._state.everything

    @property
    def num_bytes(self) -> int:
        """The memory that the session takes, without Python's own."""
        embedding, states = self.encoded.embedding, [*self._past, self._state]
        logits = {id(part): part.nbytes for state in states for part in state.arrays}
        width, height = self.image.size
        held = 3 * width * height + self.sent_bytes + embedding.numel() * embedding.element_size()
        return held + sum(logits.values())

    def close(self):
        """End the session: everything mode stops at its next batch of points."""
        self.is_closed = True

    def add_points(self, points: Sequence[Sequence[float]]):
        """Add clicks to the current object; each is a step of its own for undo, and they are decoded once.

        Args:
            points: x, y and label, 1 on the object and 0 beside it.

        Raises:
            SessionError: For too many points, and for points beside the object where nothing is on it.
            ValueError: For points outside the image and other labels.
        """
        with self.lock:
            states: list[State] = []
            before = self.state
            logits = before.chosen_logits
            feedback = None if logits is None else logits.copy()  # not a view of all candidates' logits
            for point in points:
                x, y, label = _numbers("a point", point, 3)
                if label not in (0, 1):
                    raise SessionError(f"the label {label:g} of a point must be 1, on the object, or 0, beside it.")
                self._check_inside(x, y)
                last = states[-1] if states else before
                prompt = Prompt((*last.prompt.points, (x, y, int(label))), last.prompt.box_xyxy)
                if prompt.box_xyxy is None and not any(point[2] for point in prompt.points):
                    raise SessionError("click on the object first: there is nothing yet that a background click cuts.")
                if len(prompt.points) > self.limits.clicks:
                    raise SessionError(
                        f"{self.limits.clicks} clicks are the most for one object. Keep it, clear it, or draw a box."
                    )
                states.append(replace(last, prompt=prompt, feedback=feedback, candidates=None, chosen=None))
            self._advance(states)

    def set_box(self, box_xyxy: Sequence[float]):
        """Replace the box of the current object. Its corners may be given in any order.

        Raises:
            ValueError: For a box that has no area or lies outside the image.
        """
        x1, y1, x2, y2 = _numbers("a box", box_xyxy, 4)
        box = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        with self.lock:
            before = self.state
            prompt = Prompt(before.prompt.points, box)
            self._advance([replace(before, prompt=prompt, feedback=None, candidates=None, chosen=None)])

    def set_prompt(self, points: Sequence[Sequence[float]], box_xyxy: Sequence[float] | None):
        """Replace the whole prompt of the current object, in one step."""
        with self.lock:
            earlier, past = self._state, self._past
            try:
                self._state = replace(earlier, prompt=Prompt(), feedback=None, candidates=None, chosen=None)
                if box_xyxy is not None:
                    self.set_box(box_xyxy)
                if points:
                    self.add_points(points)
                if not self._state.prompt:
                    raise SessionError("there is no prompt: give points, a box, or both.")
            except BaseException:  # a lack of memory, too
                self._state, self._past = earlier, past
                raise
            self._past = [*past, replace(earlier, candidates=None)][-self.limits.steps :]

    def choose(self, index: int):
        """Choose a candidate; further clicks refine it.

        Raises:
            SessionError: Where there is no such candidate.
        """
        with self.lock:
            state = self.state
            number = 0 if state.candidates is None else len(state.candidates.scores)
            if not isinstance(index, int) or not 0 <= index < number:
                raise SessionError(f"there is no candidate {index}: there are {number}, numbered from 0.")
            self._push(replace(state, chosen=index))

    def undo(self):
        """Go back one step.

        Raises:
            SessionError: At the first step.
        """
        with self.lock:
            if not self._past:
                raise SessionError("there is nothing to undo.")
            self._state = self._past.pop()

    def clear(self):
        """Drop the current prompt, and the result of everything mode."""
        with self.lock:
            self._push(State(objects=self._state.objects))

    def keep(self, name: str = ""):
        """Add the chosen mask to the list, and begin a new object.

        Raises:
            SessionError: Where there is no mask, and where the list is full.
        """
        with self.lock:
            state = self.state
            if state.chosen_masks is None:
                raise SessionError("there is no mask to keep yet: click on an object, or draw a box.")
            self._keep_all([(state.chosen_masks, state.chosen_score)], name, state.everything)

    def keep_everything(self, name: str = ""):
        """Add all masks of everything mode to the list.

        Raises:
            SessionError: Where there are none, and where the list would be too long.
        """
        with self.lock:
            found = self._state.everything
            if found is None or not len(found):
                raise SessionError("there are no masks of everything yet: run it first.")
            self._keep_all([(found.masks[np.array([i])], float(found.scores[i])) for i in range(len(found))], name)

    def change_object(
        self,
        number: int,
        *,
        name: str | None = None,
        colour: str | None = None,
        is_visible: bool | None = None,
        remove: bool = False,
    ):
        """Rename, recolour, hide or remove an object of the list.

        Raises:
            SessionError: For an object that is not there, and for a colour that is none.
        """
        with self.lock:
            objects = list(self._state.objects)
            place = next((place for place, kept in enumerate(objects) if kept.number == number), None)
            if place is None:
                raise SessionError(f"there is no object {number} in the list.")
            if colour is not None:
                objects[place] = replace(objects[place], colour=_colour(colour))
            if name is not None:
                objects[place] = replace(objects[place], name=short_name(name, 60) if name.strip() else "object")
            if is_visible is not None:
                objects[place] = replace(objects[place], is_visible=bool(is_visible))
            if remove:
                del objects[place]
            self._push(replace(self._state, objects=tuple(objects)))

    def run_everything(
        self,
        points_per_side: int = 16,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        progress: Callable[[int], object] | None = None,
    ) -> GeneratedMasks:
        """Segment everything in the image, see `MaskGenerationSettings`.

        Args:
            points_per_side: Points along each side of the grid.
            pred_iou_thresh: Masks with a predicted IoU above it are kept.
            stability_score_thresh: Masks with a stability above it are kept.
            progress: Called with the number of points that were decoded.

        Raises:
            ValueError: For a setting outside its range.
            SessionClosed: Where the session was closed meanwhile.
        """
        if not isinstance(points_per_side, int) or not 1 <= points_per_side <= self.limits.points_per_side:
            raise SessionError(
                f"points_per_side={points_per_side!r} must be an integer from 1 to {self.limits.points_per_side}."
            )
        settings = MaskGenerationSettings(
            points_per_side, pred_iou_thresh=pred_iou_thresh, stability_score_thresh=stability_score_thresh
        )
        start = time.perf_counter()
        # Without the lock: clicks go on meanwhile.
        watch = _Watch(self, progress)
        result = self.segmenter.everything(self.image, self.encoded, settings, watch)
        with self.lock:
            self.everything_ms = 1000 * (time.perf_counter() - start)
            self._push(replace(self._state, everything=result))
        return result

    def shown_objects(self) -> list[KeptObject]:
        """Return what downloads hold: the visible objects of the list, then the current mask."""
        with self.lock:
            state = self.state
            objects = [kept for kept in state.objects if kept.is_visible]
            if state.chosen_masks is not None:
                name, number = f"object {self._next_number}", self._next_number
                objects.append(KeptObject(number, name, self.next_colour(), state.chosen_masks, state.chosen_score))
            return objects

    def next_colour(self) -> str:
        """Return the colour of the next object, "#rrggbb"."""
        return "#{:02x}{:02x}{:02x}".format(*COLOURS[(self._next_number - 1) % len(COLOURS)])

    def _keep_all(
        self, masks: Sequence[tuple[RunLengthMasks, float]], name: str, everything: GeneratedMasks | None = None
    ):
        objects = list(self._state.objects)
        if len(objects) + len(masks) > self.limits.objects:
            raise SessionError(
                f"the list would have {len(objects) + len(masks)} objects, and the most is {self.limits.objects}. "
                "Remove some first."
            )
        for mask, score in masks:
            title = short_name(name, 60) if name.strip() else f"object {self._next_number}"
            objects.append(KeptObject(self._next_number, title, self.next_colour(), mask, score))
            self._next_number += 1
        self._push(State(objects=tuple(objects), everything=everything))

    def _check_inside(self, x: float, y: float):
        width, height = self.image.size
        if not (0 <= x <= width and 0 <= y <= height):
            raise SessionError(f"the click {x:g}, {y:g} is outside the image of {width}x{height} pixels.")

    def _advance(self, states: list[State]):
        """Decode the last of some new states, and then go through them, so that an error changes nothing."""
        if not states:
            return
        states[-1] = self._decoded(states[-1])
        for state in states:
            self._push(state)

    def _push(self, state: State):
        # Candidates are most of a state's memory, and undo computes them again.
        self._past = [*self._past, replace(self._state, candidates=None)][-self.limits.steps :]
        self._state = state

    def _decoded(self, state: State) -> State:
        """Return the state with its candidates; where none was chosen before, the one that suggests itself is."""
        start = time.perf_counter()
        found = self.segmenter.candidates(state.prompt, state.feedback, self.encoded)
        self.decode_ms = 1000 * (time.perf_counter() - start)
        return replace(state, candidates=found, chosen=found.suggested if state.chosen is None else state.chosen)


class _Watch:
    """The progress of everything mode: passes it on, and stops it where the session has been closed."""

    def __init__(self, session: Session, progress: Callable[[int], object] | None):
        self.session, self.progress = session, progress

    def update(self, num_points: int):
        if self.session.is_closed:
            raise SessionClosed
        if self.progress is not None:
            self.progress(num_points)


def _numbers(what: str, values, count: int) -> list[float]:
    """Return `count` finite numbers; others raise SessionError."""
    numbers = list(values) if isinstance(values, list | tuple) else []
    if len(numbers) != count or not all(
        isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in numbers
    ):
        raise SessionError(f"{what} is {count} numbers in pixels of the image, not {str(values)[:60]}.")
    return [float(value) for value in numbers]


def _colour(text: str) -> str:
    digits = str(text).removeprefix("#").lower()
    if len(digits) != 6 or any(digit not in "0123456789abcdef" for digit in digits):
        raise SessionError(f"{str(text)[:20]!r} is no colour such as #2ecc8f.")
    return f"#{digits}"
