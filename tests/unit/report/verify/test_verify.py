"""verify passes every true run and catches each identity that is broken."""

import json

import h5py
import numpy as np
import pytest
import torch
from support.sealed_runs import certificate, rederive, tamper, train, write_trace

from geomprobe.errors import RunError
from geomprobe.report.verify.plain_sgd import DIRECTION, EQ4, LENGTH
from geomprobe.report.verify.verify import render, verify
from geomprobe.trace.reader import open_trace


@pytest.fixture(scope="module")
def sgd():
    return train(steps=60, lr=0.05)


def outcomes(path):
    return {check.name: check.outcome for check in verify(open_trace(path)).checks}


def broken(path):
    return {check.name for check in verify(open_trace(path)).broken}


def check(path, name):
    return next(each for each in verify(open_trace(path)).checks if each.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lr", "offset"), [(0.05, 0.0), (1e-3, 0.0), (1e-4, 3.0)])
def test_plain_sgd_holds_in_every_dtype_and_with_steps_of_every_size(tmp_path, dtype, lr, offset):
    path = write_trace(tmp_path / "trace.h5", train(lr=lr, offset=offset, dtype=dtype))
    assert broken(path) == set()
    assert check(path, EQ4).rows == 60


def test_plain_sgd_with_a_decaying_rate_holds_late_in_training(tmp_path):
    path = write_trace(tmp_path / "trace.h5", train(steps=120, lr=0.1, decay=0.93, offset=2.0))
    assert broken(path) == set()
    assert check(path, EQ4).rows == 120


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"momentum": 0.9}, "momentum is 0.9"),
        ({"weight_decay": 0.01}, "weight_decay is 0.01"),
        ({"optimizer": "Adam"}, "the optimizer is Adam"),
    ],
)
def test_other_optimizers_hold_what_applies_to_them_and_skip_the_rest_with_a_reason(tmp_path, settings, why):
    path = write_trace(tmp_path / "trace.h5", train(lr=0.01, **settings))
    assert broken(path) == set()
    assert {check(path, name).note for name in (EQ4, LENGTH, DIRECTION)} == {why}


def test_parameters_and_further_references_are_checked_too(tmp_path, sgd):
    references = {"best": sgd.weights[30]}
    path = write_trace(tmp_path / "trace.h5", sgd, per_parameter=True, references=references)
    assert broken(path) == set()
    tamper(path, "references/best/inner_products/w.d", lambda x: x + 1e-3, row=7)
    assert broken(path) == {"||w - d|| = ||w*|| is constant"}


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("steps/cosine", "cosine = rsi / eb"),
        ("steps/lolr", "lolr = rsi / eb^2"),
        ("steps/clr", "clr = loss / grad_norm^2"),
        ("steps/distance", "columns = f(inner products)"),
        ("steps/grad_norm", "columns = f(inner products)"),
        ("steps/grad_dot_offset", "columns = f(inner products)"),
        ("steps/rsi", "columns = f(inner products)"),
        ("steps/eb", "columns = f(inner products)"),
    ],
)
def test_a_derived_column_off_by_one_in_a_trillion_is_caught_at_its_row(tmp_path, sgd, column, name):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, column, lambda x: x * (1 + 1e-12), row=17)
    assert {name, "columns = f(inner products)"} <= broken(path)
    assert check(path, name).row == 17


def test_a_derived_column_that_is_missing_where_its_inputs_are_there_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "steps/rsi", lambda x: np.nan, row=3)
    assert "columns = f(inner products)" in broken(path)


def test_a_cosine_above_one_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    with h5py.File(path) as file:
        most = np.sqrt(file["inner_products/g.g"][9] * file["inner_products/d.d"][9])
    tamper(path, "inner_products/g.d", lambda x: 1.00001 * most, row=9)
    rederive(path)
    assert {"|cosine| <= 1", "Cauchy-Schwarz"} <= broken(path)


@pytest.mark.parametrize("product", ["w.g", "w.d"])
def test_an_inner_product_beyond_cauchy_schwarz_is_caught(tmp_path, sgd, product):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, f"inner_products/{product}", lambda x: 1e6, row=4)
    assert check(path, "Cauchy-Schwarz").outcome == "FAIL"
    assert check(path, "Cauchy-Schwarz").note == f"{product} of final"


def test_a_curvature_product_beyond_cauchy_schwarz_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    with h5py.File(path, "r+") as file:
        g_g = file["inner_products/g.g"][...]
        file["inner_products/Hg.Hg"], file["inner_products/g.Hg"] = 4 * g_g, 2.1 * g_g
        file["steps/hg_norm"][...], file["steps/g_hg"][...] = 2 * np.sqrt(g_g), 2.1 * g_g
        file["steps/corridor_residual"][...] = 2.0
        file["steps/relative_residual"][...] = 2 * sgd.lr
        file["steps/flow_drift"][...] = sgd.lr**2 * np.sqrt(g_g)
    assert broken(path) == {"Cauchy-Schwarz"}


