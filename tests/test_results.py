"The constants in the code are those of the committed results."
from pathlib import Path

import numpy as np, pandas as pd, pytest
from marsclr import diagnosis

results = Path(__file__).parent.parent/'nbs/results'


def test_the_line_of_the_diagnosis_is_fitted_to_its_references():
    table = pd.read_csv(results/'references.csv')
    error = np.log(table.rate/(1-table.rate)) - diagnosis.left_out(table)
    weight = 1/table.groupby('family').family.transform('size')
    assert diagnosis.fit_line(table) == pytest.approx(diagnosis.line, abs=.01)
    assert np.sqrt(np.average(error**2, weights=weight)) == pytest.approx(diagnosis.spread, abs=.01)
    assert table.family.nunique() - 1 == diagnosis.freedom


def test_the_intervals_hold_the_rates_of_archives_that_the_line_has_not_seen():
    table = pd.read_csv(results/'diagnosis.csv')
    assert len(table) == 7 and table.name.is_unique
    assert ((table.low <= table.rate) & (table.rate <= table.high)).sum() >= 6
    assert table.hold.mean() > .85
