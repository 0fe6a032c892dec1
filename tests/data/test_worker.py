import os
import threading

import pytest

from data.worker import receive, restore, send


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # a test closed it


def test_messages_come_whole_however_long(pipe):
    read, write = pipe
    long = {"text": "键" * 200_000}
    sender = threading.Thread(target=lambda: [send(write, message) for message in ({}, long)])
    sender.start()
    assert receive(read) == {}
    assert receive(read) == long
    sender.join()


def test_the_end_of_the_pipe_is_told_also_within_a_message(pipe):
    read, write = pipe
    os.write(write, b"\x09\x00\x00\x00{")
    os.close(write)
    assert receive(read) is None


def test_functions_are_found_by_name():
    assert restore("os.path:join") is os.path.join
    assert restore("data.worker:Inheritance.__init__").__name__ == "__init__"
    with pytest.raises(AttributeError):
        restore("os:nothing_of_the_sort")
