import numpy as np
import pandas as pd
import pytest
import scipy.linalg

from jaximm import data
from jaximm.carriers import carrier_file
from jaximm.data.tables import house_prices


@pytest.fixture(scope="module")
def pair():
    return data.load("house_prices")


def reference_task(table, mask, target):
    """The reference's steps with pandas: fill, label-encode per task, standardise per task."""
    rows = table[mask]
    features = rows.drop(columns=["LotArea", "SalePrice"])
    columns = []
    for name in features:
        if pd.api.types.is_numeric_dtype(table[name]):
            columns.append(features[name].fillna(0).to_numpy(float))
        else:
            texts = features[name].astype(object).where(features[name].notna(), "0").astype(str)
            columns.append(np.unique(texts.to_numpy(str), return_inverse=True)[1].astype(float))
    x, y = np.stack(columns, axis=1), rows[target].to_numpy(float)
    scale = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(scale > 0, scale, 1), (y - y.mean()) / y.std()


def test_agrees_with_pandas_and_numpy(pair):
    # pandas >= 2.0 counts "None" as missing by default; named here, so that any version agrees.
    table = pd.read_csv(carrier_file(house_prices.CARRIER), na_values=["None"])
    assert table.shape == (1460, 81)
    in_zone = table["MSZoning"] == "RL"
    for task, mask, target in (
        (pair.primary, ~in_zone, "LotArea"),
        (pair.harmful, in_zone, "SalePrice"),
    ):
        x, y = reference_task(table, mask, target)
        np.testing.assert_allclose(np.vstack([task.train.x, task.held_out.x]), x, atol=1e-12)
        np.testing.assert_allclose(np.hstack([task.train.y, task.held_out.y]), y, atol=1e-12)


def test_rows_ranks_and_kinds(pair):
    shapes = [
        split.x.shape
        for task in (pair.primary, pair.harmful)
        for split in (task.train, task.held_out)
    ]
    assert shapes == [(200, 79), (109, 79), (200, 79), (951, 79)]
    assert (pair.primary.kind, pair.harmful.kind) == ("regression", "regression")
    rank = np.linalg.matrix_rank
    assert rank(pair.primary.train.x) == rank(pair.harmful.train.x) == 74
    whole = [np.vstack([t.train.x, t.held_out.x]) for t in (pair.primary, pair.harmful)]
    assert [rank(x) for x in whole] == [74, 76]
    for x in whole:
        varying = x.std(axis=0) > 0
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(x.std(axis=0)[varying], 1, atol=1e-12)
        assert (x[:, ~varying] == 0).all()
    # MSZoning is a feature of both tasks; inside the zone it is constant.
    assert [int((x.std(axis=0) == 0).sum()) for x in whole] == [3, 1]
    assert not data.inputs_shared(pair).shared


def test_known_conditioning_of_the_training_rows(pair):
    """Figures measured elsewhere on these tasks, to the digits that were handed down."""
    damped, log_kappa = {}, {}
    for name, task in (("P", pair.primary), ("H", pair.harmful)):
        x = task.train.x
        k = x.T @ x / len(x)
        damped[name] = k + 1e-3 * np.trace(k) / 79 * np.eye(79)
        log_kappa[name] = np.log(np.linalg.cond(damped[name]))
    m = scipy.linalg.eigh(damped["H"], damped["P"], eigvals_only=True)
    log_kappa_m = np.log(m[-1] / m[0])
    np.testing.assert_allclose(
        [log_kappa["P"], log_kappa["H"], log_kappa_m], [9.1386, 9.2761, 14.5127], atol=5e-5
    )
    np.testing.assert_allclose(log_kappa_m + log_kappa["P"] - log_kappa["H"], 14.375, atol=5e-4)


def test_gradient_descent_on_the_raw_harmful_task_needs_49_steps(pair):
    x, y = pair.harmful.train
    h, n = x.T @ x / len(x), len(x)
    step = 1 / np.linalg.eigvalsh(h)[-1]
    best = np.linalg.lstsq(x, y, rcond=None)[0]

    def loss(w):
        return np.sum((x @ w - y) ** 2) / (2 * n)

    w, target, steps = np.zeros(79), 0.01 * (loss(np.zeros(79)) - loss(best)), 0
    while loss(w) - loss(best) > target:
        w, steps = w - step * (x.T @ (x @ w - y) / n), steps + 1
    assert steps == 49


def test_training_statistics_do_not_look_at_held_out_rows():
    pair = data.load("house_prices", statistics="train", train_rows=150)
    for task in (pair.primary, pair.harmful):
        assert len(task.train.x) == 150
        varying = task.train.x.std(axis=0) > 0
        np.testing.assert_allclose(task.train.x.mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(task.train.x.std(axis=0)[varying], 1, atol=1e-12)
        np.testing.assert_allclose([task.train.y.mean(), task.train.y.std()], [0, 1], atol=1e-12)
        assert (task.held_out.x[:, ~varying] == 0).all()
        assert abs(task.held_out.y.mean()) > 1e-3  # so the statistics are not those of all rows


def test_encoding_is_ranks_within_the_task(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(
        "Id,MSZoning,Frontage,Veneer,LotArea,SalePrice\n"
        "1,RM,NA,Stone,10,100\n2,RL,65,Brick,20,200\n3,RM,3.5,None,30,300\n4,RL,,NA,40,400\n"
        "5,FV,7,Brick,50,500\n"
    )
    primary, harmful = house_prices.read_encoded(path)
    # Zones FV, RM -> 0, 1; missing "0" sorts before Brick and Stone.
    np.testing.assert_array_equal(primary.x, [[1, 1, 0, 2], [3, 1, 3.5, 0], [5, 0, 7, 1]])
    np.testing.assert_array_equal(primary.y, [10, 30, 50])
    np.testing.assert_array_equal(harmful.x, [[2, 0, 65, 1], [4, 0, 0, 0]])
    np.testing.assert_array_equal(harmful.y, [200, 400])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header line"),
        ("MSZoning,LotArea\nRL,1\n", r"lacks columns, such as \['SalePrice'\]"),
        ("a,MSZoning,LotArea,SalePrice\n1,RL,1,2\n", "no rows inside, or none outside"),
        ("a,MSZoning,LotArea,SalePrice\n1,RL,x,2\n", "LotArea is 'x', not a number"),
        ("a,MSZoning,LotArea,SalePrice\n1,RL,1\n", "row 0 has 3 fields, the header has 4"),
        (",MSZoning,LotArea,SalePrice\n1,RL,1,2\n", "the first column has no name"),
    ],
)
def test_another_table_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"table\.csv: .*{message}"):
        house_prices.read_encoded(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_rows": 309}, r"train_rows must be in \[1, 308\].*got 309"),
        ({"train_rows": 0}, "train_rows"),
        ({"statistics": "test"}, "statistics must be 'all' or 'train', got 'test'"),
        ({"source": "hub"}, "source must be"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        house_prices.HousePricesConfig(**fields)
