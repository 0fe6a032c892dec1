"""The benchmark compares equals: both ways find the same ranks, and what is left out says so."""

import pytest

from bench.glossary_size import Settings, compare, main


def test_small_sizes_agree_and_the_sort_is_left_out_where_it_would_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(num_terms=(1500,), num_clips=6, embedding_dim=8, batch_size=4)
    row = compare(settings, 1500)
    assert row.sort_s is not None
    assert row.ours_s > 0 < row.product_s
    assert compare(Settings(num_clips=6, embedding_dim=8, max_matrix_gib=0.0), 1500).sort_s is None
    main(settings)
    assert "1,500 terms, 6 clips: ours" in capsys.readouterr().out
