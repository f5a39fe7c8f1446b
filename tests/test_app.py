"""The web page in a real browser: Debian's chromium, if installed, driven by Playwright.

ADNI_LDM_SCREENSHOTS=folder keeps the screenshots, which are otherwise deleted with the temporary folder.
"""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from gradio.state_holder import StateHolder
from PIL import Image
from stand_ins import blob_image, make_condition_embedding, make_pipeline
from starlette.datastructures import Headers

from adni_ldm.errors import UserError
from adni_ldm.generation import generate_images, generate_progressively, hash_pipeline, image_seed
from adni_ldm.hub.report import Report, find_report
from adni_ldm.hub.space import push_space, write_space
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.web.components import verdict_list
from adni_ldm.web.guard import Guard, read_accounts
from adni_ldm.web.uploads import read_upload

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
VERDICTS = {
    "fidelity": {"good": True, "text": "They pass <b>for</b> real ones."},
    "usefulness": {"good": None, "text": "Too few subjects."},
    "faithfulness": {"good": True, "text": "Ventricles differ."},
    "privacy": {"good": False, "text": "Three samples are copies."},
}


# ---- The server and its visitors ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "ldm"
    pipeline = make_pipeline()
    pipeline.unet.register_to_config(_trained_on=[{"hash": "d" * 64, "hash_of": "all files", "ids": ""}])
    pipeline.save_pretrained(folder)
    (folder / "report").mkdir()
    metrics = {"model_hash": hash_pipeline(pipeline), "data_hash": "d" * 64, "verdicts": VERDICTS}
    (folder / "report/metrics.json").write_text(json.dumps(metrics))
    return folder


@contextlib.contextmanager
def serve(model, folder, *more, program=("app.py",)):
    """URL of the page, and the folder of the server's temporary files."""
    options = ("--model", model, "--port", "0", "--queue_size", "2", "--max_steps", "400", *more)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", *program, *map(str, options)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},
        )
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield found.group(), folder
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as a new visitor. Fails if the page requests anything from another machine."""
    visitors, elsewhere = [], []

    def open_page(width=1200, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        visitors.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        own = (server[0], "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or elsewhere.append(request.url))
        page.goto(server[0])
        page.get_by_role("button", name="Sample").wait_for()
        return page

    yield open_page
    for context in visitors:
        context.close()
    assert not elsewhere


@pytest.fixture
def screenshot(tmp_path, request):
    folder = Path(os.environ.get("ADNI_LDM_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    name = request.node.name.removeprefix("test_")
    return lambda page: page.screenshot(path=folder / f"{name}.png", full_page=True)


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()
    page.get_by_role("tabpanel").filter(visible=True).wait_for()


def fill(page, label, value):
    """Type a value into the visible field with that label."""
    field = page.get_by_role("spinbutton", name=label).filter(visible=True)
    field.fill(str(value))
    field.press("Tab")


def choose(page, group, name):
    page.get_by_role("group", name=group, exact=True).get_by_role("radio", name=name).check()


def shown(page):
    """The images on the visible tab, {caption: array}."""
    images = page.locator(".slices img").filter(visible=True)
    read = {}
    for image in images.all():
        kind, content = image.get_attribute("src").split(",")
        assert kind == "data:image/png;base64"
        read[image.get_attribute("alt")] = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    return read


def saved(page):
    """What the download link saves: {name: bytes}, and the rows of metadata.csv."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").filter(visible=True).click()
    with zipfile.ZipFile(download.value.path()) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return files, pd.read_csv(io.BytesIO(files.pop("metadata.csv")))


def stored_files(server):
    """Files of the server, empty ones as well, but for its log."""
    return [path for path in server[1].rglob("*") if path.is_file() and path.name != "log"]


def expected_samples(label, seed, number, steps):
    """What sample.py generates, (number, H, W) in 8 bits."""
    seeds = [image_seed(seed, index) for index in range(number)]
    images = generate_images(make_pipeline(), [label] * number, seeds, number, num_inference_steps=steps)
    images = next(images)
    return (images[:, 0] * 255).round().numpy()


# ---- In the browser ------------------------------------------------------------------------------------


