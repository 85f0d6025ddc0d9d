"""Each module of geomprobe/ has a test file of its place and name in tests/unit, or is in a list with its tests."""

from __future__ import annotations

from pathlib import Path

from support.paths import ROOT

UNIT = Path(__file__).parent
PACKAGE = ROOT / "geomprobe"

TESTED_BY: dict[tuple[str, ...], str] = {
    # Modules that only a command, a pass or a report as a whole gives a meaning to.
    ("behavior/test_cli_passes.py", "behavior/test_unmodified_script.py"): "cli/launch cli/record cli/replay",
    ("behavior/test_cli_reports.py",): "cli/diff cli/inspect cli/plot cli/verify",
    ("behavior/test_several_optimizers.py",): "cli/every_path trace/path_folders",
    ("behavior/test_two_pass.py",): "passes/api passes/replaying probe/loops",
    ("behavior/test_bad_input.py",): "errors",
    ("behavior/test_faults.py",): "reproducibility/comparison",
    ("unit/kernels/test_fused_read.py",): "kernels/transfer",
    ("unit/measure/test_inner_products.py",): "reproducibility/step_reader",
    ("behavior/test_measuring.py",): "measure/options measure/quantity measure/curvature/step_curvature",
    ("behavior/test_held_out.py",): "measure/side_gradient",
    ("behavior/test_precision.py",): "measure/gradient_products",
    ("behavior/test_kill.py",): "passes/attempts trace/stream/child",
    ("behavior/test_resume.py", "behavior/test_resume_damage.py"): (
        "passes/checkpoint/restore passes/checkpoint/training_state passes/lease trace/run_folder"
    ),
    ("behavior/test_unmodified_script.py",): "probe/hooks/global_hooks probe/hooks/step_calls",
    ("behavior/test_packaging.py", "behavior/test_light_import.py"): "_package",
    ("behavior/integrations/test_frameworks.py",): ("integrations/accelerate integrations/transformers"),
    # Modules that have something to do only where there are several processes.
    ("processes/test_environment_ranks.py",): "distributed/manifest",
    ("processes/test_failure.py",): "distributed/progress distributed/watchdog",
    ("processes/test_global_numbers.py",): "distributed/dtensor measure/curvature/global_loss",
    ("processes/test_layouts.py",): "distributed/layout distributed/unsupported",
    ("processes/test_replay_options_ranks.py",): "passes/references/loaded",
    ("processes/test_resume_ranks.py",): (
        "distributed/ranks distributed/step_barrier passes/checkpoint/ddp_buckets passes/references/kept"
    ),
    # Parts of what the test file of a neighbor looks at as a whole.
    ("unit/passes/test_options.py",): "measure/option_fields",
    ("unit/probe/test_probe.py",): "probe/events probe/inert probe/parameters probe/progress_bar",
    ("unit/report/html/test_page.py",): "report/html/figures report/html/svg",
    ("unit/report/test_export.py",): "report/output",
    ("unit/report/summary/test_summary.py",): "report/summary/text report/table",
    ("unit/report/verify/test_verify.py",): "report/verify/check report/verify/plain_sgd",
    ("unit/trace/stream/test_kills.py",): "trace/stream/checksum",
    ("unit/trace/stream/test_disk_full.py",): "trace/hdf5_errors",
}
"""By the test files that go through them, the modules without a test file of their own."""

MORE_THAN_ONE_MODULE = {
    "trace/test_torch_free.py": "what the whole of trace/ may not import",
    "trace/stream/test_disk_full.py": "writer and reader together",
    "trace/stream/test_kills.py": "writer and reader together",
    "corridor/test_theory.py": "the papers' theorems, across corridor/",
    "test_mirror.py": "this test",
}
"""Test files that are no module's, with what they are about."""


def modules() -> set[str]:
    """By path in the package without its ending; a room's __init__ is only its docstring or a facade."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return {path.as_posix() for path in paths if path.name not in ("__init__", "__main__")}


def mirrored() -> set[str]:
    """The modules of which a test file bears place and name."""
    files = (path.relative_to(UNIT) for path in UNIT.rglob("test_*.py"))
    named = {path.with_name(path.stem.removeprefix("test_")).as_posix() for path in files}
    return named & modules()


def listed() -> list[str]:
    return [name for names in TESTED_BY.values() for name in names.split()]


def test_each_module_has_a_test_file_of_its_name_or_is_in_the_list():
    assert sorted(modules() - mirrored() - set(listed())) == []


def test_the_list_holds_each_module_once_and_none_that_is_gone_or_has_a_test_file():
    assert sorted(listed()) == sorted(modules() - mirrored())


def test_the_tests_that_the_list_names_are_there():
    assert [file for files in TESTED_BY for file in files if not (ROOT / "tests" / file).exists()] == []


def test_each_test_file_has_a_module_or_says_what_it_is_about():
    files = {path.relative_to(UNIT).as_posix() for path in UNIT.rglob("test_*.py")}
    of_a_module = {f"{name.rpartition('/')[0]}/test_{name.rpartition('/')[2]}.py".lstrip("/") for name in mirrored()}
    assert files - of_a_module == set(MORE_THAN_ONE_MODULE)
