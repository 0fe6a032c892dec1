import pytest

from data.fields import (
    RecordError,
    as_object,
    as_seconds,
    check_order,
    flag_of,
    label_of,
    seconds_of,
    shown,
    strings_of,
    text_of,
)


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


def reason_of(function, *args, **kwargs):
    with pytest.raises(RecordError) as caught:
        function(*args, **kwargs)
    assert len(caught.value.detail) < 400, "a message stays short whatever the value is"
    return caught.value.reason


def test_values_come_back():
    record = {"text": " a ", "terms": ["x"], "id": 7, "flag": True, "start": 3}
    assert text_of(record, "text") == "a"
    assert strings_of(record, "terms") == ["x"]
    assert label_of(record, "id") == "7"
    assert flag_of(record, "flag") is True
    assert seconds_of(record, "start") == 3.0


def test_missing_fields_have_their_default_or_name_what_is_there():
    assert text_of({"a": None}, "a", default="") == ""
    assert strings_of({}, "a", default=[]) == []
    assert label_of({}, "a", default="d") == "d"
    assert flag_of({}, "a") is False
    assert seconds_of({}, "a") is None
    for function in (text_of, strings_of, label_of):
        with pytest.raises(RecordError, match="no a; there are b, c"):
            function({"c": 1, "b": 2}, "a")
    assert reason_of(seconds_of, {}, "a", required=True) == "missing_field"


@pytest.mark.parametrize(
    "bad", [5, None, True, ["a"], {"a": 1}, nested(10_000), 10**5000], ids=lambda bad: type(bad).__name__
)
def test_other_types_are_refused_and_shown_however_large(bad):
    assert reason_of(text_of, {"a": bad}, "a") == "wrong_type"
    assert reason_of(strings_of, {"a": [bad]}, "a") == "wrong_type"
    assert reason_of(as_object, [bad]) == "not_an_object"
    assert len(shown(bad)) < 200


def test_numbers_that_no_float_holds():
    assert reason_of(as_seconds, 10**400, "start") == "bad_span"
    assert reason_of(as_seconds, float("nan"), "start") == "bad_span"
    assert reason_of(as_seconds, -0.1, "start") == "bad_span"
    assert reason_of(as_seconds, True, "start") == "wrong_type"
    assert reason_of(label_of, {"id": 10**5000}, "id") == "wrong_type"


def test_half_a_surrogate_pair_is_no_text():
    for record in ({"a": "\ud800"}, {"a": ["\ud800"]}):
        assert reason_of(strings_of if isinstance(record["a"], list) else text_of, record, "a") == "bad_text"
    assert reason_of(label_of, {"a": "\udfff"}, "a") == "bad_text"


def test_a_span_goes_forward():
    check_order(0.0, 0.1, "start", "end")
    check_order(None, 0.1, "start", "end")
    check_order(5.0, None, "start", "end")
    with pytest.raises(RecordError, match=r"start 0.0 is not before end 0.0"):
        check_order(None, 0.0, "start", "end")
    with pytest.raises(RecordError, match=r"start 1.0 is not before end 1.0"):
        check_order(1.0, 1.0, "start", "end")
