"The constants in the code are those of the committed results."
from pathlib import Path

import pandas as pd, pytest
from marsclr import diagnosis
from marsclr.study.grid import config_of, grid, key, missing, read_cells
from marsclr.study.homogeneity import gains
from marsclr.study.purity import break_even, gains_over_dcl
from marsclr.study.presets import presets

results = Path(__file__).parent.parent/'nbs/results'


def test_the_line_of_the_diagnosis_is_fitted_to_its_references():
    table = pd.read_csv(results/'references.csv')
    assert diagnosis.fit_line(table) == pytest.approx(diagnosis.line, abs=.01)
    assert diagnosis.left_out_rmse(table) == pytest.approx((diagnosis.spread, diagnosis.freedom), abs=.01)


def test_the_intervals_hold_the_rates_of_archives_that_the_line_has_not_seen():
    table = pd.read_csv(results/'diagnosis.csv')
    assert len(table) == 7 and table.name.is_unique
    assert ((table.low <= table.rate) & (table.rate <= table.high)).sum() >= 6
    assert table.hold.mean() > .85


@pytest.mark.parametrize('path', sorted(o for o in (results/'laptop-msl').glob('*.csv') if o.stem in presets['laptop']['msl'].groups and o.stem not in ('fig8', 'cross_validation')), ids=lambda o: o.stem)
def test_the_cells_are_those_of_the_preset_and_there_is_one_row_for_each(path):
    table, settings = read_cells(path), presets['laptop']['msl']
    assert set(table.method) <= {o.name for o in settings.groups[path.stem]} and set(table.pack) <= set(settings.packs)
    assert not table.duplicated(key).any()
    assert table.config.tolist() == [config_of(o, settings) for o in table.method]
    asked = grid(settings, [path.stem], settings.packs)
    assert len(asked) - len(missing(asked, table)) == len(table)
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()


def test_the_purity_that_the_diagnosis_asks_for_is_that_of_the_curve():
    table = pd.read_csv(results/'purity-marsyard.csv')
    assert table.groupby(['method', table.how.fillna(''), 'amount']).seed.nunique().min() >= 3
    assert break_even(gains_over_dcl(table)) == pytest.approx(diagnosis.enough_purity, abs=.1)


def test_blocks_hold_every_labeled_original_once_for_each_encoder():
    table, settings = read_cells(results/'laptop-msl/cross_validation.csv'), presets['laptop']['msl']
    of_cells = table.groupby([*key, 'config'], as_index=False)[['images', 'test_images']].sum()
    assert set(of_cells.method) <= {o.name for o in settings.groups['cross_validation']}
    assert of_cells.config.tolist() == [config_of(o, settings) for o in of_cells.method]
    n = {'MSL v2.1': (2900, 600), 'HiRISE v3.2 subset': (5230, 923)}
    assert [tuple(o) for o in of_cells[['images', 'test_images']].to_numpy()] == [n[o] for o in of_cells['pack']]
    assert (table.right <= table.images).all() and (table.test_right <= table.test_images).all()


def test_every_encoder_has_learned_something_of_mars_and_the_recommended_one_most():
    cells = pd.concat(read_cells(results/f'laptop-msl/{o}.csv') for o in ('fig3', 'recommended'))
    cells = cells[(cells.pack == 'MSL v2.1') & (cells.labels == 100)]
    cells = cells[cells.method != 'frozen ImageNet']  # has learned elsewhere
    mean = cells.groupby('method').val_accuracy.mean()
    assert mean.idxmin() == 'random weights' and mean.idxmax() == 'recommended'


def test_the_recommended_recipe_is_the_one_that_val_chose():
    cells = read_cells(results/'laptop-msl/recommended.csv')
    cells = cells[(cells.pack == 'MSL v2.1') & (cells.labels == 100)]
    assert cells.val_loss.notna().all() and set(cells.method) == {o.name for o in presets['laptop']['msl'].groups['recommended']}
    assert cells.groupby('method').val_loss.mean().idxmin() == 'recommended'


def test_the_map_has_25_clusters_of_each_domain_and_names_every_image_once():
    table = pd.read_csv(results/'laptop-msl/fig8.csv')
    assert table.path.is_unique and table.domain.value_counts().to_dict() == dict(curiosity=6835, perseverance=538)
    assert (table.groupby('domain').cluster.nunique() == 25).all()
    assert (table.groupby(['domain', 'cluster']).size().groupby('domain').diff().dropna() <= 0).all()


def test_what_the_lessons_say_of_the_cost_of_false_negatives():
    table = pd.read_csv(results/'homogeneity-marsyard.csv')
    gain = gains(table)
    ceiling = gain[(gain.method == 'eq. 2, view positives, true classes') & (gain.burst == 1)]
    assert len(ceiling) == 5 and ceiling.same.max() < 1
    mean = gain.groupby('method')[['own', 'same']].mean()
    assert (mean.loc['random weights'] < -2).all()
    assert mean.loc['eq. 2, view positives, true classes'].between(-1, 1).all()


def test_what_the_study_says_of_pure_and_random_clusters():
    curve = gains_over_dcl(pd.read_csv(results/'purity-marsyard.csv'))
    aware = curve[curve.method == 'cluster-aware'].set_index(['how', 'amount'])
    assert aware.gain['wrong', 0] > 2*aware.sd['wrong', 0]
    assert aware.gain['wrong', 1] < 0 < aware.gain['merged', 2]


def test_mixing_costs_what_the_advice_says():
    mean = gains(pd.read_csv(results/'homogeneity-marsyard.csv')).groupby('method')[['own', 'same']].mean()
    points = sorted(-mean.loc['mixed with leaves'].round())
    assert f'that cost {points[0]:.0f} to {points[1]:.0f} points' in ' '.join(diagnosis._why_mixing(.2).split())
    blocks = read_cells(results/'laptop-msl/cross_validation.csv')
    right = blocks[blocks['pack'] == 'MSL v2.1'].groupby('method').right.sum()
    assert right['mixed-domain'] < right['DCL']
