"""The page at `/` in a real browser, against the real HTTP side: a job from prompt to comparison, and what may go wrong."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from PIL import Image

from serving.generate_request import GenerateRequest
from tests.serving.running import Running

pytestmark = pytest.mark.browser
NASTY = "<img src=x onerror=\"window.pwned='yes'\"> it's a 'test' </h2><script>window.pwned='yes'</script>"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
KEY = "a-key-for-the-test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("no system Chromium: install the chromium package to run the page's browser tests")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("page"), step_s=0.03, queue={"max_queued": 1}) as running:
        yield running


class Visit:
    """A page that was opened, what its console said, and what it asked for."""

    def __init__(self, browser: Any, url: str, *, clock: bool = False, **options: Any) -> None:
        """`clock`: the page's time may be moved on with `page.clock`."""
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if clock:
            self.page.clock.install()
        self.page.goto(url)

    def wait(self, selector: str) -> Any:
        return self.page.wait_for_selector(selector)

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#generate")

    def submit(self, prompt: str) -> None:
        """Ask, and wait until the new job is the one in view."""
        self.ask(prompt)
        self.page.locator("#view .prompt", has_text=prompt).wait_for()

    def wait_state(self, state: str) -> str:
        """The id of the job in view, once it is in that state."""
        self.wait(f"#view .badge[data-state={state}]")
        job: str = self.page.locator("#view .job").get_attribute("data-job")
        return job

    def leave(self, *expected: str) -> None:
        """Close it; it stayed at home, and its console said nothing but the statuses that the test provoked."""
        self.context.close()
        strangers = [url for url in self.requests if not url.startswith((f"{self.url}/", f"blob:{self.url}/"))]
        assert strangers == []
        assert [text for text in self.troubles if not any(word in text for word in expected)] == []


@pytest.fixture()
def visit(browser: Any, server: Running) -> Iterator[Visit]:
    visit = Visit(browser, server.url)
    visit.wait("#server[data-state=ready]")
    yield visit
    visit.context.close()


def test_a_job_from_the_prompt_to_the_comparison(visit: Visit, server: Running) -> None:
    page = visit.page
    page.click("#seed-draw")
    seed = int(page.input_value("#seed"))
    visit.submit(NASTY)
    visit.wait("#view [data-stage=base][aria-current=step]")
    bar = page.locator("#view [role=progressbar]")
    assert 0 < int(bar.get_attribute("aria-valuenow")) < 100
    assert "step" in bar.get_attribute("aria-valuetext")

    visit.wait("#view [data-stage=refine][aria-current=step]")
    visit.wait("#view [data-pane=base] video")
    assert page.locator("#view [data-pane=result] video").count() == 0, "the preview is there before the result"
    job = visit.wait_state("completed")
    visit.wait("#view [data-pane=result] video")
    page.wait_for_timeout(300)
    sizes = "nodes => nodes.map((video) => [video.videoWidth, video.videoHeight])"
    assert page.locator("#view video").evaluate_all(sizes) == [[160, 96], [240, 144]]
    assert page.locator("#view .pane:visible").count() == 2

    # what was typed is text, wherever it stands
    assert page.locator("#view .prompt").inner_text() == NASTY
    assert NASTY in page.locator(".card-prompt").first.inner_text()
    assert page.locator("main img[src=x]").count() == 0
    assert page.evaluate("window.pwned") is None

    # one clock
    times = "nodes => nodes.map((video) => video.currentTime)"
    apart = [abs(a - b) for a, b in (page.locator("#view video").evaluate_all(times) for _ in range(5))]
    assert sorted(apart)[2] < 0.13, apart
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="One frame on").click()
    page.wait_for_timeout(200)
    first, second = page.locator("#view video").evaluate_all(times)
    assert abs(first - second) < 0.01
    page.select_option("[aria-label=Zoom]", "4")
    widths = page.locator("#view .frame").evaluate_all("nodes => nodes.map((node) => node.style.width)")
    assert widths == ["960px", "960px"]
    assert page.locator("#view .panes.pixelated").count() == 1
    page.get_by_label("Overlay").check()
    assert page.locator("#view [data-pane=result] video").evaluate("node => node.style.clipPath") == "inset(0px 0px 0px 50%)"

    # the command makes the same file
    page.evaluate("() => { navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }; }")
    page.get_by_role("button", name="Copy as curl").click()
    words = shlex.split(page.evaluate("window.copied"))
    body = json.loads(words[words.index("-d") + 1])
    assert body["seed"] == seed == server.service.store.get(job).resolved["seed"]
    assert body["wait"] is True
    again = httpx2.post(words[2], json=body, timeout=60)
    assert again.headers["content-type"] == "video/mp4"
    first, second = (server.service.store.get(one).resolved for one in (job, again.headers["x-waver-job"]))
    assert {**first, "prompt": ""} == {**second, "prompt": ""}
    assert body["prompt"] == first["prompt"], "rewritten once; a language model might word it otherwise the next time"
    assert body["rewrite"] is False
    visit.leave()


