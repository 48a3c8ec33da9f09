"""The claims on a user's tables: what is read, how it is split, and what is said of every table."""

import math

import numpy as np
import pytest

from saigen.data.tables import Table
from saigen.papers.tabular.regularization_cocktails import claims
from saigen.trial import Trial

pytest.importorskip("optuna")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    value = rng.normal(size=80)
    kind = rng.choice(["red", "green", "blue"], 80)
    lines = [
        f"{'' if i % 9 == 0 else round(value[i], 3)},{kind[i]},{'yes' if (value[i] > 0) ^ (kind[i] == 'red') else 'no'}"
        for i in range(80)
    ]
    (tmp_path / "colours.csv").write_text("size,colour,class\n" + "\n".join(lines) + "\n")
    (tmp_path / "prices.csv").write_text("a,y\n" + "\n".join(f"{v:.3f},{2 * v:.3f}" for v in value) + "\n")
    return tmp_path


def test_the_claims_take_a_users_tables_and_leave_quantities_out(folder, monkeypatch):
    monkeypatch.setitem(claims.SIZES, "real", claims.SIZES["tiny"])
    for claim, arms in (
        (claims.cocktail_beats_single_regularizers, ("cocktail", "plain", "best_single", "validation_mixup")),
        (claims.cocktail_beats_boosted_trees, ("cocktail", "trees")),
        (claims.trees_beat_networks, ("trees", "plain")),
    ):
        trial = Trial(1000, "real", data_path=folder)
        values = claim(trial)
        assert all(math.isfinite(value) for value in values.values())
        assert all(f"{arm}_colours" in values for arm in arms) and not any("prices" in name for name in values)
        assert "colours" in trial.used_data
    with pytest.raises(ValueError, match="give --data"):
        claims.cocktail_beats_boosted_trees(Trial(1000, "real"))
    (folder / "colours.csv").unlink()
    with pytest.raises(ValueError, match="no table whose target are classes"):
        claims.cocktail_beats_boosted_trees(Trial(1000, "real", data_path=folder))


def test_parts_share_no_row_and_rare_classes_are_left_out():
    y = np.repeat([0, 1, 2], [40, 37, 3])
    table = Table("t", np.arange(80.0)[:, None], y, (), ("row",), ("a", "b", "c"))
    parts = claims._parts(Trial(0, "laptop"), table)
    assert len(parts.x) + len(parts.test_x) == 77 and not set(parts.x[:, 0]) & set(parts.test_x[:, 0])
    assert len(parts.validation) == len(parts.test_y) == 15
    assert set(parts.y) == set(parts.y[parts.validation]) == set(parts.test_y) == {0, 1}
    again = claims._parts(Trial(1, "laptop"), table)
    assert not np.array_equal(parts.test_x, again.test_x)
