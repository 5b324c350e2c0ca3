"""The page on several GPUs is one script; torchrun runs it on two ranks (`tests/test_docs.py` on one)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
    script = tmp_path / "page.py"
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    script.write_text("\n".join([*snippets, "print('end of the page')"]), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout.count("end of the page") == 2, done.stderr