def test_the_command_is_one_that_a_shell_understands(visit: Visit, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    page = visit.page
    picture = tmp_path / "first_frame.png"
    picture.write_bytes(_png())
    page.set_input_files("#first_frame", str(picture))
    page.get_by_role("switch", name="Refine").uncheck(force=True)
    visit.submit("@it's moving; echo $HOME")
    visit.wait_state("completed")
    visit.wait("#view [data-pane=result] video")
    assert page.locator("#view .pane:visible").count() == 1, "nothing to compare with"
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    page.get_by_role("button", name="Copy as curl").click()
    command = page.locator("#view .command").input_value()
    subprocess.run(["sh", "-c", f"{command} --silent --noproxy '*'"], cwd=tmp_path, check=True, timeout=60)
    (video,) = tmp_path.glob("job_*.mp4")
    assert video.read_bytes()[4:8] == b"ftyp"
    visit.leave()


def test_cancel_then_delete(visit: Visit, server: Running) -> None:
    page = visit.page
    visit.submit("slow: to be cancelled")
    visit.wait("#view [data-stage=base][aria-current=step]")
    page.get_by_role("button", name="Cancel", exact=True).click()
    job = visit.wait_state("cancelled")
    assert server.service.store.get(job).state == "cancelled"
    assert page.locator(f".card[data-job={job}] .badge").inner_text() == "Cancelled"
    assert page.locator("#view .notice").inner_text() == "The job was cancelled; it made no result."
    page.get_by_role("button", name="Delete").click()
    assert server.service.store.get(job) is not None, "asked once more before it is gone"
    page.get_by_role("button", name="Really delete?").click()
    page.wait_for_selector(f".card[data-job={job}]", state="detached")
    assert server.service.store.get(job) is None
    visit.leave()


def test_a_failed_job_says_why_and_can_be_used_again(visit: Visit) -> None:
    page = visit.page
    page.fill("#seed", "41")
    page.select_option("#style", "pixel")
    visit.submit("this will fail")
    visit.wait_state("failed")
    told = page.locator("#view .notice > *").all_inner_texts()
    assert told == ["The model ran out of memory: ask for a smaller size.", "out_of_memory"]
    page.reload()
    visit.wait("#view .badge[data-state=failed]")
    assert page.input_value("#prompt") == ""
    page.get_by_role("button", name="Use again").click()
    assert page.input_value("#prompt") == "this will fail"
    assert (page.input_value("#seed"), page.input_value("#style")) == ("41", "pixel")
    visit.leave()


def test_a_full_queue_counts_down(visit: Visit, server: Running) -> None:
    page = visit.page
    visit.submit("slow: the first")
    visit.wait("#view .badge[data-state=in_progress]")
    visit.submit("the second waits")
    visit.wait("#view .badge[data-state=queued]")
    assert "Next in the queue" in page.locator("#view .standing").inner_text()
    visit.ask("the third is one too many")
    visit.wait("#form-error:not([hidden])")
    answer = httpx2.post(f"{server.url}/generate", json={"prompt": "the fourth, too"})
    assert answer.status_code == 429
    assert page.locator("#form-error").inner_text() == answer.json()["error"]["message"]
    assert page.locator("#generate").inner_text().startswith("Try again in ")
    assert page.locator("#generate").is_disabled()
    assert page.input_value("#prompt") == "the third is one too many"
    page.get_by_role("button", name="Cancel", exact=True).click()
    visit.wait_state("cancelled")
    page.locator(".card", has_text="slow: the first").click()
    page.get_by_role("button", name="Cancel", exact=True).click()
    visit.wait_state("cancelled")
    visit.leave("429")


def test_refusals_are_shown_at_their_field(visit: Visit) -> None:
    page = visit.page
    page.click("#generate")
    assert page.locator("#form-error").inner_text() == "Say in the prompt what to show."
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.select_option("#size", "custom")
    page.fill("#width", "99")
    page.fill("#height", "64")
    visit.ask("an impossible size")
    page.wait_for_selector("#form-error:has-text('99x64')")
    assert page.locator("#size").get_attribute("aria-invalid") == "true"
    visit.leave("400")


def test_the_page_fits_a_phone_and_needs_no_mouse(browser: Any, server: Running) -> None:
    visit = Visit(browser, server.url, viewport={"width": 390, "height": 844}, color_scheme="dark", reduced_motion="reduce")
    page = visit.page
    visit.wait("#server[data-state=ready]")
    page.get_by_role("radio", name="Image").check(force=True)
    assert not page.locator("#seconds").is_visible()
    page.focus("#prompt")
    page.keyboard.type("A still picture")
    page.keyboard.press("Control+Enter")
    visit.wait_state("completed")
    visit.wait("#view [data-pane=result] img")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    names = "nodes => nodes.filter((node) => !(node.ariaLabel || node.innerText || node.title).trim()).length"
    assert page.locator("button:visible").evaluate_all(names) == 0, "every button has a name"
    unnamed = "nodes => nodes.filter((node) => !node.labels?.length && !node.ariaLabel).map((node) => node.outerHTML)"
    assert page.locator("input, select, textarea").evaluate_all(unnamed) == []
    visit.leave()


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "test", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}))
    with Running(tmp_path / "server", http={"api_keys": str(keys)}) as server:
        visit = Visit(browser, server.url)
        page = visit.page
        visit.wait("#key[open]")
        page.fill("#key-value", KEY)
        page.get_by_role("button", name="Use this key").click()
        page.wait_for_selector("#key", state="hidden")
        visit.submit("A boat")
        visit.wait_state("completed")
        visit.wait("#view [data-pane=result] video")
        visit.wait(".card .thumb img")
        stores = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert stores == [[KEY], [], ""]
        assert not any(KEY in url for url in visit.requests)

        server.stop()
        visit.wait("#offline:not([hidden])")
        assert page.locator("#server").inner_text() == "Offline"
        server.start()
        page.wait_for_selector("#offline", state="hidden")
        visit.wait("#server[data-state=ready]")
        visit.leave("401", "ERR_")


