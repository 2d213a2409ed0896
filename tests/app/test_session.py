"""One user's session: clicks, boxes, candidates, undo, objects and everything mode, without gradio."""

import threading

import numpy as np
import pytest

from samlight_hf.app.actions import MAX_ACTIONS, apply
from samlight_hf.app.session import Session, SessionClosed, SessionError
from samlight_hf.inference.crops import MaskGenerationSettings

from .conftest import SIZE, noise


def mask_of(session: Session) -> np.ndarray:
    return session.state.candidates.masks[session.state.chosen]


def test_a_click_gives_three_candidates_of_the_predictor(session):
    """They are the predictor's own masks, and the one with the highest score is chosen."""
    session.add_points([(20, 30, 1)])
    expected = session.segmenter.predictor.predict([[(20, 30)]], [[1]], image=session.encoded)
    found = session.state.candidates
    assert np.array_equal(found.masks.to_masks(), expected.masks[0]) and np.array_equal(
        found.scores, expected.scores[0]
    )
    assert session.state.chosen == expected.scores[0].argmax() and len(found.titles) == 3
    assert session.encode_ms > 0 and session.decode_ms > 0


def test_a_second_click_refines_the_chosen_mask(session):
    """Its logits are fed back, and one mask for the whole prompt comes before the three."""
    session.add_points([(20, 30, 1)])
    session.choose(1)
    logits = session.state.candidates.logits[1]
    session.add_points([(70, 10, 0)])
    arguments = {"points_xy": [[(20, 30), (70, 10)]], "labels": [[1, 0]], "logits": logits[None]}
    predict, found = session.segmenter.predictor.predict, session.state.candidates
    one = predict(**arguments, multimask_output=False, image=session.encoded)
    three = predict(**arguments, image=session.encoded)
    assert np.array_equal(found.masks.to_masks(), np.concatenate([one.masks[0], three.masks[0]]))
    assert found.titles[0] == "one mask" and session.state.chosen == 0


def test_clicks_in_a_row_are_decoded_once_and_undone_one_by_one(session, monkeypatch):
    calls, predict = [], session.segmenter.predictor.predict
    monkeypatch.setattr(session.segmenter.predictor, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
    session.add_points([(20, 30, 1), (25, 30, 1), (70, 10, 0)])
    assert len(calls) == 2 and len(session.state.prompt.points) == 3  # one mask, and three
    session.undo()
    assert session.state.prompt.points == ((20, 30, 1), (25, 30, 1)) and session.state.candidates is not None
    session.undo()
    session.undo()
    assert not session.state.prompt and not session.can_undo
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()


def test_undo_gives_the_same_mask_back(session):
    session.add_points([(20, 30, 1)])
    before = mask_of(session)
    session.add_points([(70, 10, 0)])
    session.undo()
    assert np.array_equal(mask_of(session), before)


def test_undo_goes_back_to_the_choice_too(session):
    session.add_points([(20, 30, 1)])
    other = (session.state.chosen + 1) % 3
    session.choose(other)
    before = mask_of(session)
    session.add_points([(70, 10, 0)])
    session.undo()
    assert session.state.chosen == other and np.array_equal(mask_of(session), before)
    session.undo()
    assert session.state.chosen == session.state.candidates.suggested


def test_a_box_has_corners_in_any_order(session):
    session.set_box((60, 50, 10, 20))
    assert session.state.prompt.box_xyxy == (10, 20, 60, 50)
    expected = session.segmenter.predictor.predict(
        boxes_xyxy=[(10, 20, 60, 50)], multimask_output=False, image=session.encoded
    )
    assert np.array_equal(session.state.candidates.masks[0], expected.masks[0, 0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.add_points([(97, 3, 1)]), "97, 3 is outside the image of 96x64"),
        (lambda s: s.add_points([(-0.5, 3, 1)]), "outside"),
        (lambda s: s.add_points([(float("nan"), 3, 1)]), "3 numbers"),
        (lambda s: s.add_points([("1", 3, 1)]), "3 numbers"),
        (lambda s: s.add_points([(1, 3)]), "3 numbers"),
        (lambda s: s.add_points([(1, 3, 2)]), "label 2"),
        (lambda s: s.add_points([(1, 3, 0)]), "click on the object first"),
        (lambda s: s.add_points([(1, 3, 1)] * 5), "4 clicks are the most"),
        (lambda s: s.set_box((5, 5, 5, 9)), "no area"),
        (lambda s: s.set_box((200, 5, 300, 9)), "outside the image"),
        (lambda s: s.set_box((1, 2, 3)), "4 numbers"),
        (lambda s: s.set_box(None), "4 numbers"),
        (lambda s: s.set_prompt([], None), "no prompt"),
        (lambda s: s.choose(0), "no candidate 0"),
        (lambda s: s.keep(), "no mask to keep"),
        (lambda s: s.keep_everything(), "run it first"),
        (lambda s: s.change_object(7, name="x"), "no object 7"),
        (lambda s: s.run_everything(9), "from 1 to 8"),
        (lambda s: s.run_everything(2, pred_iou_thresh=2.0), "from 0 to 1"),
    ],
)
def test_a_wrong_call_is_told_and_changes_nothing(session, call, words):
    with pytest.raises(ValueError, match=words):
        call(session)
    assert not session.state.prompt and session.state.candidates is None and not session.can_undo


def test_the_last_pixel_can_be_clicked(session):
    session.add_points([(SIZE[0], SIZE[1], 1)])
    assert session.state.candidates is not None


