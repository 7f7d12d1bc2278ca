"""Shared by all tests: the project on the import path, and the real inputs where they are."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"          # real inputs, beside the repository; a user's clone has none
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def smollm2(request):
    """Directory of SmolLM2-135M-Instruct: real pretrained weights of Llama architecture."""
    tool = SHARED / "tools" / "smollm2.py"
    if not tool.exists():
        pytest.skip("needs ../shared/tools/smollm2.py, which unpacks real weights")
    directory = request.config.cache.mkdir("smollm2")
    if not (directory / "tokenizer.json").exists():
        made = subprocess.run([sys.executable, str(tool), str(directory)], capture_output=True, text=True)
        if made.returncode:
            pytest.fail(f"smollm2.py could not unpack the weights: {made.stderr[-500:]}")
    return directory


@pytest.fixture(scope="session")
def abstracts():
    """Path of 25,224 real hep-th records."""
    path = SHARED / "data" / "hepth_1992_2001.jsonl.gz"
    if not path.exists():
        pytest.skip("needs ../shared/data/hepth_1992_2001.jsonl.gz, real records")
    return path
