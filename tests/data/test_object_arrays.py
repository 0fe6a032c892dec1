"""The reader is given what numpy writes, and programs that would run something if anyone ran them."""

import pickle
import zipfile

import numpy as np
import pytest

from data.object_arrays import read_strings, strings_of_pickle

NAMES = ["a/b.wav", "c.wav", "", "井号键\n", "x" * 300, "a/b.wav"]


@pytest.fixture
def npz(tmp_path):
    def write(array, save=np.savez):
        save(tmp_path / "a.npz", key=array)
        return tmp_path / "a.npz"

    return write


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [NAMES, [], ["one"], [str(n) for n in range(5000)]])
def test_strings_as_numpy_writes_them(npz, names, save):
    assert read_strings(npz(np.array(names, dtype=object), save), "key") == names
    assert read_strings(npz(np.array(names, dtype=str), save), "key") == names


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_an_array_was_ever_saved_with(protocol):
    assert strings_of_pickle(pickle.dumps(np.array(NAMES, dtype=object), protocol)) == NAMES


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_program_that_would_run_something_is_refused_and_not_run(npz, tmp_path):
    victim = tmp_path / "victim"
    array = np.array(["a", Evil(str(victim))], dtype=object)
    np.load(npz(array), allow_pickle=True)["key"]
    assert victim.exists(), "unpickled, it does its harm: that is the trap"
    victim.unlink()
    with pytest.raises(ValueError, match=r"names .*open at byte \d+, which arrays of strings do not"):
        read_strings(npz(array), "key")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (pickle.dumps(["a"]), "not an array"),
        (pickle.dumps({"a": 1}), "instruction EMPTY_DICT"),
        (pickle.dumps(np.array([1.5], dtype=object)), "instruction BINFLOAT"),
        (pickle.dumps(np.array([5], dtype=object)), "something else than strings"),
        (pickle.dumps(np.array(["a", None], dtype=object)), "something else than strings"),
        (pickle.dumps(np.array(["a", ["b"]], dtype=object)), "something else than strings"),
        (pickle.dumps(np.array([1, 2])), "not an array of objects"),
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"cbuiltins\neval\n.", "names builtins.eval"),
        (b"(lp0\n.", "instruction LIST"),
        (b"R.", "no array of strings has"),
        (b"t.", "no array of strings has"),
        (b"", "pickle"),
        (b"\x80\x05", "pickle"),
        (b"garbage", "no newline"),
    ],
)
def test_other_programs_are_refused(program, message):
    with pytest.raises(ValueError, match=message):
        strings_of_pickle(program)


def test_every_prefix_of_a_good_program_is_refused():
    program = pickle.dumps(np.array(["a", "b"], dtype=object), 4)
    for size in range(len(program)):
        with pytest.raises(ValueError, match=r"."):
            strings_of_pickle(program[:size])


def test_files_that_are_no_npz_and_arrays_that_are_not_there(npz, tmp_path):
    path = npz(np.array(NAMES, dtype=object))
    for member, message in (("relpath", "cannot be read"),):
        with pytest.raises(ValueError, match=message):
            read_strings(path, member)
    with pytest.raises(ValueError, match="its dtype is int64"):
        read_strings(npz(np.arange(3)), "key")
    with pytest.raises(ValueError, match=r"its shape is \(2, 1\)"):
        read_strings(npz(np.array([["a"], ["b"]], dtype=object)), "key")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_strings(path, "key")
    with pytest.raises(ValueError, match="cannot be read"):
        read_strings(tmp_path / "none.npz", "key")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", b"no array")
    with pytest.raises(ValueError, match="array 'key'"):
        read_strings(path, "key")


def test_an_array_that_unpacks_to_too_much_is_not_unpacked(npz, monkeypatch):
    path = npz(np.array(["a" * 100_000], dtype=object), np.savez_compressed)
    monkeypatch.setattr("data.object_arrays.MAX_BYTES", 50_000)
    with pytest.raises(ValueError, match="unpacks to more than 50000 bytes"):
        read_strings(path, "key")
