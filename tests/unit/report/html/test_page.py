"""The page is whole by itself, says first whether the replay held, and shows what any kind of run has."""

import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import h5py
import numpy as np
import pytest
from support.live_writer import append, open_part
from support.sealed_runs import certificate, train, write_record, write_run, write_trace

from geomprobe.errors import RunError, UsageError
from geomprobe.report.html import figures
from geomprobe.report.html.page import write
from geomprobe.trace.printable import printable
from geomprobe.trace.reader import open_trace

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "link", "br", "img"}
FIRST = {"step": 20, "component": "loss", "tensor": "loss"}
HOSTILE = "</script></title><script>alert(1)</script><img src=http://x.y/z onerror='alert(2)'>\"&lt;$\\bad$\x00\ud800"


class Page(HTMLParser):
    """A page's elements, in order, with the text of each; complains of what is not closed where it should be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, name, attributes):
        element = {"name": name, "text": "", **dict(attributes)}
        assert len(dict(attributes)) == len(attributes)
        self.elements.append(element)
        if name not in VOID:
            self._open.append(element)

    def handle_endtag(self, name):
        assert self._open.pop()["name"] == name

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, *names):
        return [element for element in self.elements if element["name"] in names]

    def text(self, name):
        return [element["text"] for element in self.all(name)]

    def figures(self):
        """The text of each figure, by its column."""
        drawn = [each for each in self.all("svg") if each.get("role") == "img"]
        names = [text.partition(":")[0].partition(" ")[0] for text in self.text("figcaption")]
        assert len(drawn) == len(names)
        return list(zip(names, (each["aria-label"] for each in drawn), strict=True))


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, history):
    """A certified run with Hg and two further references."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    others = {"step-30": history.weights[30], "ema": history.weights[-10:].mean(0)}
    write_run(run, history, references=others)
    with_hg(run / "trace.h5", np.linspace(0.01, 0.2, 60))
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory, whole):
    out = tmp_path_factory.mktemp("out") / "report.html"
    write(whole, out)
    return out.read_text()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of words alone, for tests that read no more of a page: to draw them takes most of a test's time."""

    def described(draw, name, alt):
        return f'<svg role="img" aria-label="{html.escape(printable(alt))}"></svg>'

    monkeypatch.setattr(figures, "inline", described)


def with_hg(path, residuals):
    with h5py.File(path, "r+") as file:
        file["steps/relative_residual"][...] = residuals


def report(run, folder):
    out = folder / "report.html"
    found = write(run, out)
    return found, Page(out.read_text())


def test_it_asks_the_network_for_nothing_and_runs_no_script(text):
    page = Page(text)
    assert not page.all("script", "iframe", "object", "embed", "base", "form")
    for element in page.elements:
        for key, value in element.items():
            assert not key.startswith("on")
            if key in ("src", "href", "srcset", "xlink:href", "action", "data"):
                assert value.startswith(("#", "data:")), (element["name"], key, value)
    assert not re.search(r"https?:|//|@import|url\((?!#)", re.sub(r"/\*.*?\*/", "", text), re.IGNORECASE)
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_every_pointer_finds_its_own(text):
    page = Page(text)
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    values = [value for element in page.elements for key, value in element.items() if key != "text"]
    targets = {t for value in values for t in re.findall(r"^#(.+)|url\(#(.+?)\)", value)}
    assert {a or b for a, b in targets} <= set(ids)
    assert {e[key] for e in page.elements for key in e if key == "aria-labelledby"} <= set(ids)