def test_a_key_can_be_typed_in_peace_and_enter_uses_it(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "test", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}))
    with Running(tmp_path / "server", http={"api_keys": str(keys)}) as server:
        visit = Visit(browser, server.url, clock=True)
        page = visit.page
        visit.wait("#key[open]")
        page.focus("#key-value")
        page.keyboard.type(KEY[:5])
        asked = len(visit.requests)
        page.clock.run_for(30_000)
        page.evaluate("fetch('/ui/icon.svg')")
        assert [url for url in visit.requests[asked:] if not url.endswith("icon.svg")] == [], "nothing is asked without a key"
        page.evaluate("() => { document.getElementById('prompt').value = 'x'; document.getElementById('generate').click(); }")
        page.wait_for_selector("#form-error:not([hidden])", state="attached")
        assert page.input_value("#key-value") == KEY[:5]
        page.keyboard.type(KEY[5:])
        page.keyboard.press("Enter")
        visit.wait("#server[data-state=ready]")
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
        page.get_by_role("button", name="API key").click()
        assert page.input_value("#key-value") == KEY
        page.get_by_role("button", name="Forget it").click()
        visit.wait("#key[open]")
        assert page.evaluate("Object.values(sessionStorage)") == []
        visit.leave("401")


def test_every_size_that_is_offered_is_taken(visit: Visit, server: Running) -> None:
    page, service = visit.page, server.service
    offered: list[list[str]] = []
    for kind in ("video", "image"):
        for refine in (True, False):
            page.get_by_role("radio", name=kind.capitalize()).check(force=True)
            page.get_by_role("switch", name="Refine").set_checked(refine, force=True)
            values = page.locator("#size option").evaluate_all("options => options.map((option) => option.value)")
            label = page.locator("#size option").first.inner_text()
            for size in values[:-1]:
                asked = GenerateRequest.model_validate({"prompt": "x", "kind": kind, "refine": refine, "size": size or None})
                made = service.plan(asked, service.facts, service.settings, 1)  # raises where the server would refuse it
                assert size or label in ("Default", f"{made.width_px} × {made.height_px}")
            offered.append([label, *values[1:]])
    base = ["Default", "custom"]
    assert offered == [["240 × 144", "144x240", "custom"], base, ["Default", "144x144", "custom"], base]
    page.get_by_role("switch", name="Refine").check(force=True)
    page.select_option("#size", "144x144")
    visit.submit("a square")
    assert service.store.get(visit.wait_state("completed")).resolved["width_px"] == 144
    page.get_by_role("radio", name="Video").check(force=True)
    assert page.input_value("#size") == "", "a size of the other kind is not kept"
    page.get_by_role("button", name="Use again").click()
    assert page.input_value("#size") == "144x144"
    visit.leave()


