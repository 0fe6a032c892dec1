import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.terms import is_usable_term, key64, normalise_term, term_key, unusable_reason, variant_group

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def test_normal_form_is_nfkc_lower_case_and_single_spaced():
    assert normalise_term("  Ｐound\u00a0\n KEY ") == "pound key"
    assert term_key("Pound  Key") == term_key("pound key")


@given(TEXT)
def test_normal_form_is_idempotent(text):
    assert normalise_term(normalise_term(text)) == normalise_term(text)


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        ("ab", "term_too_short"),
        ("", "term_too_short"),
        ("a123", "term_mostly_digits"),
        ("123", "term_mostly_digits"),
        ("---", "term_without_letters"),
        ("ab12", None),  # exactly half digits is allowed
        ("key", None),
        ("电话号码", None),
    ],
)
def test_short_terms_and_digits_are_not_usable(term, reason):
    assert unusable_reason(term) == reason
    assert is_usable_term(term) is (reason is None)


def test_keys_are_signed_64_bit_fixed_for_ever_and_never_zero():
    # Written down, since keys live in checkpoints and caches: BLAKE2b of 8 bytes, little endian.
    assert key64("pound key") == 2913512556424497795
    keys = {key64(f"term {number}") for number in range(10_000)}
    assert len(keys) == 10_000
    assert 0 not in keys
    assert any(key < 0 for key in keys)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Menu", "menus"),
        ("touch tone", "touch-tones"),
        ("touchtone", "Touch Tone"),
        ("entry", "entries"),
        ("movie", "movies"),
        ("box", "boxes"),
        ("caller", "caller's"),
        ("caller’s", "callers'"),
        ("U.S.A.", "usa"),
    ],
)
def test_spelling_variants_share_a_group(one, other):
    assert variant_group(one) == variant_group(other)


@pytest.mark.parametrize(
    ("one", "other"), [("mute", "unmute"), ("pound", "pound key"), ("glass", "glad"), ("+++", "***")]
)
def test_other_terms_do_not(one, other):
    assert variant_group(one) != variant_group(other)


@given(TEXT)
def test_any_text_has_a_group(text):
    assert variant_group(text) == variant_group(normalise_term(text))
