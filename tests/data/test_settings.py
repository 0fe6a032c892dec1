import math

import pytest

from data.settings import DataSettings


def test_the_defaults_are_where_users_keep_their_files():
    settings = DataSettings()
    settings.validate()
    assert settings.train_samples_path == "data/xl_term_level_chunks_merged.json"
    assert settings.test_samples_path == "data/samples/xl/term_level_chunks_500000_1000000.json"
    assert settings.max_bad_fraction == 0.02


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5"),
        ({"max_bad_fraction": math.nan}, "max_bad_fraction is nan"),
        ({"num_workers": -1}, "num_workers"),
        ({"term_margin_s": -1.0}, "term_margin_s"),
        ({"no_term_ratio": math.inf}, "no_term_ratio"),
        ({"window_min_s": 4.0}, "window_max_s is 3.0; allowed are 4.0"),
        ({"window_max_s": 31.0}, "window_max_s"),
        ({"window_fraction": 2.0}, "set word_times_path"),
        ({"augment_snr_db": (20.0, 10.0)}, "highest"),
        ({"path_remap": ("/old",)}, "allowed is OLD=NEW"),
        ({"path_remap": ("=/new",)}, "allowed is OLD=NEW"),
    ],
)
def test_values_out_of_range_name_field_value_and_what_is_allowed(changes, field):
    with pytest.raises(ValueError, match=field):
        DataSettings(**changes).validate()
