"""The states of a session, as values: prompt, candidates and kept objects. Undo goes back to an earlier one."""

from dataclasses import dataclass, field

import numpy as np

from ..masks.results import GeneratedMasks
from ..masks.rle import RunLengthMasks


@dataclass(frozen=True)
class Prompt:
    """The prompt of the object that is being segmented, in pixels of the image.

    Attributes:
        points: Tuples of x, y and label: 1 on the object, 0 beside it.
        box_xyxy: x1, y1, x2, y2, or None.
    """

    points: tuple[tuple[float, float, int], ...] = ()
    box_xyxy: tuple[float, float, float, float] | None = None

    def __bool__(self) -> bool:
        return bool(self.points) or self.box_xyxy is not None


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks for one prompt, to choose from.

    Attributes:
        masks: n masks of the image's size.
        scores: float32 (n,), predicted IoU.
        logits: float32 (n, h, w), which a further click refines.
        titles: The n masks' names for people.
        suggested: The index of the one that is chosen where nobody has chosen.
    """

    masks: RunLengthMasks
    scores: np.ndarray
    logits: np.ndarray
    titles: tuple[str, ...]
    suggested: int = 0


@dataclass(frozen=True, eq=False)
class KeptObject:
    """An object in the list.

    Attributes:
        number: Names it in the session; it is not used again.
        name: Its class, in files.
        colour: "#rrggbb".
        masks: Its one mask.
        score: Predicted IoU.
        is_visible: False leaves it out of the image and of downloads.
    """

    number: int
    name: str
    colour: str
    masks: RunLengthMasks
    score: float
    is_visible: bool = True

    @property
    def mask(self) -> np.ndarray:
        """The mask, bool (H, W)."""
        return self.masks[0]


@dataclass(frozen=True, eq=False)
class State:
    """Everything that undo restores.

    Attributes:
        prompt: Of the current object.
        feedback: Logits (h, w) of the mask that was chosen before the last click, which refines it.
        candidates: Of the prompt; None without one, or as long as nobody has asked for them.
        chosen: The index of the chosen candidate; None is the one that the prompt suggests.
        objects: The list.
        everything: Result of everything mode.
    """

    prompt: Prompt = field(default_factory=Prompt)
    feedback: np.ndarray | None = None
    candidates: Candidates | None = None
    chosen: int | None = None
    objects: tuple[KeptObject, ...] = ()
    everything: GeneratedMasks | None = None

    @property
    def chosen_logits(self) -> np.ndarray | None:
        """The logits (h, w) of the chosen candidate, where there are candidates."""
        return None if self.candidates is None else self.candidates.logits[self.chosen or 0]

    @property
    def chosen_masks(self) -> RunLengthMasks | None:
        """The chosen candidate as one mask, where there are candidates."""
        return None if self.candidates is None else self.candidates.masks[np.array([self.chosen or 0])]

    @property
    def chosen_score(self) -> float:
        """The score of the chosen candidate; 0 where there is none."""
        return 0.0 if self.candidates is None else float(self.candidates.scores[self.chosen or 0])

    @property
    def arrays(self) -> list[np.ndarray]:
        """The arrays that take memory; states of one session share most of them."""
        arrays = [kept.masks.runs for kept in self.objects]
        if self.feedback is not None:
            arrays.append(self.feedback)
        if self.candidates is not None:
            arrays += [self.candidates.logits, self.candidates.masks.runs]
        if self.everything is not None:
            arrays.append(self.everything.masks.runs)
        return arrays
