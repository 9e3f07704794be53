"""The examples of docs/: each page's, one after the other as a reader would run them, in an empty
folder."""

import re
from pathlib import Path
from unittest import mock

import pytest

from fastssl.methods import METHODS

PAGES = sorted(Path(__file__).parents[1].glob("docs/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
    assert code
    for library in ("open_clip", "lightly", "bitsandbytes", "timm"):
        if library in code:
            pytest.importorskip(library)
    with mock.patch.dict(METHODS):  # a page adds one, which has no page of its own
        exec(compile(code, str(page), "exec"), {"__name__": page.stem})