def test_sample(visit, screenshot, server):
    page = visit()
    fill(page, "Number of slices", 3)
    fill(page, "Denoising steps", 200)
    fill(page, "Seed", 5)
    choose(page, "Class", "NC")
    page.evaluate(
        """() => { window.seen = new Set(); window.bars = new Set();
        new MutationObserver(() => {
            document.querySelectorAll('.slices img').forEach(i => window.seen.add(i.src));
            document.querySelectorAll('progress').forEach(p => window.bars.add(p.ariaLabel));
        }).observe(document.body, {childList: true, subtree: true}) }"""
    )
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("3 slices of class NC, seed 5.").wait_for()
    screenshot(page)
    images = shown(page)
    assert list(images) == ["NC 0", "NC 1", "NC 2"]
    assert page.evaluate("window.seen.size") > 3, "intermediate images were shown"
    assert page.evaluate("window.bars.size") >= 1, "with a progress bar"

    files, rows = saved(page)
    assert list(rows.file_name) == list(files) == [f"NC/{index:06d}.png" for index in range(3)]
    assert list(rows.seed) == [image_seed(5, index) for index in range(3)]
    assert set(rows.num_inference_steps) == {200} and set(rows.label) == {"NC"}
    assert set(rows.guidance_scale) == {1} and set(rows.eta) == {1}, "the model's own"
    assert set(rows.model_hash) == {hash_pipeline(make_pipeline())}
    for image, content in zip(images.values(), files.values()):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(content))))
    if set(rows.precision) == {"no"}:  # else bf16 here, and float32 in this process
        expected = expected_samples(1, seed=5, number=3, steps=200)
        assert np.abs(np.stack(list(images.values())) - expected).max() <= 1, "equal to those of sample.py"
    assert not stored_files(server), "nothing is stored"


def test_compare(visit, screenshot):
    page = visit()
    open_tab(page, "Compare classes")
    for label in ("Denoising steps", "Guidance scale"):
        fill(page, label, 5)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Both slices were sampled with seed 0.").wait_for()
    screenshot(page)
    nc, ad, difference = shown(page).values()
    assert list(shown(page))[:2] == ["NC", "AD"] and difference.shape == (16, 16, 3)
    change = ad.astype(int) - nc
    colours = difference.astype(int)
    assert (colours[..., 0] > colours[..., 2])[change > 20].all(), "red where AD is brighter"
    assert (colours[..., 0] < colours[..., 2])[change < -20].all(), "blue where it is darker"
    files, rows = saved(page)
    assert set(files) == {"NC.png", "AD.png", "difference.png"} and rows.seed.nunique() == 1

    choose(page, "To class", "NC")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Choose two different classes.").wait_for()