def test_a_distance_of_zero_in_the_middle_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "inner_products/d.d", np.zeros_like, row=20)
    rederive(path)
    assert check(path, "distance > 0 before T").row == 20


def test_weights_that_stand_still_at_the_end_since_the_rate_is_zero_are_no_broken_identity(tmp_path):
    history = train(steps=40, lr=0.05)
    history.weights[31:], history.lr[30:] = history.weights[30], 0.0
    path = write_trace(tmp_path / "trace.h5", history)
    assert broken(path) == set()
    assert check(path, "distance > 0 before T").note == "the weights stand still from step 30 on"


def test_weights_that_stand_still_at_the_end_in_spite_of_a_step_are_caught(tmp_path):
    history = train(steps=40, lr=0.05)
    history.weights[31:] = history.weights[30]
    path = write_trace(tmp_path / "trace.h5", history)
    assert {"distance > 0 before T", EQ4} <= broken(path)


def test_a_shifted_offset_is_caught_by_the_norm_of_the_reference(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "inner_products/w.d", lambda x: np.roll(x, 1))
    assert "||w - d|| = ||w*|| is constant" in broken(path)


def test_a_gap_in_the_steps_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "steps/step", lambda x: x + 1, row=slice(8, None))
    assert check(path, "step = 0, 1, ..., T-1").row == 8


def test_a_measured_row_that_is_missing_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    with h5py.File(path) as file:
        products = list(file["inner_products"])
    for name in products:
        tamper(path, f"inner_products/{name}", lambda x: np.nan, row=12)
    rederive(path)
    assert check(path, "no measured row is missing").row == 12


def test_a_single_inner_product_that_is_missing_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "inner_products/w.g", lambda x: np.nan, row=12)
    assert broken(path) == {"no measured row is missing"}


def test_a_final_reference_that_is_not_the_steps_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    with h5py.File(path, "r+") as file:
        values = file["steps/cosine"][...]
        del file["references/final/cosine"]
        file["references/final/cosine"] = values + 1e-9
    assert broken(path) == {"references/final = steps"}


def test_a_parameter_left_out_of_the_whole_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd, per_parameter=True)
    tamper(path, "parameters/2.bias/w.g", lambda x: x + 1e-3, row=5)
    tamper(path, "parameters/2.bias/w.w", lambda x: x + 1e-3, row=5)
    assert "sum over parameters = whole" in broken(path)


@pytest.mark.parametrize(
    "said",
    [
        {},
        certificate(60, equal=59),
        certificate(60, weights_equal=False),
        certificate(61),
    ],
)
def test_a_complete_trace_whose_certificate_falls_short_is_caught(tmp_path, sgd, said):
    path = write_trace(tmp_path / "trace.h5", sgd, cert=said)
    assert broken(path) == {"certificate fits status complete"}


@pytest.mark.parametrize("off", [1e-3, 1e-4])
def test_a_learning_rate_that_is_slightly_off_is_caught_row_by_row_and_at_the_end(tmp_path, sgd, off):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "steps/lr", lambda x: x * (1 + off))
    tamper(path, "groups/0/lr", lambda x: x * (1 + off))
    assert broken(path) == {EQ4, LENGTH}
    assert check(path, EQ4).excess > 10


def test_rows_shifted_by_one_are_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    for name in ("g.g", "g.d", "w.g"):
        tamper(path, f"inner_products/{name}", lambda x: np.roll(x, 1))
    rederive(path)
    assert {EQ4, LENGTH} <= broken(path)


def test_a_sign_of_the_gradient_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "inner_products/g.d", np.negative)
    rederive(path)
    assert broken(path) == {EQ4, DIRECTION}


def test_a_last_cosine_below_one_is_caught(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "inner_products/g.d", lambda x: x * (1 - 1e-4), row=-1)
    rederive(path)
    assert DIRECTION in broken(path)


def test_a_single_row_of_a_late_tiny_step_that_is_off_is_caught(tmp_path):
    path = write_trace(tmp_path / "trace.h5", train(steps=120, lr=0.1, decay=0.95))
    tamper(path, "inner_products/d.d", lambda x: x * 1.01, row=100)
    rederive(path)
    assert EQ4 in broken(path)
    assert check(path, EQ4).row in (99, 100)


def test_a_last_step_below_the_rounding_of_the_weights_proves_nothing_and_says_so(tmp_path):
    path = write_trace(tmp_path / "trace.h5", train(steps=30, lr=2e-8, decay=0.95, offset=50.0))
    assert broken(path) == set()
    assert check(path, DIRECTION).outcome == "SKIPPED"
    assert "below the rounding" in check(path, DIRECTION).note


