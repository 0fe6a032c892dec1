import json

import pytest

from data.drops import DropLog
from data.glossary import group_of, load_glossary
from data.terms import variant_group


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


DICT = {
    "Pound Key": {
        "term": "pound key",
        "short_description": "#",
        "confused": False,
        "target_translations": {"zh": "井号键"},
    },
    "Hash": {"term": "pound key", "target_translations": {}},
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("g.json", ["Pound Key", "Voicemail"]),
        ("g.json", [{"term": "Pound Key"}, {"term": "Voicemail", "translations": {"zh": ["语音信箱"]}}]),
        ("g.json", {"Pound Key": {"term": "Pound Key"}, "Voicemail": None}),
        ("g.jsonl", '{"term": "Pound Key"}\n{"term": "Voicemail"}\n'),
        ("g.csv", "term,zh\nPound Key,井号键\nVoicemail,\n"),
        ("g.csv", "Pound Key\nVoicemail\n"),
        ("g.tsv", "zh\tterm\n井号键\tPound Key\n\tVoicemail\n"),
        ("g.txt", "\ufeffPound Key\n\n  Voicemail \n"),
    ],
)
def test_every_format_gives_the_same_terms(tmp_path, name, content):
    glossary = load_glossary(write(tmp_path, name, content))
    assert glossary.terms == ["pound key", "voicemail"]
    assert [entry.surface for entry in glossary.entries] == ["Pound Key", "Voicemail"]


def test_translations_are_kept_from_dict_and_table(tmp_path):
    assert load_glossary(write(tmp_path, "g.json", DICT)).entries[0].translations == {"zh": ["井号键"]}
    table = write(tmp_path, "g.csv", 'term,target_translations.zh,de\n"Pound Key",井号键,Rautetaste\n')
    assert load_glossary(table).entries[0].translations == {"zh": ["井号键"], "de": ["Rautetaste"]}


def test_aliases_are_one_variant_group(tmp_path):
    glossary = load_glossary(write(tmp_path, "g.json", DICT))
    assert glossary.group("hash") == glossary.group("Pound-Keys") == group_of("pound key", glossary)
    assert group_of("hash", None) == variant_group("hash") != variant_group("pound key")
    assert glossary.group("voicemail") == variant_group("voicemail")


def test_aliases_of_aliases_join_up(tmp_path):
    rows = [
        {"term": "sharp", "aliases": ["hash"]},
        {"term": "pound", "aliases": ["number sign"]},
        {"term": "number sign", "aliases": ["hash"]},
    ]
    glossary = load_glossary(write(tmp_path, "g.json", rows))
    assert len({glossary.group(name) for name in ("sharp", "hash", "pound", "number sign")}) == 1


def test_unusable_terms_are_noted_and_repeated_ones_merged(tmp_path):
    drops = DropLog()
    rows = ["ab", "1234", "key", {"term": "KEY", "translations": {"zh": "键"}}]
    glossary = load_glossary(write(tmp_path, "g.json", rows), drops)
    assert glossary.terms == ["key"]
    assert glossary.entries[0].translations == {"zh": ["键"]}
    assert drops.notes == {"term_too_short": 1, "term_mostly_digits": 1}
    assert drops.num_dropped == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.json", [1, 2], "allowed are a string or an object"),
        ("g.json", [{"name": "x"}], "with a string `term`"),
        ("g.json", {"key": "键"}, "allowed is an object"),
        ("g.json", {"key": {"term": 5}}, "term is 5"),
        ("g.json", {"key": {"target_translations": ["x"]}}, "allowed is an object of language"),
        ("g.json", {"key": {"aliases": "x"}}, "aliases is 'x'"),
        ("g.json", '{"key": ', "not JSON"),
        ("g.json", ["ab"], "holds no usable term"),
        ("g.txt", "", "holds no usable term"),
        ("g.pkl", "x", "ends in .json"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_glossary(write(tmp_path, name, content))


def test_a_missing_glossary_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--glossary_path"):
        load_glossary(tmp_path / "none.txt")