def test_counterfactual(visit, screenshot, server, tmp_path):
    page = visit()
    open_tab(page, "Counterfactual")
    page.get_by_role("button", name="Compute counterfactual").click()
    page.get_by_text("Upload a slice first.").wait_for()
    blob_image([3], 64, 60).save(tmp_path / "mine.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    page.get_by_alt_text("Uploaded slice").first.wait_for()
    page.get_by_role("button", name="Compute counterfactual").click()
    page.get_by_text("Choose the class of the slice.").wait_for()
    choose(page, "Class of the slice", "NC")
    fill(page, "Denoising steps", 4)
    page.get_by_role("button", name="Compute counterfactual").click()
    page.get_by_text("Mean reconstruction error").wait_for()
    screenshot(page)
    images = shown(page)
    assert {"Uploaded slice", "Uploaded slice, NC", "Counterfactual, AD"} < set(images) and len(images) == 5
    files, rows = saved(page)
    assert set(files) == {"counterfactual.png", "difference.png"}, "without the uploaded slice"
    assert set(rows["from"]) == {"NC"} and set(rows.label) == {"AD"} and (rows.round_trip_error > 0).all()
    assert not stored_files(server), "nothing is stored"


def test_conditions(conditioned, browser, screenshot, tmp_path):
    blob_image([3], 64, 60).save(tmp_path / "mine.png")
    with serve(conditioned[1], tmp_path) as (address, _):
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        fill(page, "age", 75)
        fill(page, "Denoising steps", 3)
        page.get_by_label("sex").filter(visible=True).click()
        page.get_by_role("option", name="F").click()
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("4 slices of class AD, age=75, sex=F, seed 0.").wait_for()
        fill(page, "age", "")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("4 slices of class AD, sex=F, seed 0.").wait_for()
        fill(page, "age", 95)
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("age=95 is outside of the range in training, 55 to 90").wait_for()
        open_tab(page, "Counterfactual")
        page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
        page.get_by_alt_text("Uploaded slice").first.wait_for()
        for group in ("Class of the slice", "Target class"):
            choose(page, group, "NC")
        fill(page, "age of the slice", 60)
        fill(page, "Target age", 85)
        fill(page, "Denoising steps", 4)
        page.get_by_role("button", name="Compute counterfactual").click()
        page.get_by_alt_text("Counterfactual, NC, age=85").wait_for()
        screenshot(page)
        page.close()


def test_bad_upload(visit, screenshot, tmp_path):
    page = visit()
    open_tab(page, "Counterfactual")
    (tmp_path / "scan.png").write_text("not a scan")
    page.locator("input[type=file]").set_input_files(tmp_path / "scan.png")
    page.get_by_role("alert").filter(has_text="not an image").wait_for()
    screenshot(page)
    (tmp_path / "huge.png").write_bytes(os.urandom(11_000_000))
    page.locator("input[type=file]").set_input_files(tmp_path / "huge.png")
    page.get_by_text(re.compile("exceed|too large", re.I)).first.wait_for()
    blob_image([3], 64, 64).save(tmp_path / "mine.png")
    page.reload()
    open_tab(page, "Counterfactual")
    page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    page.get_by_alt_text("Uploaded slice").wait_for()


def test_two_visitors_at_once(visit, screenshot):
    pages = {label: visit() for label in ("AD", "NC")}
    for seed, (label, page) in enumerate(pages.items()):
        fill(page, "Denoising steps", 30)
        fill(page, "Seed", seed)
        choose(page, "Class", label)
    for page in pages.values():
        page.get_by_role("button", name="Sample").click()
    for seed, (label, page) in enumerate(pages.items()):
        page.get_by_text(f"4 slices of class {label}, seed {seed}.").wait_for()
        assert list(shown(page)) == [f"{label} {index}" for index in range(4)]
        assert set(saved(page)[1].seed) == {image_seed(seed, index) for index in range(4)}
    screenshot(page)


def test_a_full_queue(visit, screenshot):
    """With one request running and two waiting, a fourth is refused; the others get their slices."""
    pages = [visit() for _ in range(4)]
    fill(pages[0], "Number of slices", 16)
    fill(pages[0], "Denoising steps", 400)
    pages[0].get_by_role("button", name="Sample").click()
    pages[0].get_by_role("progressbar").first.wait_for()
    for page in pages[1:]:
        page.get_by_role("button", name="Sample").click()
        page.wait_for_timeout(300)
    pages[3].get_by_text("currently busy").first.wait_for()
    screenshot(pages[3])
    pages[0].close()  # which ends the request of 400 steps: it would take a minute on a slow machine
    for page in pages[1:3]:
        page.get_by_text("4 slices of class").wait_for(timeout=180_000)


def test_keyboard_on_a_narrow_screen(visit, screenshot):
    page = visit(width=360, height=740)
    for name in ("Compare classes", "Counterfactual", "Sample"):
        tab = page.get_by_role("tab", name=name)
        if not tab.filter(visible=True).count():
            page.get_by_role("button", name="More tabs").or_(
                page.locator(".overflow-menu button")
            ).first.click()
        tab.or_(page.get_by_role("button", name=name, exact=True)).filter(visible=True).first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "no horizontal scrolling"
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, button, a')].filter(e => e.offsetParent)
            .filter(e => ![e.ariaLabel, e.title, e.innerText, ...[...(e.labels || [])].map(l => l.innerText)]
                .some(name => name?.trim())).map(e => e.outerHTML.slice(0, 200))"""
        )
        assert not nameless, "every control has a name"
    fill(page, "Denoising steps", 3)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Sample":
            break
    page.keyboard.press("Enter")
    page.get_by_text("4 slices of class").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    screenshot(page)


def test_evaluation(visit, screenshot):
    page = visit()
    open_tab(page, "Evaluation")
    page.get_by_text("are training images memorized? Yes. Three samples are copies.").wait_for()
    page.get_by_text("They pass <b>for</b> real ones.").wait_for()
    page.get_by_text("Inconclusive. Too few subjects.").wait_for()
    screenshot(page)


def test_only_this_machine_can_connect(server):
    port = int(server[0].rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(OSError):  # another address of the same machine
        socket.create_connection(("127.0.0.2", port), timeout=5)


# ---- Requests that no browser on the page sends --------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Host": "a]b"}, 403),
        ({"Origin": "https://other.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_requests_of_other_sites_are_refused(server, headers, status):
    assert httpx.get(f"{server[0]}/config", headers=headers).status_code == status
    if status == 200:
        assert httpx.get(f"{server[0]}/config", headers={"Origin": server[0]}).status_code == 200


def test_uploads_that_are_refused_leave_no_file(server):
    address, small = f"{server[0]}/gradio_api/upload", png(blob_image([1], 64, 64))
    many = [("files", (f"{number}.png", small)) for number in range(40)]
    assert httpx.post(address, files=many).status_code == 400
    large = bytes(11 << 20)
    assert httpx.post(address, files={"files": ("a.png", large)}).status_code == 413

    def pieces():
        for _ in range(11):
            yield bytes(1 << 20)

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert httpx.post(address, content=pieces(), headers=kind).status_code == 413
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", int(server[0].rpartition(":")[2]))) as broken_off:
        lines = ["POST /gradio_api/upload HTTP/1.1", "Host: localhost", "Content-Length: 9999"]
        lines += [f"Content-Type: {kind['Content-Type']}", "", head]
        broken_off.sendall("\r\n".join(lines).encode())
        time.sleep(1)
    time.sleep(1)
    assert not stored_files(server)
    assert httpx.post(f"{server[0]}/gradio_api/queue/join", content=bytes(100_000)).status_code == 413


def send_upload(address, number, size):
    content = number.to_bytes(4) + bytes(size - 4)
    return httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", content)})


def test_uploads_that_nobody_reads_fill_no_disk(model, tmp_path):
    with serve(model, tmp_path, "--max_upload_mb", "1") as server:
        for number in range(100):
            if (answer := send_upload(server[0], number, 900_000)).status_code != 200:
                break
        assert answer.status_code == 507 and answer.text.startswith("the page has no room for uploads now")
        files = stored_files(server)
        assert len(files) == number and 48 << 20 < sum(path.stat().st_size for path in files) < 50 << 20
        for path in files[:2]:  # as when they are read: their folders stay
            path.unlink()
        assert send_upload(server[0], 100, 900_000).status_code == 200
        assert not any(path.parent.exists() for path in files[:2])
    assert not list(tmp_path.glob("adni_ldm_app_*")), "removed by SIGTERM"


def test_an_upload_that_nobody_reads_is_deleted(model, tmp_path):
    program = ("-c", "import app; app.UPLOAD_SECONDS = 10; app.main()")
    with serve(model, tmp_path, program=program) as server:
        assert send_upload(server[0], 0, 100).status_code == 200 and len(stored_files(server)) == 1
        deadline = time.monotonic() + 60
        while stored_files(server):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_an_upload_is_kept_eleven_minutes_at_most_and_its_pixels_ten(conditioned):
    app, folder, _ = conditioned
    page, sessions = app.build_page(app.AppConfig(model=str(folder))), StateHolder()
    assert sum(page.delete_cache) <= 660
    sessions.set_blocks(page)
    (pixels,) = (block for block in page.blocks.values() if isinstance(block, app.gr.State))
    session = sessions["visitor"]
    for seconds, kept in ((590, True), (610, False)):
        session[pixels._id] = np.zeros((16, 16), np.uint8)
        session._state_ttl[pixels._id] = (pixels.time_to_live, datetime.now() - timedelta(seconds=seconds))
        sessions.delete_all_expired_state()
        assert (session[pixels._id] is not None) is kept


def test_the_server_connects_to_nothing_but_itself(model, tmp_path):
    """Of a model on this machine; what the page in a browser requests is watched by `visit`."""
    code = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("CONNECT", arguments[1] if event == "socket.connect" else arguments[0], flush=True)
sys.addaudithook(watch)
import app
app.main()
"""
    with serve(model, tmp_path, program=("-c", code)) as (address, folder):
        assert httpx.get(f"{address}/config").status_code == 200
        time.sleep(5)  # gradio asks for its newest version in a thread
        seen = [line for line in (folder / "log").read_text().splitlines() if line.startswith("CONNECT")]
    assert seen and all("127.0.0.1" in line or "localhost" in line for line in seen), seen


@pytest.mark.parametrize("place", ["path", "url"])
@pytest.mark.parametrize("kind", [{"Content-Type": "application/json"}, {}])
def test_addresses_in_an_upload_are_not_fetched(server, place, kind):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(2)
        address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/a.png"
        file = {"path": "a.png", "url": None, "meta": {"_type": "gradio.FileData"}} | {place: address}
        body = json.dumps({"data": [file], "fn_index": 2, "session_hash": "a"}).replace("//", "\\/\\/")
        answer = httpx.post(f"{server[0]}/gradio_api/queue/join", content=body, headers=kind)
        assert (answer.status_code, answer.text) == (400, "addresses are not fetched")
        for path in (f"file={address}", f"proxy={address}"):
            assert httpx.get(f"{server[0]}/gradio_api/{path}").status_code == 400
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_page_that_is_open_to_others_needs_a_password_or_no_auth(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    import app

    monkeypatch.setattr("sys.argv", ["app.py", *([] if by_environment else ["--host", "0.0.0.0"])])
    with pytest.raises(UserError, match="--host: others can connect; .* --auth, or --no_auth"):
        app.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--no_auth", "--model", "./nothing"])
    with pytest.raises(UserError, match="nothing: no such folder"):
        app.main()


def test_accounts_are_lines_of_a_file(tmp_path):
    (tmp_path / "good").write_text("ann:one:two\n\nbob:three\n")
    assert read_accounts(str(tmp_path / "good")) == [("ann", "one:two"), ("bob", "three")]
    for content in ("", "ann", "ann:", ":one"):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(UserError, match="NAME:PASSWORD"):
            read_accounts(str(tmp_path / "bad"))
    with pytest.raises(UserError, match="cannot be read"):
        read_accounts(str(tmp_path / "none"))


def test_with_auth_only_who_logs_in_is_served(model, tmp_path):
    (tmp_path / "accounts").write_text("ann:secret\n")
    with serve(model, tmp_path, "--auth", tmp_path / "accounts") as (address, _), httpx.Client() as visitor:
        assert visitor.get(f"{address}/config").status_code == 401
        assert visitor.post(f"{address}/gradio_api/queue/join", json={"data": []}).status_code == 401
        assert visitor.post(f"{address}/login", data={"username": "ann", "password": "x"}).status_code == 400
        visitor.post(f"{address}/login", data={"username": "ann", "password": "secret"}).raise_for_status()
        assert visitor.get(f"{address}/config").status_code == 200


@pytest.mark.parametrize(
    ("host", "allowed", "asked", "served"),
    [
        ("0.0.0.0", [], "192.0.2.1:80", True),
        ("0.0.0.0", [], socket.gethostname(), True),
        ("0.0.0.0", [], "rebound.example", False),
        ("0.0.0.0", ["page.example"], "PAGE.example:443", True),
        (None, [], "192.0.2.1", False),
    ],
)
def test_an_open_page_answers_to_its_names_and_to_numbers(host, allowed, asked, served):
    guard = Guard(None, host=host, allowed_hosts=allowed, max_upload=1, folder="")
    assert (guard._foreign(Headers({"host": asked})) == "") == served


def test_a_space_has_the_names_that_the_hub_gives_it(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "me/page")
    guard = Guard(None, host="0.0.0.0", allowed_hosts=[], max_upload=1, folder="")
    assert guard._foreign(Headers({"host": "me-page.example", "origin": "https://hub.example"})) == ""


# ---- Without a browser ---------------------------------------------------------------------------------


def test_uploads_that_are_not_a_slice_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    grey = blob_image([1], 64, 64)
    cases = {
        "in colour": lambda path: Image.fromarray(noise).save(path, "PNG"),
        # By its header: these pixels cannot be decoded.
        "4097 x 4097 .*at most 4096": lambda path: path.write_bytes(png(Image.new("L", (4097, 4097)))[:60]),
        "too large": lambda path: Image.new("1", (20000, 20000)).save(path, "PNG"),
        "at least 32": lambda path: grey.resize((20, 20)).save(path, "PNG"),
        "factor of two": lambda path: grey.resize((300, 64)).save(path, "PNG"),
        "uniform": lambda path: Image.new("L", (64, 64), 7).save(path, "PNG"),
        "3 images": lambda path: grey.save(path, "TIFF", save_all=True, append_images=[grey, grey]),
        "not an image": lambda path: grey.save(path, "PDF"),
        "damaged": lambda path: path.write_bytes(png(grey)[:600]),
    }
    for message, write in cases.items():
        write(tmp_path / "upload")
        with pytest.raises(UserError, match=message):
            read_upload(tmp_path / "upload", 16)
        assert not (tmp_path / "upload").exists(), "deleted"


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "1", "P"])
def test_a_slice_in_any_mode_is_accepted(tmp_path, mode):
    grey = blob_image([1], 64, 48)
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16) if mode == "I;16" else grey.convert(mode)
    image.save(tmp_path / "upload.png")
    pixels = read_upload(tmp_path / "upload.png", 16)
    assert pixels.shape == (16, 16) and pixels.dtype == np.uint8 and np.ptp(pixels) > 50
    assert not (tmp_path / "upload.png").exists()


