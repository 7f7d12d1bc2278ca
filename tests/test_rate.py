"""eval.py rate in a real headless Chromium: rate by keyboard, reload, save, collect; LaTeX; hostile completions. And the statistics."""
import base64
import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import eval as nano_eval

HOSTILE = ["<img src=x onerror=\"window.hacked=1\">", "</script><script>window.hacked=1</script>", "<!--<script>", "<svg onload=window.hacked=1>",
           "$\\frac{<img src=x onerror=window.hacked=1>}{\\mathrm{<script>window.hacked=1</script>}}$", "<a href=\"javascript:window.hacked=1\">click</a>",
           "\" autofocus onfocus=\"window.hacked=1", "<style>body{display:none}</style>", "$" + "{" * 30000 + "$", "$\\constructor \\__proto__ \\toString{x}$",
           "<iframe srcdoc=\"<script>parent.hacked=1</script>\"></iframe>", "\u2028 \u0000 \U0001f600"]


def write_completions(path, completion_of, models=("base", "s1-all"), n=12):
    with open(path, "w") as file:
        for model in models:
            for i in range(n):
                file.write(json.dumps({"id": f"id{i}", "prompt": f"Prompt {i}.", "truth": f"The truth {i}.", "completion": completion_of(model, i),
                                       "model": model, "settings": {}}) + "\n")
    return path


