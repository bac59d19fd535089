"""The page in headless Chromium, where there is one: wide and narrow, light and dark, live."""

import json
import re
import shutil
import threading

import pytest

from jaxrlhf.apps.watch import Server
from jaxrlhf.run.report import write_report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")

SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
EVIL = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


def write_run(folder, steps):
    """A run with a long history, chats, and what would like to be a script."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"algorithm: {{name: ppo}}\nsteps: {steps}\n")
    names = ("reward", "score", "kl", "length", "loss", "grad_norm", "tokens_per_second", "mfu")
    metrics = [
        {"step": i, "clip_fraction": 0.0, **{name: i / (k + 1) for k, name in enumerate(names)}}
        for i in range(1, steps + 1)
    ]
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQuestion {}?<|im_end|>\n"
    samples = [
        {
            "step": step,
            "split": "eval",
            "prompt": chat.format(q),
            "completion": f"answer {q} of step {step} {EVIL} " + "and on " * 200,
            "gold": 0.5,
        }
        for step in range(0, steps + 1, steps // 10)
        for q in range(30)
    ]
    for name, rows in {"metrics.jsonl": metrics, "samples.jsonl": samples}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """(url, width, scheme) → a page there, whose console has to stay empty, and the seconds
    of work that opening it took."""
    said, contexts = [], []

    def go(url, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=False
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        # By the time that the browser's main thread worked: other tests have the machine as well.
        tools = context.new_cdp_session(page)
        tools.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(url)
        measured = tools.send("Performance.getMetrics")["metrics"]
        seconds = {metric["name"]: metric["value"] for metric in measured}
        return page, seconds["TaskDuration"]

    yield go
    for context in contexts:
        context.close()
    assert said == []


def test_the_page_is_small_quick_and_fits(visit, tmp_path):
    path = write_report([write_run(tmp_path / "run", 5000)])
    with open(path, "rb") as file:
        assert len(file.read()) < 3e6
    for width, scheme in SIZES:
        page, seconds = visit(f"file://{path}", width, scheme)
        assert seconds < 1
        assert page.evaluate("document.documentElement.scrollWidth") == width
        # A chart alone is no wider than one of many.
        wide = page.locator("figure").first.bounding_box()["width"]
        assert wide < 480
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(20, 22, 26)") == (scheme == "dark")
        assert page.title().startswith("ppo: ")


def test_the_page_answers(visit, tmp_path):
    page, _ = visit(f"file://{write_report([write_run(tmp_path / 'run', 100)])}", 390)
    figure = page.locator("figure", has_text="Loss").first
    box = figure.locator("svg").bounding_box()
    page.mouse.move(0, 0)
    figure.locator("svg").scroll_into_view_if_needed()
    figure.locator("svg").hover(position={"x": box["width"] - 12, "y": 40})
    tip = figure.locator(".tip")
    assert tip.inner_text().split("\n") == ["iteration 100", "ppo 20.0"]
    inside = tip.bounding_box()
    assert 0 <= inside["x"] <= inside["x"] + inside["width"] <= 390
    page.mouse.move(0, 0)
    assert not tip.is_visible()

    turns = page.locator(".sample").first.locator(".turn")
    assert turns.all_inner_texts() == ["system\nBe kind.", "user\nQuestion 0?"]
    labels = page.locator(".sample").first.locator(".answer b").all_inner_texts()
    assert labels == ["step 0", "step 20", "step 50", "step 80", "step 100"]
    assert page.locator(".sample:visible").count() == 5
    page.locator(".search").fill("answer 17")
    shown = page.locator(".sample:visible")
    assert shown.count() == 1
    assert "Question 17?" in shown.inner_text()
    page.locator(".search").fill("")
    assert page.locator(".sample:visible").count() == 24  # opened by the search


def test_the_page_follows_a_run(visit, tmp_path):
    folder = write_run(tmp_path / "run", 10)
    with Server([str(folder)]) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        page, _ = visit(server.url)
        assert "10 of 10 iterations" in page.locator("header").inner_text()
        page.locator("summary").last.click()
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 11, "loss": 1.0}) + "\n")
        page.get_by_text("11 of 10 iterations").wait_for()
        assert page.locator("details").last.get_attribute("open") is not None
        page.get_by_text("as of").wait_for()
        assert re.search(r"Follows the run: as of \d+:\d+", page.locator("#state").inner_text())
        assert page.title().startswith("ppo: ")  # and no script of a completion has run
        server.shutdown()