def test_which_report_is_shown(tmp_path, model):
    own, data = hash_pipeline(make_pipeline()), {"d" * 64}
    report = find_report(str(model), None, own, data)
    assert report == find_report("anywhere", str(model / "report"), own, data)
    assert [verdict.good for verdict in report.verdicts] == [True, None, True, False]
    assert "evaluates another model" in verdict_list(find_report(str(model), None, "other", data))
    assert "was not trained on" in verdict_list(find_report(str(model), None, own, {"e" * 64}))
    assert "there is no report" in verdict_list(find_report(str(tmp_path), None, own, data))
    assert "contains no report" in verdict_list(find_report("me/model", None, own, data))
    assert "<li>" not in verdict_list(Report(missing="none"))
    with pytest.raises(UserError, match="contains no metrics.json"):
        find_report(str(model), str(tmp_path), own, data)


@pytest.mark.parametrize(("most", "shown"), [(100, 31), (20, 20)])
def test_the_sliders_start_at_the_models_own_settings(pipeline, tmp_path, most, shown):
    pytest.importorskip("gradio", reason="gradio is not installed")
    import app
    from adni_ldm.config import AppConfig

    own = {"num_inference_steps": 31, "guidance_scale": 2.5}
    ClassConditionalLDMPipeline(**pipeline.components, **own).save_pretrained(tmp_path)
    blocks = app.build_page(AppConfig(model=str(tmp_path), max_steps=most)).blocks.values()
    sliders = [(block.label, block.value) for block in blocks if isinstance(block, app.gr.Slider)]
    assert sliders.count(("Denoising steps", shown)) == 3
    assert sliders.count(("Guidance scale (1: no guidance)", 2.5)) == 3


