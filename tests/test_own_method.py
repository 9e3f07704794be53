"""The method that the documentation writes in a file of its own, from the command line."""

import re
from pathlib import Path

import pytest

from fastssl.cli import main
from fastssl.config import PretrainConfig
from fastssl.methods import method_class
from fastssl.train import load_checkpoint

pytest.importorskip("yaml")
pytest.importorskip("sklearn")
PAGE = Path(__file__).parents[1] / "docs" / "own_method.md"


@pytest.fixture
def file(tmp_path):
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)[1]
    (tmp_path / "coding_rate.py").write_text(code)
    return tmp_path / "coding_rate.py"


def test_it_trains_resumes_and_is_evaluated(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    settings = ["--epochs", "3", "--warmup-epochs", "0.5", "--device", "cpu", "--agreement", "30"]
    assert main(["pretrain", "coding_rate.py:CodingRate", "digits", *settings]) == 0
    run = tmp_path / "runs" / "CodingRate"
    monkeypatch.chdir("/")
    assert main(["pretrain", "--resume", "--out", str(run)]) == 0
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    assert state["config"]["method"] == f"{file}:CodingRate"
    assert state["config"]["method_args"] == {"agreement": 30.0}
    lines = (run / "metrics.csv").read_text().splitlines()
    assert "cosine" in lines[0] and "rate" in lines[0]
    assert main(["evaluate", str(run), "--protocol", "knn", "--random"]) == 0
    gap = re.search(r"knn-20 +\S+ +\S+ +\+(\S+)", capsys.readouterr().out)
    assert gap and float(gap[1]) > 0


def test_its_options_are_in_the_help(file, capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", f"{file}:CodingRate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "options of CodingRate" in out
    assert "--eps X distortion at which the rate is measured. Default: 0.5." in out


def test_messages(file, tmp_path):
    with pytest.raises(ValueError, match="must be FILE.py:CLASS, got no file 'nix.py'"):
        method_class("nix.py:Nix")
    with pytest.raises(ValueError, match="class in .*, got 'CodeRate'. Did you mean 'CodingRate'"):
        method_class(f"{file}:CodeRate")
    with pytest.raises(ValueError, match="unknown setting 'agrement'. Did you mean 'agreement'"):
        PretrainConfig(method=f"{file}:CodingRate", method_args={"agrement": 1.0})