def test_headings_go_down_one_at_a_time_from_one_title(text):
    page = Page(text)
    levels = [int(element["name"][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"
    assert page.text("title") == ["whole: Certified: the recorded run, bit for bit"]


def test_the_verdict_is_the_first_section(text):
    first = Page(text).all("section")[0]["text"]
    assert first.startswith("Certified: the recorded run, bit for bitOf 60 recorded steps, 60 were compared")
    assert "the final weights are bitwise equal" in first


def test_every_figure_says_in_words_what_it_shows(text, whole):
    drawn = Page(text).figures()
    assert [name for name, _ in drawn] == [
        *("rsi", "eb", "cosine", "lolr", "distance"),
        *("distance", "cosine"),
        *("relative_residual", "clr", "occupancy"),
        *("loss", "lr", "grad_norm"),
    ]
    trace = open_trace(whole)
    means = trace["loss"].reshape(3, 20).mean(1)
    assert dict(drawn)["loss"] == (
        f"loss: training loss of the step, by epoch. The mean goes from {means[0]:.4g} at epoch 0 to {means[2]:.4g} "
        f"at epoch 2; all values lie between {trace['loss'].min():.4g} and {trace['loss'].max():.4g}."
    )
    assert all(name in drawn[5][1] for name in ("final: The", "step-30: The", "ema: The"))
    assert all(svg.get("aria-hidden") for svg in Page(text).all("svg") if svg.get("role") != "img")


def test_figures_take_every_color_from_the_page(text):
    styles = [element["style"] for element in Page(text).elements if "style" in element]
    assert any("var(--line-1)" in style for style in styles)
    assert not [style for style in styles if re.search(r"#[0-9a-f]{3,6}", style)]


def contrast(a, b):
    """WCAG 2's contrast ratio of two colors."""

    def luminance(color):
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_dark(text):
    sheets = re.findall(r":root \{ (.*?) \}", text, re.DOTALL)
    assert len(sheets) == 2
    for sheet in sheets:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", sheet))
        for name in ("ink", "soft", "link", "alarm", "good", "wait"):
            assert contrast(colors[name], colors["page"]) >= 4.5, name
            assert contrast(colors[name], colors["raised"]) >= 4.5, name
        assert all(contrast(colors[f"line-{i}"], colors["page"]) >= 3 for i in range(1, 7))


def test_tables_have_headers_and_the_numbers_are_the_columns(text, whole):
    page = Page(text)
    assert len(page.all("table")) == len(page.all("caption")) == 3
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    rows = {element["text"] for element in page.all("tr")}
    cosine = open_trace(whole)["cosine"]
    finite = cosine[np.isfinite(cosine)]
    numbers = (cosine[0], cosine[-1], finite.min(), finite.max(), finite.mean())
    cells = "".join(f"{number:.4g}" for number in numbers)
    assert f"cosine{cells}01cosine of gradient and offset" in rows
    shares = open_trace(whole)["relative_residual"]
    assert f"0.1{100 * (shares < 0.1).mean():.1f} %" in rows


def test_the_commands_the_files_and_the_manifest_are_there(text, whole, history):
    page = Page(text)
    again = next(each for each in page.text("pre") if each.startswith("cd "))
    assert again.splitlines() == [
        "cd /home/her",
        f"geomprobe record -o {whole}-again --seed 0 train.py --lr 0.05",
        f"geomprobe replay {whole}-again",
        f"geomprobe diff {whole} {whole}-again",
    ]
    assert {"record.h5", "trace.h5"} <= set(page.text("th"))
    assert page.text("summary") == ["Manifest of the recording", "Manifest of the replay"]
    folded = [json.loads(text) for text in page.text("pre") if text.startswith("{")]
    assert folded[0] == history.manifest
    assert folded[1]["measure"] == {"every": 1, "per_parameter": False}


def test_the_same_run_gives_the_same_bytes(tmp_path, text, whole):
    write(whole, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_what_a_hostile_run_says_stays_text(tmp_path, history):
    manifest = {
        "geomprobe": HOSTILE,
        "script": {"kind": "script", "path": HOSTILE, "argv": [HOSTILE], "cwd": HOSTILE},
        "optimizer": {"class": HOSTILE, "groups": [{"lr": HOSTILE}]},
        "model": {"class": HOSTILE, "dtype": HOSTILE},
        "software": {HOSTILE: HOSTILE},
        HOSTILE: HOSTILE,
    }
    name = "<b>x</b>$\\bad$ 最\x07"
    run = tmp_path / "<script>alert(3)<\\script>$x"
    first = {"step": 2, "component": HOSTILE, "tensor": HOSTILE}
    said = {**certificate(60, equal=2, first=first), "components": [HOSTILE]}
    write_run(run, history, references={name.replace("/", "%2F"): history.weights[3]}, status="diverged", cert=said)
    for file in ("record.h5", "trace.h5"):
        with h5py.File(run / file, "r+") as opened:
            opened.attrs["manifest"] = json.dumps(manifest)
    _, page = report(run, tmp_path)
    assert not page.all("script", "img", "b")
    assert not [key for element in page.elements for key in element if key.startswith("on")]
    assert page.text("h1") == [run.name]
    assert printable(HOSTILE) in "".join(page.text("dd"))
    assert any(printable(name) in label for _, label in page.figures())


@pytest.mark.parametrize(
    ("status", "options", "headline", "mark"),
    [
        ("uncertified", {"same": np.arange(60) < 20}, "UNCERTIFIED", "bad"),
        ("diverged", {"rows": 45}, "The replay diverged", "bad"),
    ],
)
def test_a_run_that_did_not_hold_says_so_first_and_on_every_figure(tmp_path, history, status, options, headline, mark):
    said = certificate(60, equal=20, weights_equal=False, first=FIRST)
    found, page = report(write_run(tmp_path / "a", history, status=status, cert=said, **options), tmp_path)
    assert (found.headline, found.mark) == (headline, mark)
    first = page.all("section")[0]["text"]
    assert first.startswith(headline)
    assert "20 are equal; the final weights are NOT equal" in first
    assert "First difference: step 20, loss, loss." in first
    assert page.figures()
    assert all(label.startswith(f"{status.upper()}: ") for _, label in page.figures())
    paths = [element for element in page.all("g") if "var(--alarm)" in element.get("style", "")]
    assert len(paths) >= len(page.figures())
    assert ("not the recorded run" in page.text("li")) == (status == "uncertified")


@pytest.mark.usefixtures("undrawn")
def test_a_certificate_that_contradicts_the_status_is_no_certificate(tmp_path, history):
    found, _ = report(write_run(tmp_path / "a", history, cert=certificate(60, equal=59)), tmp_path)
    assert (found.headline, found.mark) == ("No valid certificate", "bad")


@pytest.mark.usefixtures("undrawn")
def test_a_replay_that_has_not_ended_shows_its_rows(tmp_path):
    with open_part(tmp_path / "part.h5", "trace", 0) as writer:
        append(writer, "trace", 0, 120)
        found, page = report(tmp_path / "part.h5", tmp_path)
    assert (found.headline, found.lines) == ("The replay has not finished", ["120 steps so far."])
    assert all(label.startswith("INCOMPLETE: ") for _, label in page.figures())
    assert {"rsi", "loss", "relative_residual", "occupancy"} <= {name for name, _ in page.figures()}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("rows", [0, 1])
def test_a_replay_that_has_barely_begun_is_reported(tmp_path, rows):
    with open_part(tmp_path / "part.h5", "trace", 0) as writer:
        append(writer, "trace", 0, rows)
        found, page = report(tmp_path / "part.h5", tmp_path)
    assert found.lines == [f"{rows} steps so far."]
    assert bool(page.figures()) == bool(rows)


def test_a_recording_alone_is_reported_without_matplotlib(tmp_path, history, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "a", history, trace=False)
    found, page = report(run, tmp_path)
    assert (found.headline, found.mark) == ("Recorded, not replayed", "wait")
    assert page.figures() == []
    assert "loss" in page.text("th")
    assert f"geomprobe replay {run}" in page.text("code")


def test_a_recording_that_failed_says_so(tmp_path, history):
    (tmp_path / "a").mkdir()
    write_record(tmp_path / "a" / "record.h5", history, status="failed", manifest={"seed": 3})
    found, page = report(tmp_path / "a", tmp_path)
    assert (found.headline, found.mark) == ("The recording failed", "bad")
    assert "failed, 60 steps, 3 epochs" in page.text("dd")


@pytest.mark.usefixtures("undrawn")
def test_a_recording_of_a_python_function_names_no_command_line(tmp_path, history):
    script = {"kind": "function", "path": "train", "argv": [], "cwd": None}
    run = write_run(tmp_path / "a", replace(history, manifest={**history.manifest, "script": script}))
    _, page = report(run, tmp_path)
    assert "Recorded in Python: geomprobe.two_pass(train, ...)" in page.text("p")


@pytest.mark.usefixtures("undrawn")
def test_without_epochs_figures_go_by_windows_of_steps(tmp_path, history):
    path = write_trace(tmp_path / "t.h5", history, epoch_length=0)
    _, page = report(path, tmp_path)
    assert "mean of each window of 2 steps" in page.text("li")
    assert all(", by step. " in label for _, label in page.figures())
    assert page.text("h1") == ["t"]


@pytest.mark.usefixtures("undrawn")
def test_without_hg_there_is_no_occupancy_and_a_word_on_why(tmp_path, history):
    _, page = report(write_run(tmp_path / "a", history), tmp_path)
    assert "Hg was not taken, so there is no relative residual." in page.text("p")
    assert not {"relative_residual", "occupancy"} & {name for name, _ in page.figures()}
    assert any(text.startswith("Not measured: hg_norm, g_hg") for text in page.text("p"))


@pytest.mark.parametrize("residual", [0.3, 1e-5])
def test_a_single_relative_residual_makes_no_curve(tmp_path, history, residual):
    run = write_run(tmp_path / "a", history)
    with_hg(run / "trace.h5", np.where(np.arange(60) == 7, residual, np.nan))
    _, page = report(run, tmp_path)
    assert "relative_residual" in dict(page.figures())
    assert "occupancy" not in dict(page.figures())
    assert "0.5100.0 %" in page.text("tr")


def test_what_is_not_finite_is_left_out_of_figures(tmp_path, history):
    run = write_run(tmp_path / "a", history)
    with h5py.File(run / "trace.h5", "r+") as file:
        file["steps/loss"][5:9] = np.inf
        for name in ("rsi", "clr", "epoch"):
            file[f"steps/{name}"][10:] = np.nan
        file["steps/lr"][...] = np.inf
    _, page = report(run, tmp_path)
    names = [name for name, _ in page.figures()]
    assert "rsi" in names
    assert "lr" not in names
    assert "inf" not in " ".join(label for _, label in page.figures())


@pytest.mark.usefixtures("undrawn")
def test_a_manifest_without_anything_is_reported(tmp_path, history):
    run = write_run(tmp_path / "a", replace(history, manifest={"optimizer": {"groups": []}}))
    _, page = report(run, tmp_path)
    assert "To make it again" not in page.text("h2")


def test_a_damaged_trace_is_told_beside_its_recording(tmp_path, history):
    run = write_run(tmp_path / "a", history)
    with h5py.File(run / "trace.h5", "r+") as file:
        file.attrs["schema_version"] = 99
    found, page = report(run, tmp_path)
    assert found.headline != "Certified: the recorded run, bit for bit"
    assert any("99" in text for text in page.text("dd"))


def test_her_matplotlib_settings_are_neither_used_nor_changed(tmp_path, text, whole):
    import matplotlib

    with matplotlib.rc_context({"text.color": "red", "axes.facecolor": "yellow", "font.size": 30}):
        write(whole, tmp_path / "report.html")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "report.html").read_text() == text


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(tmp_path, whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"report needs matplotlib: pip install 'geomprobe\[plot\]'"):
        write(whole, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_without_jinja2_the_extra_is_named_and_nothing_is_written(tmp_path, whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"report needs Jinja2: pip install 'geomprobe\[report\]'"):
        write(whole, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_overwritten_unless_asked(tmp_path, history):
    run = write_run(tmp_path / "a", history, trace=False)
    out = tmp_path / "report.html"
    out.write_text("hers")
    with pytest.raises(UsageError, match="--force overwrites it"):
        write(run, out)
    assert out.read_text() == "hers"
    write(run, out, force=True)
    assert out.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, history, monkeypatch):
    run = write_run(tmp_path / "a", history, trace=False)
    out = tmp_path / "report.html"
    out.write_text("hers")

    def refuse(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(RunError, match=r"No space left on device\. What was there before is untouched"):
        write(run, out, force=True)
    assert out.read_text() == "hers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report.html"]


def test_a_folder_in_the_way_a_missing_folder_and_no_run_are_told(tmp_path, history):
    run = write_run(tmp_path / "a", history, trace=False)
    with pytest.raises(UsageError, match="is a folder; name a file"):
        write(run, tmp_path)
    with pytest.raises(RunError, match="cannot write"):
        write(run, tmp_path / "nowhere" / "report.html")
    with pytest.raises(RunError):
        write(tmp_path / "nothing", tmp_path / "report.html")


@pytest.mark.usefixtures("undrawn")
def test_columns_of_other_gradients_are_among_the_numbers(tmp_path, history):
    write_run(tmp_path / "run", history)
    with h5py.File(tmp_path / "run" / "trace.h5", "r+") as file:
        for group in ("held_out", "full_gradient", "unclipped"):
            for name in ("grad_norm", "grad_dot_offset", "rsi", "eb", "cosine", "lolr"):
                file.copy(f"steps/{name}", f"{group}/{name}")
    write(tmp_path / "run", tmp_path / "run.html")
    rows = Page((tmp_path / "run.html").read_text()).text("tr")
    for group in ("held_out", "full_gradient", "unclipped"):
        assert [row for row in rows if row.startswith(f"{group}/cosine")]