# ---- Fields of a model's conditions, and the functions behind the buttons ------------------------------


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """The app module, a folder of a model with conditions, and its `app.Model`."""
    app = pytest.importorskip("app", reason="gradio is not installed", exc_type=SystemExit)
    folder = tmp_path_factory.mktemp("conditioned")
    make_pipeline(condition_embedding=make_condition_embedding()).save_pretrained(folder)
    return app, folder, app.Model(app.AppConfig(model=str(folder)))


def test_the_page_has_the_fields_that_the_model_has(conditioned, model):
    app, folder, _ = conditioned

    def fields(folder):
        blocks = app.build_page(app.AppConfig(model=str(folder))).blocks.values()
        kinds = (app.gr.Number, app.gr.Dropdown)
        return [block for block in blocks if isinstance(block, kinds) and block.label != "Seed"]

    found = fields(folder)
    labels = ["age", "sex"] * 2 + ["age of the slice", "sex of the slice", "Target age", "Target sex"]
    assert [field.label for field in found] == labels
    assert {field.info for field in found[:4:2]} == {"55 to 90; empty: any"}
    assert found[1].choices == [("any", ""), ("F", "F"), ("M", "M")] and found[1].value == ""
    assert found[7].choices[0] == ("as the slice", "")
    assert not fields(model), "a model without conditions has none"


