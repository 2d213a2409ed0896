"""Sessions of many users: apart, bounded, and dropped."""

import pytest

from samlight_hf.app.limits import Limits
from samlight_hf.app.session import SessionClosed, SessionError
from samlight_hf.app.store import SessionStore

from .conftest import noise


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store_of(segmenter, **limits) -> tuple[SessionStore, Clock, list[str]]:
    clock, dropped = Clock(), []
    return SessionStore(segmenter, Limits(**limits), clock, dropped.append), clock, dropped


def test_users_stay_apart(segmenter):
    store, _, _ = store_of(segmenter)
    store.open("a", noise(1), "a.jpg")
    store.open("b", noise(2), "b.jpg")
    store.get("a").add_points([(20, 30, 1)])
    assert store.get("a").name == "a.jpg" and store.get("b").name == "b.jpg"
    assert store.get("b").state.candidates is None and not store.get("b").can_undo


@pytest.mark.parametrize("key", [None, "", 5])
def test_nobody_shares_a_session_without_a_key(segmenter, key):
    store, _, _ = store_of(segmenter)
    with pytest.raises(SessionError, match="no session"):
        store.open(key, noise(), "a.jpg")
    with pytest.raises(SessionError, match="no session"):
        store.get(key)
    assert len(store) == 0


def test_a_closed_tab_drops_its_session(segmenter):
    store, _, dropped = store_of(segmenter)
    session = store.open("a", noise(), "a.jpg")
    store.drop("a")
    store.drop("a")
    store.drop(None)
    assert session.is_closed and len(store) == 0 and store.num_bytes == 0 and dropped == ["a"]
    with pytest.raises(SessionError, match="open one first.$"):
        store.get("a")


def test_a_tab_closed_while_its_image_is_encoded_leaves_nothing(segmenter, monkeypatch):
    store, _, _ = store_of(segmenter)
    encode = segmenter.encode
    monkeypatch.setattr(segmenter, "encode", lambda image: (store.drop("a"), encode(image))[1])
    with pytest.raises(SessionClosed):
        store.open("a", noise(), "x.jpg")
    assert len(store) == 0
    monkeypatch.setattr(segmenter, "encode", encode)
    assert store.open("a", noise(), "x.jpg") is store.get("a"), "a page that comes back begins again"


def test_of_two_images_opened_at_once_the_later_stays(segmenter, monkeypatch):
    store, _, _ = store_of(segmenter)
    encode, later = segmenter.encode, []

    def slow(image):
        monkeypatch.setattr(segmenter, "encode", encode)
        later.append(store.open("a", noise(2), "later.jpg"))
        return encode(image)

    monkeypatch.setattr(segmenter, "encode", slow)
    with pytest.raises(SessionClosed):
        store.open("a", noise(1), "first.jpg")
    assert store.get("a") is later[0]


def test_of_two_images_opened_at_once_the_later_stays_though_it_is_read_first(segmenter):
    store, _, _ = store_of(segmenter)
    later = []

    def read_slowly():
        assert store.is_opening("a")
        later.append(store.open("a", noise(2), "later.jpg"))
        return noise(1)

    with pytest.raises(SessionClosed):
        store.open("a", read_slowly, "first.jpg")
    assert store.get("a") is later[0] and not store.is_opening("a")


def test_a_new_image_replaces_the_session(segmenter):
    store, _, _ = store_of(segmenter)
    first = store.open("a", noise(1), "a.jpg")
    second = store.open("a", noise(2), "b.jpg")
    assert first.is_closed and not second.is_closed and store.get("a") is second and len(store) == 1


def test_the_longest_idle_session_makes_room(segmenter):
    store, clock, dropped = store_of(segmenter, sessions=2)
    for clock.now, key in enumerate(("a", "b")):
        store.open(key, noise(), "x.jpg")
    store.get("a")
    store.open("c", noise(), "x.jpg")
    assert dropped == ["b"] and len(store) == 2
    with pytest.raises(SessionError, match="It was dropped after a while, to make room"):
        store.get("b")


def test_memory_is_bounded_and_one_image_always_stays(segmenter):
    store, _, dropped = store_of(segmenter, cache_mb=1)
    size = (600, 400)  # 0.7 MB
    for key in "abc":
        store.open(key, noise(size=size), "x.jpg")
    assert dropped == ["a", "b"] and len(store) == 1 and store.get("c").image.size == size
    store.open("d", noise(size=(1200, 800)), "x.jpg")
    assert len(store) == 1 and store.get("d")


def test_idle_sessions_are_dropped(segmenter):
    store, clock, dropped = store_of(segmenter, idle_seconds=10)
    store.open("a", noise(), "x.jpg")
    clock.now = 5
    store.open("b", noise(), "x.jpg")
    clock.now = 11
    store.sweep()
    assert dropped == ["a"]
    store.get("b")
    clock.now = 20
    store.sweep()
    assert dropped == ["a"], "use keeps it"