def test_an_unfinished_trace_has_eq_4_but_no_last_step(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd, rows=40, status="incomplete")
    assert broken(path) == set()
    assert check(path, EQ4).rows == 39
    assert check(path, DIRECTION).note == "no certified last step"


def test_sparse_measuring_skips_eq_4_and_keeps_the_last_step_when_measured(tmp_path, sgd):
    sparse = write_trace(tmp_path / "sparse.h5", sgd, every=4)
    assert broken(sparse) == set()
    assert check(sparse, EQ4).note == "no two neighboring rows measured"
    assert check(sparse, DIRECTION).outcome == "SKIPPED"
    assert check(sparse, "no measured row is missing").rows == 15
    last = write_trace(tmp_path / "last.h5", train(steps=61), every=4)
    assert check(last, DIRECTION).outcome == "PASS"


def test_groups_with_different_rates_are_not_checked_and_the_reason_is_given(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    with h5py.File(path, "r+") as file:
        manifest = json.loads(file.attrs["manifest"])
        manifest["optimizer"]["groups"] *= 2
        file.attrs["manifest"] = json.dumps(manifest)
        file["groups/1/lr"] = np.where(np.arange(60) < 10, 0.05, 0.01)
    assert check(path, EQ4).rows == 10
    tamper(path, "groups/1/lr", lambda x: 0.01)
    assert "learning rates differ" in check(path, EQ4).note


def test_momentum_switched_on_half_way_is_not_taken_for_plain_sgd(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "groups/0/momentum", lambda x: 0.9, row=slice(30, None))
    assert check(path, EQ4).rows == 30
    assert check(path, DIRECTION).outcome == "SKIPPED"


def test_rows_that_are_not_finite_are_counted_and_break_nothing(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    for name in ("g.g", "g.d", "w.g"):
        tamper(path, f"inner_products/{name}", lambda x: np.nan, row=slice(20, 22))
    tamper(path, "steps/loss", lambda x: np.inf, row=slice(20, 23))
    rederive(path)
    result = verify(open_trace(path))
    assert result.broken == ()
    assert result.rows_not_finite == 3
    assert "3 rows hold values that are not finite" in render(result)
    assert check(path, EQ4).rows == 58


def test_a_run_without_losses_skips_clr(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    tamper(path, "steps/loss", lambda x: np.nan)
    rederive(path)
    assert broken(path) == set()
    assert check(path, "clr = loss / grad_norm^2").note == "the trace holds no loss"


def test_an_uncertified_trace_is_verified_and_says_so(tmp_path, sgd):
    said = certificate(60, equal=25, weights_equal=False)
    path = write_trace(tmp_path / "trace.h5", sgd, status="uncertified", cert=said, same=np.arange(60) < 25)
    assert broken(path) == set()
    assert "UNCERTIFIED" in render(verify(open_trace(path)))
    tamper(path, "steps/same", lambda x: 1.0)
    assert broken(path) == {"certificate fits status uncertified"}


def test_a_diverged_trace_must_name_its_first_difference(tmp_path, sgd):
    first = {"step": 30, "component": "rng", "tensor": "torch"}
    said = certificate(60, equal=30, weights_equal=False, first=first)
    good = write_trace(tmp_path / "good.h5", sgd, rows=30, status="diverged", cert=said)
    assert broken(good) == set()
    said["first_difference"] = None
    bad = write_trace(tmp_path / "bad.h5", sgd, rows=30, status="diverged", cert=said)
    assert broken(bad) == {"certificate fits status diverged"}


def test_every_check_prints_its_rows_worst_deviation_and_tolerance(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    text = render(verify(open_trace(path)))
    assert "float32 (unit roundoff 6.0e-08)" in text
    assert text.splitlines()[-1] == "all 15 checks held"
    tamper(path, "inner_products/g.d", np.negative)
    assert "checks FAILED" in render(verify(open_trace(path)))


def test_the_json_is_strict_and_complete(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd, status="incomplete", cert={})
    said = json.loads(json.dumps(verify(open_trace(path)).as_json(), allow_nan=False))
    assert said["held"] is True
    assert {each["outcome"] for each in said["checks"]} == {"PASS", "SKIPPED"}


def test_a_trace_without_rows_is_refused(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd, rows=0, status="incomplete")
    with pytest.raises(RunError, match="holds no step"):
        verify(open_trace(path))


def test_a_dtype_of_unknown_rounding_is_refused_by_name(tmp_path, sgd):
    path = write_trace(tmp_path / "trace.h5", sgd)
    with h5py.File(path, "r+") as file:
        manifest = json.loads(file.attrs["manifest"])
        manifest["model"]["dtype"] = "float8_e4m3fn"
        file.attrs["manifest"] = json.dumps(manifest)
    with pytest.raises(RunError, match="float8_e4m3fn"):
        verify(open_trace(path))