def page_images(shown):
    """{caption: PNG} of the HTML that a button's function gives."""
    return {caption: url for url, caption in re.findall(r'<img src="([^"]*)" alt="([^"]*)"', shown)}


def page_rows(shown):
    """The rows of metadata.csv in the download."""
    content = base64.b64decode(re.search(r"data:application/zip;base64,([^\"]*)", shown).group(1))
    return pd.read_csv(zipfile.ZipFile(io.BytesIO(content)).open("metadata.csv"))


@pytest.mark.parametrize("button", ["sample", "compare"])
def test_the_page_samples_what_was_asked_for(conditioned, button):
    press = getattr(conditioned[2], button)
    first = ("AD", 2) if button == "sample" else ("NC", "AD")

    def pressed(*conditions):
        return list(press(*first, 3, 1, 5, *conditions))[-1]

    marginal = pressed()
    empty = pressed(None, "")
    assert page_images(empty[1]) == page_images(marginal[1]), "an empty field is marginal"
    text, shown = pressed(75, "F")
    rows = page_rows(shown)
    assert set(rows.age) == {75} and set(rows.sex) == {"F"} and "age" not in page_rows(marginal[1])
    seen = [list(page_images(pressed(*asked)[1]).values())[0] for asked in ((), (75, ""), (75, "F"))]
    assert len(set(seen)) == 3, "each condition has an effect"
    if button == "sample":
        assert "2 slices of class AD, age=75, sex=F, seed 5." in text
    text, shown = pressed(95, "")
    assert "age=95 is outside of the range in training, 55 to 90" in text and not shown


