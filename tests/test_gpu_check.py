"""benchmarks/gpu_check.py, with quick parts in the place of those that need a GPU."""

import importlib
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastssl import cli

SAYS = "import sys; print('2 passed in 1s'); sys.exit({})"
SLEEPS = "print('1 passed', flush=True)\nimport signal, time\n{}time.sleep(60)"


@pytest.fixture
def check(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    check = importlib.import_module("gpu_check")
    monkeypatch.setattr(check, "GATHERED", tmp_path / "gathered")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(check, "BUILD", ["-c", SAYS.format(0)])
    return check


@pytest.mark.parametrize("part", ["benchmarks", "steps"])
def test_commands_are_those_of_fastssl_bench(check, capsys, part):
    _, command, _, _ = check.PARTS[part]
    assert command[:3] == ["-m", "fastssl.cli", "bench"]
    assert cli.main([*command[2:], "--minutes", "2", "--out", "nowhere", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 6


def test_tests_are_there(check):
    for part in ("kernel-tests", "op-tests"):
        place, command, _, _ = check.PARTS[part]
        files = [word for word in command if word.endswith(".py")]
        assert len(files) >= 5 and all((check.ROOT / place / name).is_file() for name in files)


def test_parts_share_the_time_and_a_call_ends_before_ten_minutes(check, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    ran = []

    def run(command, place, limit):
        minutes = command[command.index("--minutes") + 1] if "--minutes" in command else None
        ran.append((limit, minutes and 60 * float(minutes)))
        return {"exit_code": 0}

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check.time, "time", lambda: sum(limit for limit, _ in ran))
    assert check.main([]) == 0
    limits = dict(zip(("build", *check.PARTS), ran, strict=True))
    assert sum(limit for limit, _ in ran) == pytest.approx(check.TOTAL_S)
    assert all(limit > 60 for limit, _ in ran)
    for part in ("benchmarks", "steps"):
        limit, measuring = limits[part]
        assert measuring < limit - check.GRACE_S
    ran.clear()
    check.main(["steps"])
    assert ran[1][0] == pytest.approx(check.TOTAL_S - check.BUILD_S)
    assert ran[1][1] == pytest.approx(ran[1][0] - check.LAST_S, abs=1)


def test_calls_add_up_to_one_file(check, monkeypatch, tmp_path, capsys):
    for part, code in (("kernel-tests", 1), ("op-tests", 0)):
        monkeypatch.setitem(check.PARTS, part, ("tests", ["-c", SAYS.format(code)], 1, None))
    monkeypatch.setenv("OUT", str(tmp_path / "first"))
    assert check.main(["kernel-tests"]) == 1
    assert "failed: kernel-tests" in capsys.readouterr().out
    monkeypatch.setenv("OUT", str(tmp_path / "second"))
    assert check.main(["op-tests"]) == 0
    assert "all parts passed" in capsys.readouterr().out
    report = json.loads((tmp_path / "second" / "gpu-check.json").read_text())
    assert report["gpu"] == "NVIDIA H200"
    assert [report[name]["exit_code"] for name in ("build", "kernel-tests", "op-tests")] == [
        0,
        1,
        0,
    ]
    assert report["op-tests"]["summary"] == "2 passed in 1s" and not report["op-tests"]["late"]
    with pytest.raises(SystemExit):
        check.main(["op-test"])
    assert "part must be one of" in capsys.readouterr().err


def test_nothing_is_measured_of_an_old_build(check, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "BUILD", ["-c", SAYS.format(3)])
    assert check.main([]) == 1
    assert "failed: build" in capsys.readouterr().out
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["build"]["tail"] == ["2 passed in 1s"] and "op-tests" not in report


@pytest.mark.parametrize(
    ("ignores", "code"), [("", None), ("signal.signal(2, signal.SIG_IGN)\n", -signal.SIGKILL)]
)
def test_what_is_late_is_interrupted_and_then_killed(check, tmp_path, ignores, code):
    report = check.run(["-c", SLEEPS.format(ignores)], tmp_path, 4)
    assert report["late"] and report["summary"] == "1 passed"
    assert report["exit_code"] == code if code else report["exit_code"] != -signal.SIGKILL
    assert any("KeyboardInterrupt" in line for line in report["tail"]) is not bool(code)


LEAVES = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(300)"],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
print(child.pid)
sys.exit(1)
"""


def test_what_a_part_leaves_behind_is_ended(check, tmp_path):
    (pid,) = check.run(["-c", LEAVES], tmp_path, 60)["tail"]

    def state():
        return subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True).stdout

    deadline = time.monotonic() + 10
    while state().strip()[:1] not in (b"", b"Z"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
