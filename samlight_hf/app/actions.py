"""What the page sends: actions as JSON, checked and done on a session."""

from collections.abc import Callable, Sequence
from itertools import groupby

from .exports import Download, export
from .session import Session, SessionError


MAX_ACTIONS = 256  # of one event: what clicks gather while the one before is answered


def apply(session: Session, actions: Sequence[dict]) -> Download | None:
    """Do actions in their order; clicks in a row are decoded once.

    Args:
        session: With an image.
        actions: Dicts with `type` "point" (x, y, label), "box" (box), "choose" (index), "undo", "clear", "keep" (name),
            "keep_everything" (name), "object" (number, and name, colour, is_visible or remove) or "download" (format).

    Returns:
        The file of the last "download".

    Raises:
        ValueError: For the first action that cannot be done; those before it are done.
    """
    if not isinstance(actions, list) or not all(isinstance(action, dict) for action in actions):
        raise SessionError("actions must be a list of objects with a type.")
    if len(actions) > MAX_ACTIONS:
        raise SessionError(f"{len(actions)} actions at once are too many: the most is {MAX_ACTIONS}.")
    download = None
    for kind, group in groupby(actions, lambda action: action.get("type")):
        if kind == "point":
            session.add_points([[action.get(name) for name in ("x", "y", "label")] for action in group])
        elif kind == "download":
            download = [export(session, action.get("format", "")) for action in group][-1]
        elif isinstance(kind, str) and kind in _ACTIONS:
            for action in group:
                _ACTIONS[kind](session, action)
        else:
            raise SessionError(f"there is no action {str(kind)[:40]!r}.")
    return download


def _change_object(session: Session, action: dict):
    changes = {name: action.get(name) for name in ("name", "colour", "is_visible")}
    for name in ("name", "colour"):
        if not isinstance(changes[name], str | None):
            raise SessionError(f"the {name} of an object must be text.")
    session.change_object(action.get("number", -1), remove=bool(action.get("remove")), **changes)


_ACTIONS: dict[str, Callable[[Session, dict], object]] = {
    "box": lambda session, action: session.set_box(action.get("box", ())),
    "choose": lambda session, action: session.choose(action.get("index", -1)),
    "undo": lambda session, action: session.undo(),
    "clear": lambda session, action: session.clear(),
    "keep": lambda session, action: session.keep(str(action.get("name", ""))),
    "keep_everything": lambda session, action: session.keep_everything(str(action.get("name", ""))),
    "object": _change_object,
}