def test_a_counterfactual_on_the_page_changes_the_class_or_a_condition(conditioned):
    pixels = np.asarray(blob_image([3], 16, 16))

    def pressed(target, *conditions):
        return conditioned[2].counterfactual(pixels, "NC", target, 0.8, 4, 1, *conditions)

    refused = "Choose two different classes, or another target condition."
    for same in ((70, "", None, ""), (70, "", 70, ""), (None, "", None, "")):
        assert refused in pressed("NC", *same)[0]
    _, shown = pressed("NC", 60, "F", 85, "")
    images = page_images(shown)
    assert {"Uploaded slice, NC, age=60, sex=F", "Counterfactual, NC, age=85, sex=F"} < set(images)
    (row,) = page_rows(shown)[:1].to_dict("records")
    assert (row["label"], row["age"], row["sex"], row["from_age"], row["from_sex"]) == (
        "NC",
        85,
        "F",
        60,
        "F",
    )
    others = [
        pressed("NC", 60, "F", 75, ""),
        pressed("AD", 60, "F", None, ""),
        pressed("AD", *(None, "") * 2),
    ]
    seen = {
        page_images(shown)[caption]
        for _, shown in others
        for caption in page_images(shown)
        if "Cou" in caption
    }
    assert len(seen | {images["Counterfactual, NC, age=85, sex=F"]}) == 4
    for outside in ((95, "", 80, ""), (60, "", 95, "")):
        text, shown = pressed("AD", *outside)
        assert "age=95 is outside of the range in training, 55 to 90" in text and not shown


def test_sampling_ends_when_the_visitor_leaves(pipeline):
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    steps = generate_progressively(pipeline, [0], [1], every=2, num_inference_steps=500)
    assert next(steps)[0] == 2
    steps.close()
    options = {"every": 1, "num_inference_steps": 3}
    seen = list(
        generate_progressively(pipeline, [0, 1], [1, 2], **options)
    )  # waits until the first has ended
    assert [done for done, _ in seen] == [1, 2, 3] and len(calls) < 300
    expected = next(generate_images(pipeline, [0, 1], [1, 2], 2, num_inference_steps=3))
    assert torch.equal(seen[-1][1], expected)
    with pytest.raises(ValueError, match="unknown class"):
        list(generate_progressively(pipeline, [7], [1], **options))


def test_a_space_contains_the_page_and_its_requirements(tmp_path):
    write_space(tmp_path, ROOT / "app.py", "me/model")
    assert (tmp_path / "app.py").read_bytes() == (ROOT / "app.py").read_bytes()
    card = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["me/model"]
    needed = (tmp_path / "requirements.txt").read_text().split()
    assert any(line.startswith("torch==") for line in needed) and not any("+" in line for line in needed)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "app.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and "app.py: error: me/model: not a pipeline" in result.stderr
    assert "Traceback" not in result.stderr, "it loads the model named in app.yaml, and there is no Hub"
    with pytest.raises(UserError, match="not on the Hub"):
        push_space("me/space", ROOT / "app.py", str(tmp_path), public=False)
