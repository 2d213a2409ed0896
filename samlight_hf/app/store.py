"""The sessions of all users: each has a key of its own, and all together have a bounded memory."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image

from .limits import MEGABYTE, Limits
from .segmenter import Segmenter
from .session import Session, SessionClosed, SessionError


class SessionStore:
    """Keeps sessions by key. The one that was idle for longest is dropped where a limit is reached.

    Args:
        segmenter: The model of all sessions.
        limits: Number, memory and idle time of sessions.
        clock: Seconds that only grow.
        on_drop: Called with the key of each session that is dropped.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        on_drop: Callable[[str], object] = lambda key: None,
    ):
        self.segmenter, self.limits, self.on_drop = segmenter, limits, on_drop
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[Session, float]] = OrderedDict()  # the longest idle first
        self._opening: dict[str, object] = {}  # what is being encoded, so that a tab closed meanwhile leaves nothing
        self._gone: OrderedDict[str, None] = OrderedDict()  # keys whose users may be told why

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """The memory of all sessions."""
        return sum(session.num_bytes for session, _ in list(self._sessions.values()))

    def open(self, key: str | None, image: Image.Image | Callable[[], Image.Image], name: str) -> Session:
        """Begin a session on an image; an earlier one of this key is dropped.

        Args:
            key: Of the session.
            image: RGB, or a function that reads it. Of two images that are opened at once the later one stays, however
                long each takes to be read.
            name: The image's file name.

        Raises:
            ValueError: For an image that cannot be read, or that is too thin for the model.
            SessionError: Without a key: two users without one would share a session.
            SessionClosed: Where the key was dropped while the image was encoded, or another image was opened.
        """
        key, ticket = _checked(key), object()
        with self._lock:
            self._opening[key] = ticket
        try:
            session = Session(self.segmenter, image() if callable(image) else image, name, self.limits)
        except BaseException:
            with self._lock:
                if self._opening.get(key) is ticket:
                    del self._opening[key]
            raise
        with self._lock:
            if self._opening.get(key) is not ticket:
                raise SessionClosed
            del self._opening[key]
            earlier = self._sessions.pop(key, None)
            self._sessions[key] = session, self._clock()
            self._gone.pop(key, None)
        if earlier is not None:
            earlier[0].close()
        self.sweep()
        return session

    def get(self, key: str | None) -> Session:
        """Return the session of a key.

        Raises:
            SessionError: Where there is none; the message says whether there was one.
        """
        key = _checked(key)
        with self._lock:
            found = self._sessions.pop(key, None)
            if found is not None:
                self._sessions[key] = found[0], self._clock()
        self.sweep()
        if found is None:
            was_dropped = " It was dropped after a while, to make room." if key in self._gone else ""
            raise SessionError(f"there is no image here: open one first.{was_dropped}")
        return found[0]

    def is_opening(self, key: str | None) -> bool:
        """Return whether an image is being read or encoded for a key."""
        return key in self._opening

    def was_dropped(self, key: str | None) -> bool:
        """Return whether the last session of a key was dropped to make room, not by its user."""
        return key in self._gone

    def drop(self, key: str | None):
        """End the session of a key, where there is one, as when its tab is closed."""
        with self._lock:
            found = self._sessions.pop(key, None) if key else None
            self._opening.pop(key or "", None)
        if key and found is not None:
            found[0].close()
            self.on_drop(key)

    def sweep(self):
        """Drop sessions that were idle for too long, and then the longest idle ones while a limit is exceeded."""
        oldest = self._clock() - self.limits.idle_seconds
        with self._lock:
            sizes = {key: session.num_bytes for key, (session, _) in self._sessions.items()}
            total, dropped = sum(sizes.values()), []
            for key, (_, used) in self._sessions.items():
                number = len(self._sessions) - len(dropped)
                # The last one stays, however large its image: limits.pixels bounds it.
                too_much = number > self.limits.sessions or (total > self.limits.cache_mb * MEGABYTE and number > 1)
                if used >= oldest and not too_much:
                    break
                dropped.append(key)
                total -= sizes[key]
            self._gone.update(dict.fromkeys(dropped))
            while len(self._gone) > 16 * self.limits.sessions:
                self._gone.popitem(last=False)
        for key in dropped:
            self.drop(key)


def _checked(key: str | None) -> str:
    if not isinstance(key, str) or not key:
        raise SessionError("this call has no session: use the page, or gradio_client, which give one.")
    return key
