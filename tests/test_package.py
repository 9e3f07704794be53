"""What a user meets first: the import, its warnings, and the examples of the docstrings."""

import doctest
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys

import pytest

import fastssl

MODULES = [m.name for m in pkgutil.walk_packages(fastssl.__path__, "fastssl.")]
EXAMPLES = [
    name
    for name in MODULES
    if not name.endswith("._C")
    and b">>>" in (importlib.util.find_spec(name).loader.get_data(
        importlib.util.find_spec(name).origin))
]  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import torch

    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_import_pulls_in_nothing_optional():
    code = (
        "import sys, fastssl;"
        "found = {'torchvision', 'timm', 'sklearn', 'matplotlib', 'rich', 'yaml', 'PIL'};"
        "assert not found & set(sys.modules), found & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stranger_of_the_same_name_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: None)
    with pytest.warns(UserWarning, match="unrelated TLS certificate client"):
        importlib.reload(fastssl)


def test_a_bare_checkout_says_what_to_do(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "fastssl.kernels" else real(n)
    )
    with pytest.raises(ImportError, match="pip install -e . --no-build-isolation"):
        importlib.reload(fastssl)


def test_a_missing_extension_is_said_at_import(monkeypatch):
    monkeypatch.setattr(fastssl.extension, "why_missing", "it was not built")
    with pytest.warns(UserWarning, match="it was not built.*reference"):
        importlib.reload(fastssl)