def test_a_whole_prompt_is_one_step(session):
    session.set_prompt([(20, 30, 1), (25, 30, 1)], (10, 20, 60, 50))
    assert len(session.state.prompt.points) == 2 and session.state.prompt.box_xyxy
    with pytest.raises(SessionError):
        session.set_prompt([(20, 30, 1), (400, 30, 1)], None)
    assert session.state.prompt.box_xyxy, "an error leaves the earlier prompt"
    session.undo()
    assert not session.state.prompt and not session.can_undo


def test_a_lack_of_memory_changes_nothing(session, monkeypatch):
    session.set_prompt([[20, 20, 1]], None)
    before, can_undo = session.state, session.can_undo
    decode, calls = session.segmenter.candidates, []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return decode(*arguments)

    monkeypatch.setattr(session.segmenter, "candidates", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.set_prompt([[30, 30, 1]], [10, 10, 50, 50])
    assert session.state is before and session.can_undo == can_undo
    session.undo()
    assert not session.state.prompt and not session.can_undo


def test_objects_are_kept_named_coloured_hidden_and_removed(session):
    session.add_points([(20, 30, 1)])
    mask = mask_of(session)
    session.keep("cat / \x07dog")
    session.set_box((10, 20, 60, 50))
    session.keep()
    first, second = session.state.objects
    assert (first.name, second.name) == ("cat dog", "object 2") and first.colour != second.colour
    assert np.array_equal(first.mask, mask) and not session.state.prompt
    session.change_object(1, name="x" * 99, colour="#ABCDEF")
    assert session.state.objects[0].name == "x" * 60 and session.state.objects[0].colour == "#abcdef"
    for colour in ("red", "#12", "url(x)"):
        with pytest.raises(SessionError, match="no colour"):
            session.change_object(1, colour=colour)
    session.change_object(1, is_visible=False)
    assert [kept.number for kept in session.shown_objects()] == [2]
    session.change_object(2, remove=True)
    assert [kept.number for kept in session.state.objects] == [1]
    session.undo()
    assert [kept.number for kept in session.state.objects] == [1, 2]


def test_the_list_is_bounded(session):
    for _ in range(3):
        session.add_points([(20, 30, 1)])
        session.keep()
    session.add_points([(20, 30, 1)])
    with pytest.raises(SessionError, match="4 objects, and the most is 3"):
        session.keep()
    assert session.state.candidates is not None, "the mask is not lost"


def test_undo_and_memory_are_bounded(session):
    for _ in range(20):
        session.set_box((10, 20, 60, 50))
    size = session.num_bytes
    for _ in range(20):
        session.set_box((10, 20, 60, 50))
    assert session.num_bytes == size > 3 * SIZE[0] * SIZE[1]
    for _ in range(6):
        session.undo()
    assert not session.can_undo


def test_everything_is_that_of_the_generator(session):
    done = []
    result = session.run_everything(3, 0.0, 0.0, done.append)
    settings = MaskGenerationSettings(3, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    expected = session.segmenter.generator(session.image, settings)
    assert np.array_equal(result.masks.to_masks(), expected.masks.to_masks()) and len(result) and sum(done) == 9
    if len(result) <= 3:
        session.keep_everything("thing")
        assert len(session.state.objects) == len(result) and session.everything is None
    else:
        with pytest.raises(SessionError, match="the most is 3"):
            session.keep_everything()
    session.clear()
    assert session.everything is None


def test_a_closed_session_stops_everything_mode(session):
    with pytest.raises(SessionClosed):
        session.run_everything(8, progress=lambda num_points: None) if session.close() else session.run_everything(8)


def test_actions_of_the_page(session):
    assert apply(session, [{"type": "point", "x": 20, "y": 30, "label": 1}, {"type": "keep", "name": "a"}]) is None
    file = apply(session, [{"type": "box", "box": [1, 2, 30, 40]}, {"type": "download", "format": "coco"}])
    assert file.name == "photo of me_coco.json" and len(session.state.objects) == 1
    apply(session, [{"type": "object", "number": 1, "name": "b"}, {"type": "clear"}, {"type": "undo"}])
    assert session.state.objects[0].name == "b" and session.state.prompt.box_xyxy


@pytest.mark.parametrize(
    "actions",
    [
        None, "undo", [1], [{}], [{"type": "__class__"}], [{"type": ["x"]}], [{"type": "point"}], [{"type": "box"}],
        [{"type": "box", "box": "abcd"}], [{"type": "choose", "index": "0"}], [{"type": "object", "number": []}],
        [{"type": "object", "number": 1, "name": 5}], [{"type": "download", "format": "../x"}],
        [{"type": "point", "x": {}, "y": 1, "label": 1}], [{"type": "undo"}] * (MAX_ACTIONS + 1),
        [{"type": "point", "x": 1e308, "y": 1, "label": 1}], [{"type": "point", "x": True, "y": 1, "label": 1}],
    ],
)  # fmt: skip
def test_actions_that_no_page_sends_are_refused(session, actions):
    with pytest.raises(SessionError):
        apply(session, actions)
    assert not session.state.prompt


def test_threads_on_one_session(segmenter, limits):
    """A hundred clicks at once: each is done or refused, and none is lost half way."""
    session, refused = Session(segmenter, noise(), "a.jpg", limits), []

    def click(number: int):
        try:
            apply(session, [{"type": "point", "x": number % 90, "y": 20, "label": 1}])
        except SessionError as error:
            refused.append(error)

    threads = [threading.Thread(target=click, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(session.state.prompt.points) == limits.clicks and len(refused) == 100 - limits.clicks


def test_an_image_of_one_pixel(segmenter, limits):
    session = Session(segmenter, noise(size=(1, 1)), "dot.png", limits)
    session.add_points([(0, 0, 1)])
    assert mask_of(session).shape == (1, 1)
    session.set_box((0, 0, 1, 1))
    session.run_everything(2, 0.0, 0.0)
