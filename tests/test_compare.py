import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastssl.cli import main
from fastssl.compare import compare, plot, table
from fastssl.methods import SimCLR

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

FAILING = """
from fastssl.methods import SimCLR

class Failing(SimCLR):
    def loss(self, batch):
        raise ValueError("no such luck")
"""


def test_a_failing_method_is_told_of_and_what_is_finished_is_kept(tmp_path, capsys):
    (tmp_path / "own.py").write_text(FAILING)
    out = tmp_path / "out"
    argv = [f"{tmp_path}/own.py:Failing", "simclr", "--data", "digits", "--epochs", "1"]
    argv = ["compare", *argv, "--out", str(out), "--device", "cpu"]
    assert main(argv) == 1
    printed = capsys.readouterr().out
    assert "Failing, seed 0: ValueError: no such luck" in printed

    found = json.loads((out / "compare.json").read_text())
    assert ["error" in row for row in found["rows"]] == [True, False]
    for row in found["rows"][1:]:
        assert row["backbone"] == "resnet_small" and row["seconds"] > 0
        assert row["after"].keys() == row["before"].keys() == {"knn-20", "linear"}
    assert (out / "compare.md").read_text() == table(found) + "\n"
    assert table(found) in printed

    files = [out / "simclr-0" / name for name in ("results.json", "backbone.safetensors")]
    before = [file.stat().st_mtime_ns for file in files]
    again = compare(["simclr"], "digits", epochs=1, out=out, device="cpu")
    assert again["rows"] == found["rows"][1:]
    assert [file.stat().st_mtime_ns for file in files] == before


def test_wrong_names_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="got 'byl'. Did you mean 'byol'"):
        compare(["simclr", "byl"], "digits", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interrupted_comparison_goes_on(tmp_path, capsys, monkeypatch, stop, code):
    def interrupted(*args):
        raise stop

    argv = ["compare", "simclr", "--data", "digits", "--epochs", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(SimCLR, "after_step", interrupted)
        assert main(argv) == code
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "compare.json").exists()
    assert main(argv) == 0
    assert "| simclr | resnet_small |" in (tmp_path / "compare.md").read_text()


def test_what_cannot_be_compared_is_refused_and_nothing_is_lost(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    earlier = json.dumps({"data": "digits", "epochs": 5, "backbone": None, "rows": []})
    (out / "compare.json").write_text(earlier)
    for settings, message in (
        ({"epochs": 4}, "epochs must be that of the comparison in .*, 5, got 4. Choose another"),
        ({"backbone": "vit_small"}, "backbone must be that of .*, None, got 'vit_small'"),
        ({"data": "shapes"}, "data must be that of .*, 'digits', got 'shapes'"),
        ({"seeds": (1, 1)}, "must differ.* got simclr-1 twice"),
        ({"epochs": 0}, "epochs must be a finite number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(["simclr"], **{"data": "digits", "epochs": 5, "out": out} | settings)
    (tmp_path / "list.txt").write_text("a.png\n")
    (tmp_path / "a.png").touch()
    with pytest.raises(FileNotFoundError, match="no test split"):
        compare(["simclr"], str(tmp_path / "list.txt"), out=tmp_path / "other")
    assert [path.name for path in out.iterdir()] == ["compare.json"]
    assert (out / "compare.json").read_text() == earlier
    assert not (tmp_path / "other").exists()
    (out / "compare.json").write_text("mine")
    with pytest.raises(ValueError, match="must be of an earlier comparison, got Expecting value"):
        compare(["simclr"], "digits", epochs=5, out=out)


def test_table_and_plot_have_every_method_with_mean_and_deviation():
    def row(method, seed, score):
        scores = {"knn-20": score, "linear": score + 10}
        common = {"backbone": "vit_small", "seconds": 12.0, "images_per_s": 345.0}
        before = {"knn-20": 40.0, "linear": 50.0}
        return {"method": method, "seed": seed, "before": before, "after": scores} | common

    rows = [row("byol", 0, 60.0), row("byol", 1, 62.0), row("simclr", 3, 70.0)]
    common = {"data": "a<b", "epochs": 3, "threads": 2, "versions": {"torch": "2.11"}, "rows": rows}
    lines = table(common).splitlines()
    assert lines[2] == (
        "| byol | vit_small | 40.0 ± 0.0 | 50.0 ± 0.0 | 61.0 ± 1.4 | 71.0 ± 1.4 | 12 ± 0 | 345 ± 0 "
        "| 0, 1 |"
    )
    assert lines[3] == "| simclr | vit_small | 40.0 | 50.0 | 70.0 | 80.0 | 12 | 345 | 3 |"
    drawing = ElementTree.fromstring(plot(common))
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"byol", "simclr"} <= set(texts) and any("a<b" in text for text in texts)
    circles = drawing.iter("{http://www.w3.org/2000/svg}circle")
    x = [float(circle.get("cx")) for circle in circles][3:]  # after the legend's
    assert len(x) == 8 and x[0] < x[1] < x[3] and x[1] < x[5]


def test_docs_show_the_table_of_the_results_file():
    path = Path(__file__).parents[1] / "docs" / "compare.py"
    spec = importlib.util.spec_from_file_location("docs_compare", path)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    for file, text in page.files().items():
        assert file.read_text() == text, f"{file.name} is old: run python docs/compare.py"
