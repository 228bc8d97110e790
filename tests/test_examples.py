"""Every Python block of the README and of the documentation runs, top to bottom, one page after another."""

import contextlib
import importlib.util
import re
from pathlib import Path

import cupy_double
import kit
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    if "```python" in page.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if "import torch\n" in text and kit.torch is None:
        pytest.skip(kit.NO_TORCH)
    if "import jax\n" in text and kit.jax is None:
        pytest.skip(kit.NO_JAX)
    if "from transformers" in text and importlib.util.find_spec("transformers") is None:
        pytest.skip(kit.NO_PEERS)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {"__name__": page.stem}
    with cupy_double.installed() if "import cupy\n" in text else contextlib.nullcontext():
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)  # blocks of a page share their names
    assert "Traceback" not in capsys.readouterr().err