def test_an_image_has_its_picture_in_the_history(visit: Visit) -> None:
    visit.page.get_by_role("radio", name="Image").check(force=True)
    visit.submit("A still picture for the history")
    visit.wait(f".card[data-job={visit.wait_state('completed')}] .thumb img")
    visit.leave()


def test_a_picture_that_failed_to_load_comes_when_its_row_is_seen_again(visit: Visit) -> None:
    page, asked = visit.page, list[str]()

    def refuse_once(route: Any) -> None:
        asked.append(route.request.url)
        _ = route.fulfill(status=503, body="") if len(asked) == 1 else route.continue_()

    visit.submit("a picture that comes late")
    job = visit.wait_state("completed")
    page.route(lambda url: url.endswith(f"{job}/content?variant=thumbnail"), refuse_once)
    with page.expect_response(lambda response: response.url.endswith(f"{job}/content?variant=thumbnail")):
        page.reload()
    while page.locator(f".card[data-job={job}] .thumb img").count() == 0:
        page.select_option("#filter", "expired")
        page.wait_for_selector(f".card[data-job={job}]", state="detached")
        page.select_option("#filter", "")
        page.wait_for_selector(f".card[data-job={job}]")
    assert len(asked) == 2
    visit.leave("503")


def test_the_queue_is_counted_under_a_filter_too(visit: Visit, server: Running) -> None:
    page, store = visit.page, server.service.store
    visit.submit("something to look at meanwhile")
    visit.wait_state("completed")
    running = httpx2.post(f"{server.url}/generate", json={"prompt": "slow: not followed", "steps": 100}).json()["id"]
    while store.get(running).state == "queued":
        time.sleep(0.02)
    page.select_option("#filter", "failed")
    page.wait_for_selector("#queue-line:has-text('1 running')")
    page.select_option("#filter", "")
    page.wait_for_selector(f".card[data-job={running}]")
    page.select_option("#filter", "failed")
    assert page.inner_text("#queue-line") == "1 running", "its row is not shown"
    store.cancel(running)
    page.wait_for_function("() => document.getElementById('queue-line').textContent === ''")
    assert page.locator(f".card[data-job={running}]").count() == 0 and store.get(running).state == "cancelled"
    visit.leave()


def test_older_jobs_are_all_reached_after_a_filter_has_brought_some_of_them(visit: Visit, server: Running) -> None:
    page, store = visit.page, server.service.store

    def made(prompt: str) -> str:
        while (
            answer := httpx2.post(f"{server.url}/generate", json={"prompt": prompt, "steps": 1, "seconds": 1})
        ).status_code == 429:
            time.sleep(0.02)
        job_id: str = answer.json()["id"]
        while not store.get(job_id).ended:
            time.sleep(0.01)
        return job_id

    ids = [made("fail, long ago"), *(made(f"number {number}") for number in range(30))]
    page.reload()
    page.wait_for_selector(f".card[data-job={ids[-1]}]")
    page.select_option("#filter", "failed")
    page.wait_for_selector(f".card[data-job={ids[0]}]")
    with page.expect_response(lambda response: "/jobs?limit=12" in response.url):
        page.select_option("#filter", "")
    further = True
    while further:
        page.wait_for_selector("#more", state="visible")
        with page.expect_response(lambda response: "/jobs?limit=12" in response.url and "after=" in response.url) as answer:
            page.click("#more")
        further = answer.value.json()["has_more"]
        page.wait_for_selector(f".card[data-job={answer.value.json()['data'][-1]['id']}]")
    page.wait_for_selector("#more", state="hidden")
    shown = page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.job)")
    assert set(ids) <= set(shown) and [job_id for job_id in shown if job_id in ids] == ids[::-1]
    visit.leave()


def _png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (160, 96), (200, 40, 40)).save(data, "PNG")
    return data.getvalue()