class Browser:
    """Chromium through chromedriver's HTTP interface (W3C WebDriver)."""

    def __init__(self, profile):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url, self.downloads = f"http://127.0.0.1:{port}", profile / "downloads"
        for _ in range(100):
            try:
                urllib.request.urlopen(self.url + "/status").read()
                break
            except OSError:
                time.sleep(0.1)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--disable-quic", "--disable-dev-shm-usage", "--window-size=1000,1300", f"--user-data-dir={profile / 'profile'}"]
        options = {"args": flags, "prefs": {"download.default_directory": str(self.downloads)}}
        self.url += "/session/" + self("", capabilities={"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                                                          "goog:loggingPrefs": {"browser": "ALL"}}}, path="/session")["sessionId"]

    def __call__(self, what, method="POST", path=None, **body):
        request = urllib.request.Request(self.url + (f"/{what}" if path is None else path), json.dumps(body).encode() if method == "POST" else None,
                                         {"Content-Type": "application/json"}, method=method)
        try:
            return json.loads(urllib.request.urlopen(request, timeout=60).read())["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode()[:500]) from None

    def open(self, path):
        self("url", url=Path(path).resolve().as_uri())

    def js(self, script):
        return self("execute/sync", script="return " + script, args=[])

    def type(self, *keys):
        strokes = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self("actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def click(self, selector):
        """A real click: a download wants one."""
        found = self("element", using="css selector", value=selector)
        self(f"element/{next(iter(found.values()))}/click")

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self("screenshot", "GET")))

    def close(self):
        try:
            self("", "DELETE", path="")
        finally:
            self.driver.terminate()
            self.driver.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver (Debian's packages chromium and chromium-driver)")
    b = Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


def page_of(path, *arguments):
    nano_eval.main(["rate", str(path), *map(str, arguments)])
    return path.with_suffix(".rate.html")


def saved(browser, rater):
    """Type the name, save, -> the file that the browser downloads."""
    browser.js(f"(() => {{ const r = document.getElementById('rater'); r.value = {json.dumps(rater)}; r.dispatchEvent(new Event('input')); }})()")
    browser.click("#save")
    for _ in range(100):
        done = [p for p in browser.downloads.glob(f"ratings-{rater}-*.json")] if browser.downloads.exists() else []
        if done:
            return done[0]
        time.sleep(0.1)
    raise AssertionError("nothing was downloaded")


def test_rate_reload_save_collect(browser, tmp_path, capsys):
    """Keyboard rating of one abstract; a reload keeps it; the saved files of two raters become the table, by model."""
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: f" Words of {m}, {i}, are hidden.".replace("base", "B").replace("s1-all", "S"))
    html = page_of(path, "--samples", 3)
    assert not any(name in html.read_text() for name in ("s1-all", "base\"", "id0", "id1\"", ".jsonl"))           # blind
    key = json.loads(next(tmp_path.glob("c.*.key.json")).read_text())
    assert len(key) == 9 and [key[f"{n}/{j}"]["model"] for n in range(3) for j in range(3)] != ["truth", "base", "s1-all"] * 3
    browser.open(html)
    assert browser.js("document.querySelectorAll('section').length") == 3 and browser.js("document.querySelectorAll('fieldset').length") == 18
    browser.click("#save")
    assert "name first" in browser.js("document.getElementById('message').textContent") and not browser.downloads.exists()
    browser.js("document.activeElement.blur()")
    browser.type("7", "0", "1", "\ue015", "5")                # seven, ten, one; down: skips relevance's next; five
    assert browser.js("document.getElementById('count').textContent") == "4 of 54"
    browser.open(html)
    assert browser.js("document.getElementById('count').textContent") == "4 of 54" and browser.js("document.querySelectorAll('.rated').length") == 4
    browser.type("n")
    assert "Abstract 2 of 3" in browser.js("document.querySelector('h2').textContent")
    browser.type("3")
    browser.open(html)
    assert "Abstract 2 of 3" in browser.js("document.querySelector('h2').textContent")                            # the place is kept, too
    first = saved(browser, "Ada")
    content = json.loads(first.read_text())
    assert content["rater"] == "Ada"
    assert content["ratings"] == {"0/0": {"grammar": 7, "coherence": 10, "relevance": 1, "creativity": 5}, "1/0": {"grammar": 3}}
    browser.click("#previous")
    for section, mark in ((0, 8), (1, 4), (2, 6)):
        browser.js(f"document.querySelectorAll('section')[{section}].querySelectorAll('fieldset')[5].querySelectorAll('input')[{mark - 1}].click()")
    second = saved(browser, "Emmy")
    capsys.readouterr()
    nano_eval.main(["rate", str(path), "--collect", str(first), str(second)])
    report = json.loads((tmp_path / "c.rating.json").read_text())
    means = {r["model"]: r["means"] for r in report["models"]}
    assert report["raters"] == ["Ada", "Emmy"] and sorted(means) == ["base", "s1-all", "truth"]
    for j, mark in enumerate((8, 4, 6)):
        assert means[key[f"0/{j}"]["model"]]["overall"]["mean"] == mark
    assert means[key["0/0"]["model"]]["coherence"]["mean"] == 10 and report["agreement"]["grammar"] == 1          # both files hold Ada's marks
    assert "agreement" in capsys.readouterr().out


def test_hostile_completions(browser, tmp_path):
    """Nothing in a completion becomes an element, runs, or loads; all of it is shown as text; the page stays usable."""
    path = write_completions(tmp_path / "h.jsonl", lambda m, i: HOSTILE[i] if m == "base" else f"Fine {i}.")
    html = page_of(path, "--samples", 0)
    key = json.loads(next(tmp_path.glob("h.*.key.json")).read_text())
    browser.open(html)
    for n in range(12):
        shown = browser.js("[...document.querySelectorAll('section .text')].map(e => e.textContent)")
        item, = [j for j in range(3) if key[f"{n}/{j}"]["model"] == "base"]
        text = HOSTILE[int(key[f"{n}/{item}"]["id"][2:])]
        if not text.startswith("$\\"):                        # those two are well-formed formulae
            assert shown[item].strip("$").split() == text.strip().strip("$").split()
        allowed = "main,h2,h3,p,section,fieldset,legend,label,input,span,i,b,sub,sup"
        foreign = f"!e.matches('{allowed}') || [...e.attributes].some(a => /^(on|src|href|style)/.test(a.name))"
        assert browser.js(f"[...document.querySelectorAll('main *')].filter(e => {foreign}).length") == 0
        browser.type("n")
    assert browser.js("window.hacked === undefined") and browser.js("document.scripts.length") == 2
    browser.js("document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    time.sleep(0.3)
    assert browser.js("window.hacked === undefined")          # even if HTML did get in, the policy would not let it run
    assert [e["message"] for e in browser("se/log", type="browser") if e["level"] == "SEVERE" and "Content Security Policy" not in e["message"]
            and "favicon" not in e["message"]] == []


def test_latex(browser, tmp_path):
    """Greek, operators, scripts, fractions, roots, fonts; what is not known or not well formed stays as source."""
    cases = {
        r"Mass $m_{\pi}^2 \sim \Lambda^{-1}$ here": ("Mass mπ2 ∼ Λ−1 here", "sub", "sup"),
        r"$\frac{1}{2}\partial_\mu\phi$": ("12∂μϕ", ".frac", "sub"),
        r"${\cal N}=4$, $\mathbb{R}^{3,1}$, $\mathcal{O}(1)$": ("N=4, ℝ3,1, O(1)", ".cal", "sup"),
        r"\(\sqrt{s} \to \infty\) and $\bar\psi$, $SU(N)\times U(1)$": ("√s → ∞ and ψ\u0304, SU(N)×U(1)", ".root", "i"),
        r"$\unknown{x} \alpha$ costs \$5": (r"\unknownx α costs \$5", ".math", "i"),
        r"$\frac{1}$ and $x^$ and $a}$ and {\it text}": (r"$\frac{1}$ and $x^$ and $a}$ and {\it text}", "p", "p"),
        r"$\mathrm{Tr}\,\mathbf{F}\wedge F$ $\le$ {\bf 1}": (r"Tr F∧F ≤ {\bf 1}", "b", ".rm"),
    }
    texts = list(cases)
    path = write_completions(tmp_path / "l.jsonl", lambda m, i: texts[i], ["base"], len(texts))
    html = page_of(path, "--samples", 0)
    key = json.loads(next(tmp_path.glob("l.*.key.json")).read_text())
    browser.open(html)
    for n in range(len(texts)):
        item, = [j for j in range(2) if key[f"{n}/{j}"]["model"] == "base"]
        source = texts[int(key[f"{n}/{item}"]["id"][2:])]
        expected, *selectors = cases[source]
        section = f"document.querySelectorAll('section')[{item}]"
        assert "".join(browser.js(f"{section}.querySelector('.text').textContent").split()) == "".join(expected.split()), source
        assert all(browser.js(f"{section}.querySelector('{s}') !== null") for s in selectors), source
        browser.type("n")


def test_the_page_needs_no_network_and_is_the_same_again(tmp_path):
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: "x")
    first = page_of(path).read_text()
    assert page_of(path).read_text() == first and page_of(path, "--seed", 1).read_text() != first
    assert "default-src 'none'" in first and "http:" not in first and "https:" not in first


# ------------------------------------------------------------------------------------------------------------- statistics


def test_krippendorff():
    """Krippendorff's own example for interval data (Computing Krippendorff's alpha-reliability, 2011): 0.849."""
    nan = math.nan
    example = np.array([[1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
                        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan]])
    assert nano_eval.krippendorff_alpha(example) == pytest.approx(0.849, abs=5e-4)
    assert nano_eval.krippendorff_alpha(np.array([[1., 5, 9], [1, 5, 9]])) == 1
    assert math.isnan(nano_eval.krippendorff_alpha(np.array([[1., nan], [nan, 3]])))
    rng = np.random.default_rng(0)
    assert abs(nano_eval.krippendorff_alpha(rng.integers(1, 11, (3, 4000)).astype(float))) < 0.03


def test_collect(tmp_path, capsys):
    """Means over abstracts of the means over raters, their intervals, and the place in the table."""
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: m)
    page_of(path)
    key_file = next(tmp_path.glob("c.*.key.json"))
    key, page = json.loads(key_file.read_text()), key_file.name.split(".")[1]
    rng, level = np.random.default_rng(1), {"truth": 8, "s1-all": 5, "base": 2}
    marks, files = {}, []
    for rater in ("a", "b", "c"):
        ratings = {item: {"overall": int(level[v["model"]] + rng.integers(-1, 3))} for item, v in key.items() if rater != "c" or item < "5"}
        for item, r in ratings.items():
            marks.setdefault((key[item]["model"], key[item]["id"]), []).append(r["overall"])
        files.append(tmp_path / f"{rater}.json")
        files[-1].write_text(json.dumps({"page": page, "rater": rater, "ratings": ratings}))
    nano_eval.main(["rate", str(path), "--collect", *map(str, files)])
    report = json.loads((tmp_path / "c.rating.json").read_text())
    for row in report["models"]:
        values = np.array([np.mean(v) for (model, _), v in marks.items() if model == row["model"]])
        overall = row["means"]["overall"]
        assert overall["mean"] == pytest.approx(values.mean()) and overall["low"] < values.mean() < overall["high"]
        assert overall["abstracts"] == 12 == len(values)
        assert overall["ratings"] == sum(len(v) for (model, _), v in marks.items() if model == row["model"])
    assert report["agreement"]["overall"] > 0.8 and report["agreement"]["grammar"] is None
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("truth", "s1-all", "base"))]
    assert table == ["truth", "s1-all", "base"]


