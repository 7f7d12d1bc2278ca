"""The README's first command, as a user runs it."""
import json
import subprocess
import sys

from conftest import ROOT


def test_demo(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train_lm.py", "--demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "out" / "demo" / "s1-all"
    base, tuned = (row["measures"]["perplexity"] for row in json.loads((run / "perplexity-16bit.json").read_text())["rows"])
    assert tuned["high"] < base["low"]                                  # better by more than both intervals
    for part in ("synthetic", "validation_loss", "95% interval", "PROMPT:", "COMPLETION:"):
        assert part in done.stdout
    completion = done.stdout.split("COMPLETION:")[1].split("\n\n")[0]
    assert len(completion.split()) > 20
    again = subprocess.run([sys.executable, ROOT / "eval.py", "perplexity", run, "--samples", "5"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "s1-all" in again.stdout           # the run directory is all that an evaluation needs
