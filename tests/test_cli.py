import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy
import pytest
import yaml

import fastssl
from fastssl import demo, extension
from fastssl.cli import info, main, pretrain
from fastssl.config import PretrainConfig
from fastssl.methods import METHODS

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

TINY = ["--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["pretrain", "simclr", "digits", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def rgb_run(tmp_path_factory):
    """A run of six images in two folders, one more of which is broken."""
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("rgb")
    for name in "ab":
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            colour = (80 * number, 200, 40 if name == "a" else 240)
            Image.new("RGB", (20, 16), colour).save(folder / "images" / name / f"{number}.png")
    argv = ["--out", str(folder / "run"), "--image-size", "16", "--batch-size", "4", *TINY]
    assert main(["pretrain", "simclr", str(folder / "images"), *argv]) == 0
    (folder / "images" / "b" / "broken.png").write_text("not a picture")
    return folder / "run", folder / "images"


def settings(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def failure(capsys, *argv):
    """The one line a wrong command prints; the exit code must be 2 and nothing else be printed."""
    assert main([str(argument) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("pretrian", "unknown command 'pretrian'. Did you mean 'pretrain'?"),
        ("pretrain", "METHOD is missing: give it first, or in --config"),
        ("pretrain simcrl", "got 'simcrl'. Did you mean 'simclr'?"),
        ("pretrain simclr --tempratur 0.5 digits", "unknown option --tempratur. Did you mean '--t"),
        ("pretrain simclr --tempratur=0.5", "unknown option --tempratur. Did you mean '--temp"),
        ("pretrain simclr --epoch 3", "unknown option --epoch. Did you mean '--epochs'?"),
        ("pretrain simclr --epochs", "argument --epochs: expected one argument"),
        ("pretrain simclr digits patches", "unexpected argument 'patches'"),
        ("pretrain simclr --epochs three", "epochs must be a whole number or none, got 'three'"),
        ("pretrain simclr --temperature hot", "temperature must be a number, got 'hot'"),
        ("pretrain simclr --optimizer adamv", "got 'adamv'. Did you mean 'adam'?"),
        ("pretrain simclr --lr -1", "lr must be a finite number >= 0, got -1.0"),
        ("pretrain --config nix.yaml", "cannot read nix.yaml: No such file"),
        ("pretrain --resume --out nix", "--out must be a run to resume, got 'nix'"),
        ("evaluate", "the following arguments are required: CKPT"),
        ("evaluate nix", "nix is not a run"),
        ("evaluate nix --protocol kn", "got 'kn'. Did you mean 'knn'?"),
        ("evaluate nix --batch-size x", "argument --batch-size: invalid int value: 'x'"),
        ("evaluate nix --shots 1,x", "argument --shots: must be whole numbers, got '1,x'"),
        ("evaluate nix --batch-size 0", "batch_size must be >= 1, got 0"),
        ("export nix --out x.pth", "the following arguments are required: --format"),
        ("export nix --format tim --out x.pth", "got 'tim'. Did you mean 'timm'?"),
        ("export nix --format timm --out x.pth", "nix is not a run"),
        ("embed nix", "the following arguments are required: FOLDER, --out"),
        ("embed nix here --out x.csv", "out must end in .npz or .safetensors, got 'x.csv'"),
        ("embed nix here --out x.npz", "nix is not a run"),
        ("methods all", "unexpected argument 'all'"),
        ("demo now", "unexpected argument 'now'"),
        ("info --all", "unknown option --all"),
    ],
)
def test_wrong_commands_say_what_is_wrong(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *argv.split())
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_existing_run(capsys, tmp_path, run):
    nowhere = tmp_path / "images"
    message = failure(capsys, "pretrain", "simclr", nowhere, "--out", tmp_path / "run")
    assert f"got '{nowhere}': no such folder" in message
    message = failure(capsys, "pretrain", "simclr", "digits", "--out", run)
    assert "already holds a run" in message and "--resume" in message


WRITING = {
    "pretrain simclr digits": "folder",
    "compare simclr --data digits": "folder",
    "bench losses": "folder",
    "demo": "folder",
    "evaluate RUN --protocol knn": "file",
    "export RUN --format safetensors": "file",
    "embed RUN .": "file",
    "report RUN": "file",
}


@pytest.mark.parametrize("command", WRITING)
def test_an_out_that_cannot_be_written_is_refused_at_once(
    capsys, tmp_path, monkeypatch, run, command
):
    file = tmp_path / "a.npz"
    file.write_text("of the user's")
    argv = [str(run) if word == "RUN" else word for word in command.split()]
    name, ending = argv[0], ".pth" if argv[0] == "export" else ".npz"
    below = file / f"results{ending}"
    message = failure(capsys, *argv, "--out", below)
    assert f"{name}: out must be below folders, got {below}: {file} is a file" in message
    if WRITING[command] == "folder":
        message = failure(capsys, *argv, "--out", file)
        assert f"{name}: out must be a folder, got {file}: {file} is a file" in message
    elif name != "export":  # which refuses what is there
        (tmp_path / "b.npz").mkdir()
        message = failure(capsys, *argv, "--out", tmp_path / "b.npz")
        assert f"{name}: out must be a file, got the folder {tmp_path / 'b.npz'}" in message
    monkeypatch.setattr("fastssl.outputs.os.access", lambda path, mode: path != tmp_path)
    message = failure(capsys, *argv, "--out", tmp_path / f"new{ending}")
    assert f"{name}: out must be where you may write" in message and str(tmp_path) in message
    assert file.read_text() == "of the user's" and not (tmp_path / f"new{ending}").exists()


def test_results_of_evaluate_are_not_merged_into_another_file(capsys, tmp_path, run):
    (tmp_path / "notes.txt").write_text("mine")
    message = failure(capsys, "evaluate", run, "--protocol", "knn", "--out", tmp_path / "notes.txt")
    assert "notes.txt must be JSON" in message


def test_help_of_every_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "fastssl pretrain METHOD" in out and "Exit codes: 0 done" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main([]) == 2
    assert "fastssl pretrain METHOD" in capsys.readouterr().err
    wanted = {
        "pretrain simclr": ["--temperature X", "tau of the NT-Xent loss", "--batch-size N"],
        "pretrain": ["METHOD: simclr", "--config FILE"],
        "evaluate": ["--protocol LIST", "--random", "Default: knn,linear,kshot."],
        "pretrain lejepa digits": [
            "those of lejepa on digits",
            "SIGReg in the loss. Default: 0.02.",
        ],
        "pretrain lejepa x": ["Passes over the images. Default: 100.", "normalisation are left"],
        "export": ["--format FORMAT", "safetensors and onnx"],
        "embed": ["WHAT FOLDER", "arrays features, paths"],
        "methods": ["fastssl methods"],
        "report": ["RUN [RUN ...]", "--no-images"],
        "demo": ["--out DIR"],
        "info": ["which kernel"],
    }
    for command, texts in wanted.items():
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--help"])
        out = capsys.readouterr().out
        assert stopped.value.code == 0
        assert [line for line in out.splitlines()[1:] if len(line) > 80] == []
        words = " ".join(out.split())
        assert [text for text in texts if text not in words] == [], command


def test_flags_override_the_file_and_files_the_recipe(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("method: simclr\nepochs: 7\nlr: 1e-3\nmethod_args: {out_dim: 32}\n")
    out = tmp_path / "run"
    argv = ["pretrain", "--config", str(file), "--out", str(out), *TINY, "--temperature", "0.3"]
    assert main([*argv, "--batch_size=512"]) == 0  # underscores are dashes
    config = settings(out)
    assert (config["epochs"], config["lr"], config["batch_size"]) == (1, 1e-3, 512)
    assert config["method_args"] == {"temperature": 0.3, "out_dim": 32}
    assert config["weight_decay"] == 1e-4, "from the recipe"


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("lr: fast\n")
    message = failure(capsys, "pretrain", "simclr", "--config", file, "--epochs", "x")
    assert "command line: epochs must be" in message
    message = failure(capsys, "pretrain", "simclr", "--config", file)
    assert f"{file}: lr must be a number or none, got 'fast'" in message


def test_evaluate_prints_the_table_and_writes_results_and_plots(run, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    argv = ["evaluate", str(run), "--data", "digits", "--protocol", "knn, diagnostics"]
    argv += ["--cache", str(tmp_path)]
    assert main([*argv, "--random", "--plots"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["top-1,", "%", "random", "pretrained", "gap"]
    assert "knn-20" in out and "rankme" in out and "linear" not in out
    results = json.loads((run / "results.json").read_text())["digits"]
    assert set(results) == {"random", "pretrained"}
    assert str(run / "report.html") in out and (run / "report.html").stat().st_size > 5000


def test_every_option_is_in_one_group_of_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "simclr", "--help"])
    out = capsys.readouterr().out
    names = {f.name for f in dataclasses.fields(PretrainConfig)} - {"method", "data", "method_args"}
    for name in names:
        assert len(re.findall(rf"^  --{name.replace('_', '-')}(?![-\w])", out, re.MULTILINE)) == 1
    assert not set(" ".join(pretrain.GROUPS.values()).split()) - names


def test_methods_are_told_with_paper_and_recipes(capsys, monkeypatch):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    for name in METHODS:
        assert re.search(rf"^{name} +\w+: .+", out, re.MULTILINE)
    assert "simclr      SimCLR: two views" in out and "arXiv 2002.05709; recipes: digits" in out
    assert out.count("arXiv") == len(METHODS)


def test_export_and_embed(rgb_run, tmp_path, capsys):
    run, images = rgb_run
    assert (
        main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "a.pth")]) == 0
    )
    out = capsys.readouterr().out
    assert "a.pth: student of resnet_small" in out and "features differ by 0.0e+00" in out
    assert "exists" in failure(
        capsys, "export", run, "--format", "timm", "--out", tmp_path / "a.pth"
    )
    out = tmp_path / "features.npz"
    assert main(["embed", str(run), str(images), "--out", str(out), "--batch-size", "3"]) == 0
    printed = capsys.readouterr()
    assert f"{out}: 6 images, 128 features" in printed.out
    assert "left out: b/broken.png (UnidentifiedImageError" in printed.err
    written = numpy.load(out)
    assert written["paths"].tolist() == [f"{c}/{n}.png" for c in "ab" for n in range(3)]
    assert written["features"].shape == (6, 128) and written["features"].dtype == "float32"


def test_info_names_versions_and_every_implementation(capsys, monkeypatch):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastssl.__version__ in out
    lines = [line.split()[:2] for line in out.splitlines()]
    for op in ("contrastive", "queue", "siglip"):
        assert [op, "cpu"] in lines and [op, "cuda"] in lines
    monkeypatch.setattr(extension, "why_missing", "it was not built")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "it was not built" in out
    assert re.search(r"fastssl's cpu kernels +none$", out, re.MULTILINE)


@pytest.mark.parametrize("command", ["--help", "methods"])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    code = "import sys; from fastssl.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    assert b"BrokenPipe" not in child.communicate()[1]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastssl {fastssl.__version__}\n"


def test_demo_exit_code_and_folder_in_use(tmp_path, capsys, monkeypatch):
    for passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(demo, "demo", lambda out, passed=passed: passed)
        assert main(["demo", "--out", str(tmp_path)]) == code
    monkeypatch.undo()
    (tmp_path / "digits-1").mkdir()
    assert "which holds a demo" in failure(capsys, "demo", "--out", tmp_path)


@pytest.mark.parametrize(
    ("gaps", "failing"),
    [
        ({"digits-0": 6.0, "digits-1": 6.0, "digits-2": 6.0, "patches-0": 8.0}, []),
        ({"digits-0": 6.0, "digits-1": 5.9, "digits-2": 6.0, "patches-0": 8.0}, ["digits, seed 1"]),
        (
            {"digits-0": 6.0, "digits-1": 6.0, "digits-2": 6.0, "patches-0": 7.9},
            ["patches, seed 0"],
        ),
    ],
)
def test_demo_compares_every_gap_with_its_bound(tmp_path, capsys, monkeypatch, gaps, failing):
    def scores(run, weights):
        base = 50.0 + (gaps[run.name] if weights == "pretrained" else 0.0)
        return {"all": {"top1_percent": dict.fromkeys(demo.SHOWN, base)}}

    monkeypatch.setattr(demo, "pretrain", lambda config: None)
    monkeypatch.setattr(demo, "evaluate", scores)
    monkeypatch.setattr(demo, "report", lambda run: run / "report.html")
    assert demo.demo(tmp_path) is not bool(failing)
    out = capsys.readouterr().out
    verdicts = [line for line in out.splitlines() if line.startswith(("pass  ", "FAIL  "))]
    assert len(verdicts) == 4
    assert [line[6:].split(":")[0] for line in verdicts if line.startswith("FAIL")] == failing
    assert str(tmp_path / "patches-0" / "report.html") in out


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(info, "run", lambda argv: {}["bug"])
    with pytest.raises(KeyError):
        main(["info"])


def start(*argv):
    command = [sys.executable, "-m", "fastssl.cli", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_subprocess_error_has_no_traceback(tmp_path):
    process = start("evaluate", tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_by_which_signal_and_how_to_resume(tmp_path, capsys, number):
    run = tmp_path / "a run"
    process = start("pretrain", "simclr", "--out", run, "--epochs", 400, "--device", "cpu")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert out.splitlines()[-1] == f"resume with: fastssl pretrain --resume --out '{run}'"
    assert "cannot resume" in failure(capsys, "pretrain", "--resume", "--out", run, "--lr", "0.1")
    assert "not finished" in failure(capsys, "evaluate", run)


def test_resume_without_out_takes_the_settings_of_the_methods_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/simclr")
    (tmp_path / "runs/simclr/summary.json").unlink()
    assert main(["pretrain", "simclr", "--resume"]) == 0
    assert (tmp_path / "runs/simclr/summary.json").is_file()


def test_resume_of_a_finished_run_is_done_at_once(run, capsys):
    before = (run / "backbone.safetensors").read_bytes()
    assert main(["pretrain", "--resume", "--out", str(run)]) == 0
    assert "4 steps" in capsys.readouterr().out
    assert (run / "backbone.safetensors").read_bytes() == before


def test_import_is_light():
    heavy = "torchvision timm sklearn skimage matplotlib rich tyro yaml PIL safetensors".split()
    code = f"import sys, fastssl.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
