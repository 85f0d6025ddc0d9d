import re

import pytest

from geomprobe.errors import GeomprobeError
from geomprobe.trace import schema

ALL = (*schema.STEP_COLUMNS, *schema.OPTIONAL_STEP_COLUMNS, *schema.INNER_PRODUCTS, *schema.GROUP_COLUMNS)
BESIDE = [(group, column) for group, columns in schema.ORACLES.items() for column in columns]


@pytest.mark.parametrize("column", ALL, ids=lambda column: column.name)
def test_every_column_says_what_it_is(column):
    assert all([column.name, column.long_name, column.units, column.formula, column.source])


@pytest.mark.parametrize(("group", "column"), BESIDE, ids=lambda value: getattr(value, "name", value))
def test_columns_of_other_gradients_are_the_steps_own_under_another_description(group, column):
    own = schema.describe(f"steps/{column.name}")
    assert schema.describe(f"{group}/{column.name}") == column
    assert (column.units, column.formula) == (own.units, own.formula)
    assert column.long_name.startswith(f"{own.long_name}, of ")


@pytest.mark.parametrize("path", ["held_out/rsi", "full_gradient/grad_norm", "held_out/inner_products/w.w"])
def test_what_follows_from_another_gradients_products_may_not_be_streamed(path):
    with pytest.raises(schema.UnknownColumn):
        schema.check_raw(path)
    schema.check_raw(f"{path.split('/')[0]}/loss")
    schema.check_raw(f"{path.split('/')[0]}/inner_products/g.d")


def test_units_agree_with_the_formulas():
    """Loss, weight and lr are bound by ``lr G = weight``, so every unit follows from its formula."""
    dimension = {"loss": (1, 0), "weight": (0, 1), "lr": (-1, 2), "1": (0, 0)}  # powers of loss and of weight

    def of(units):
        total, sign = [0, 0], 1
        for token in re.split(r"([/])", units):
            if token == "/":
                sign = -1
                continue
            base, _, power = token.partition("^")
            for i in (0, 1):
                total[i] += sign * int(power or 1) * dimension[base][i]
            sign = 1
        return tuple(total)

    units = {column.name: of(column.units) for column in ALL}
    loss, g, d = (1, 0), (1, -1), (0, 1)

    def times(*factors):
        return tuple(map(sum, zip(*factors, strict=True)))

    def over(a, b):
        return (a[0] - b[0], a[1] - b[1])

    hg = times((1, -2), g)
    assert units["grad_norm"] == g
    assert units["distance"] == d
    assert units["grad_dot_offset"] == units["g.d"] == times(g, d)
    assert units["rsi"] == over(times(g, d), times(d, d)) == of("1/lr")
    assert units["eb"] == over(g, d)
    assert units["lolr"] == over(times(g, d), times(g, g))
    assert units["clr"] == over(loss, times(g, g))
    assert units["hg_norm"] == hg
    assert units["g_hg"] == units["g.Hg"] == times(g, hg)
    assert units["Hg.Hg"] == times(hg, hg)
    assert units["corridor_residual"] == over(hg, g)
    assert units["relative_residual"] == (0, 0)
    assert units["flow_drift"] == times(of("lr"), of("lr"), hg) == d
    assert units["sharpness"] == units["secant_residual"] == of("1/lr")
    assert units["linear_decrease_gap"] == loss
    assert units["weight_decay"] == over(g, d)


@pytest.mark.parametrize("name", ["fc.weight", "a/b", "%2F", "..", ".", "ü %", "a%b/c."])
def test_names_survive_escaping_and_stay_one_path_component(name):
    component = schema.escape(name)
    assert "/" not in component
    assert component not in (".", "..")
    assert schema.unescape(component) == name
    assert "/" not in schema.reference_file(name)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_no_dataset_can_have_are_refused(name):
    with pytest.raises(GeomprobeError, match="cannot name"):
        schema.escape(name)


def test_the_contract_names_every_step_column():
    names = " ".join(column.name for column in schema.STEP_COLUMNS)
    assert names == (
        "step epoch loss lr grad_norm distance grad_dot_offset rsi eb cosine lolr clr hg_norm g_hg "
        "corridor_residual relative_residual flow_drift"
    )
    assert schema.COMPONENTS == (
        "rng",
        "batch",
        "weights",
        "hyperparameters",
        "optimizer",
        "loss",
        "buffers",
        "gradient",
    )


def test_an_unknown_column_is_told_with_near_matches():
    with pytest.raises(schema.UnknownColumn, match="cosine") as caught:
        schema.describe("steps/cosin")
    assert str(caught.value) == "'steps/cosin' is no column of a trace; there is cosine"