def test_refusals(tmp_path, capsys):
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: m)
    page_of(path)
    page = next(tmp_path.glob("c.*.key.json")).name.split(".")[1]

    def error(*contents):
        files = []
        for i, content in enumerate(contents):
            files.append(str(tmp_path / f"r{i}.json"))
            Path(files[-1]).write_text(content if isinstance(content, str) else json.dumps(content))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(["rate", str(path), "--collect", *files])
        assert stop.value.code == 2 and not (tmp_path / "c.rating.json").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]
    good = {"page": page, "rater": "a", "ratings": {"0/0": {"overall": 3}}}
    assert "no file that the rating page saved" in error("{") and "no file that the rating page saved" in error({"rater": 1})
    assert "no file that the rating page saved" in error(good | {"page": "../../etc"})
    assert "key" in error(good | {"page": "0" * 12})
    for marks in ({"overall": 11}, {"overall": "9"}, {"charm": 3}, {"overall": True}, 7):
        assert "r0.json: item 0/0" in error(good | {"ratings": {"0/0": marks}})
    assert "item 99/0" in error(good | {"ratings": {"99/0": {"overall": 3}}})
    assert "another file by the rater a" in error(good, good) and "hold no rating yet" in error(good | {"ratings": {}})
    write_completions(path, lambda m, i: m, ["base"], 2)
    with open(path, "a") as file:
        file.write(json.dumps({"id": "other", "prompt": "", "truth": "", "completion": "", "model": "s1-all", "settings": {}}) + "\n")
    with pytest.raises(SystemExit):
        nano_eval.main(["rate", str(path)])
    assert "no abstract" in capsys.readouterr().err
