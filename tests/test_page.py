"""serve/static: the page, in a real browser."""

import base64
import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from benchmarks import load, servers
from mnist import data, images, inference, registry
from serve.app import STATIC, app
from tests.test_app import drawn_seven, png, refused
from tests.test_engine import save_copy
from tests.test_inference import change

AXE = "axe-core@4.14.1"
SEVEN = ((0.3, 0.2), (0.5, 0.2), (0.7, 0.2), (0.6, 0.5), (0.5, 0.8))
ANSWERED = "() => document.getElementById('words').textContent.includes('%')"
WAITING = "() => !document.getElementById('words').textContent.includes('%')"
SHOWN = "() => ['class', 'words'].map((id) => document.getElementById(id).innerText)"
SHIFT = """() => new Promise((done) => new PerformanceObserver((list) =>
    done(list.getEntries().reduce((sum, each) => sum + each.value, 0))
).observe({type: 'layout-shift', buffered: true}) || setTimeout(() => done(0), 500))"""
DROP = """([content, names]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    for (const name of names) transfer.items.add(new File([bytes], name, {type: 'image/png'}));
    const event = new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
}"""
PASTE = """(content) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([bytes], 'pasted.png', {type: 'image/png'}));
    document.dispatchEvent(new ClipboardEvent('paste', {clipboardData}));
}"""


def test_the_page_is_small_and_has_a_strict_content_security_policy(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 60_000
    text = "".join(path.read_text() for path in STATIC.iterdir())
    assert not re.search(r"""["'(=]\s*(https?:)?//(?!www\.w3\.org/)""", text)
    monkeypatch.setenv("MODELS", str(saved))
    with TestClient(app) as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= {*policy}
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["x-content-type-options"] == "nosniff"
        for name in ("page.js", "draw.js", "api.js", "page.css", "icon.svg"):
            assert client.get(f"/static/{name}").status_code == 200
        assert client.get("/static/%2e%2e/app.py").status_code == 404


def test_a_correction_is_kept_once_as_a_folder_data_set_if_feedback_is_enabled(
    saved: Path, tmp_path: Path, digits: data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = png(digits.validation.images[0, 0].numpy())
    sent: dict[str, Any] = {"files": {"file": ("x.png", picture)}, "data": {"label": "7"}}
    monkeypatch.setenv("MODELS", str(saved))
    with TestClient(app) as client:
        assert client.post("/feedback", **sent).status_code == 404
    folder = tmp_path / "feedback"
    monkeypatch.setenv("FEEDBACK_DIR", str(folder))
    monkeypatch.setenv("FEEDBACK_MAX_BYTES", str(len(picture) + 10))
    with TestClient(app) as client:
        assert client.get("/ready").json()["feedback"] is True
        with ThreadPoolExecutor(4) as threads:  # several clicks on one button
            for answer in threads.map(lambda _: client.post("/feedback", **sent), range(8)):
                assert (answer.status_code, answer.json()) == (201, {"label": "7"})
        wrong = client.post("/feedback", files=sent["files"], data={"label": "../x"})
        assert wrong.json()["error"]["code"] == "bad_request"
        other = png(digits.validation.images[1, 0].numpy())
        full = client.post("/feedback", files={"file": other}, data={"label": "3"})
        assert (full.status_code, full.json()["error"]["code"]) == (413, "full")
        none = client.post("/feedback", files=sent["files"])
        assert (none.status_code, "no label was sent" in none.text) == (400, True)
    monkeypatch.setenv("FEEDBACK_MAX_BYTES", "1")  # a kept picture may get another label
    with TestClient(app) as client:
        again = client.post("/feedback", files=sent["files"], data={"label": "3"})
        assert again.status_code == 201  # in place of the first label
        none = client.post("/feedback", files={"file": b"no picture"}, data={"label": "3"})
        assert none.status_code == 415
    (kept,) = [path for path in folder.rglob("[!.]*") if path.is_file()]
    assert (kept.parent.name, kept.suffix, kept.read_bytes()) == ("3", ".png", picture)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOLCK])
def test_a_correction_that_cannot_be_written_is_an_error_in_words(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path))

    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    monkeypatch.setenv("FEEDBACK_DIR", str(tmp_path / "feedback"))
    monkeypatch.setattr(os, "fsync", fail)
    with TestClient(app) as client:
        sent = client.post("/feedback", files={"file": drawn_seven()}, data={"label": "7"})
        message = refused(sent, 503, "not_kept")
        assert os.strerror(code) in message
        assert str(tmp_path) not in message
        assert client.post("/predict", content=drawn_seven()).json()["prediction"] == "7"
    assert not [*(tmp_path / "feedback").rglob("*.png*")]  # nor a part of it


# --- in a browser


@pytest.fixture(scope="module")
def picture(digits: data.Dataset) -> bytes:
    """A digit of the calibration split, large and dark on light."""
    image = 255 - digits.calibration.images[0, 0].numpy()
    return png(np.kron(image, np.ones((6, 6), np.uint8)))


@pytest.fixture(scope="module")
def registry_folder(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two models."""
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("page") / "models"))
    save_copy(folder, "never")
    return folder


@pytest.fixture(scope="module")
def port(registry_folder: Path, picture: bytes) -> Iterator[int]:
    feedback = str(registry_folder.parent / "feedback")
    first = load.request("/predict", picture)
    with servers.server(registry_folder, first, FEEDBACK_DIR=feedback) as server:
        yield server.port


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, port: int) -> Iterator[Opened]:
    """A function that opens the page; an error in its console fails the test."""
    contexts, errors = [], []

    def open_(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else 0)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#state[data-state=ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors


def draw(page: Any, points: Any = SEVEN) -> None:
    box = page.locator("#canvas").bounding_box()
    for i, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def ink(page: Any) -> int:
    """Pixels of the canvas that are drawn on."""
    return page.evaluate(
        """() => { const canvas = document.getElementById('canvas');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, i) => i % 4 === 3 && value > 0).length }"""
    )


@pytest.mark.slow
def test_a_digit_is_drawn_and_answered_thicker_undone_and_cleared(opened: Opened) -> None:
    page = opened()
    draw(page)
    page.wait_for_function(ANSWERED)
    prediction, words = page.evaluate(SHOWN)  # at once, as answers follow one another
    assert words.startswith((f"{prediction}, ", f"Not sure; most like {prediction}, "))
    assert page.get_attribute("#view", "src").startswith("data:image/png")
    assert len(page.query_selector_all("#bars li")) == 10
    first = ink(page)
    page.fill("#brush", "44")
    draw(page, ((0.2, 0.9), (0.8, 0.9)))
    both = ink(page)
    assert both > 1.4 * first  # a third of the length, twice as thick
    page.click("#undo")
    assert ink(page) == first
    page.click("#clear")
    page.wait_for_function(WAITING)
    assert ink(page) == 0
    page.click("#undo")
    assert ink(page) == first
    page.wait_for_function(ANSWERED)


@pytest.mark.slow
def test_pictures_are_chosen_pasted_and_dropped(
    opened: Opened, picture: bytes, tmp_path: Path
) -> None:
    page = opened()
    files = [tmp_path / name for name in ("a.png", "b.png", "no.png")]
    for file in files[:2]:
        file.write_bytes(picture)
    files[2].write_bytes(b"no picture")
    page.set_input_files("#files", files[0])
    page.wait_for_function(ANSWERED)
    assert page.is_visible("#picture")
    prediction = page.inner_text("#class")
    page.click("#clear")
    page.wait_for_function(WAITING)
    assert page.is_hidden("#picture")
    content = base64.b64encode(picture).decode()
    page.evaluate(PASTE, content)
    page.wait_for_function(ANSWERED)
    assert page.inner_text("#class") == prediction
    page.set_input_files("#files", files)
    page.wait_for_selector("#rows .refused")
    cells = [row.inner_text() for row in page.query_selector_all("#rows tr")]
    assert [file.name in cell for file, cell in zip(files, cells, strict=True)] == [True] * 3
    assert "cannot be read as a picture" in cells[2]
    page.evaluate(DROP, [content, ["c.png", "d.png"]])
    page.wait_for_function("() => document.querySelectorAll('#rows .seen img').length === 2")


@pytest.mark.slow
def test_another_model_is_chosen_and_answers(opened: Opened, registry_folder: Path) -> None:
    page = opened()
    draw(page)
    page.wait_for_function(ANSWERED)
    names = list(registry.read(registry_folder)["models"])
    assert "digits" in page.inner_text("#about")
    with page.expect_response(lambda answer: f"model={names[1]}" in answer.url) as asked:
        page.select_option("#model", names[1])
    assert asked.value.json()["model"] == names[1]
    page.wait_for_function(ANSWERED)


@pytest.mark.slow
def test_the_page_shows_that_the_server_is_not_reachable_and_recovers(
    browser: Any, saved: Path, picture: bytes
) -> None:
    first = load.request("/predict", picture)
    page = browser.new_page()
    with servers.server(saved, first) as server:
        port = server.port
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#state[data-state=ready]")
    draw(page)
    page.wait_for_selector("#state[data-state=gone]")
    assert "cannot be reached" in page.inner_text("#words")
    with servers.server(saved, first, port=port):
        page.wait_for_selector("#state[data-state=ready]")
        page.wait_for_function(ANSWERED)
    page.close()


@pytest.mark.slow
def test_a_finger_draws_on_a_phone_and_the_page_does_not_scroll(
    opened: Opened, picture: bytes
) -> None:
    page = opened(viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    assert page.is_visible("#camera")
    page.evaluate("scrollTo({top: 40, behavior: 'instant'})")
    assert page.evaluate("scrollY") == 40
    box = page.locator("#canvas").bounding_box()
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        at = [
            {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in points
        ]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    def swipe(*ys: float) -> None:
        touch("touchStart", (0.5, ys[0]))
        for y in ys[1:]:
            touch("touchMove", (0.5, y))
        touch("touchEnd")

    down = [0.2 + 0.05 * i for i in range(12)]
    swipe(*down)
    swipe(*down[::-1])
    page.wait_for_function(ANSWERED)
    assert ink(page) > 0
    assert page.evaluate("scrollY") == 40
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": picture})
    page.wait_for_selector("#picture", state="visible")
    swipe(*down[::-1])  # over a photo the page scrolls, and the photo stays
    assert page.is_visible("#picture")
    page.wait_for_function("scrollY !== 40")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_the_keyboard_is_enough(opened: Opened) -> None:
    page = opened()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"model", "canvas", "brush", "undo", "clear", "choose"} <= reached
    draw(page)
    drawn = ink(page)
    page.keyboard.press("Control+z")
    assert ink(page) == 0
    draw(page)
    page.keyboard.press("Escape")
    assert ink(page) == 0
    for _ in range(5):
        page.keyboard.press("]")
    draw(page)
    assert ink(page) > 1.2 * drawn
    with page.expect_file_chooser():
        page.press("#choose", "Space")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(["npm", "install", "--silent", AXE], cwd=folder, check=True)
    return folder / "node_modules/axe-core/axe.min.js"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_serious_and_nothing_shifts(
    opened: Opened, axe: Path, picture: bytes, scheme: str, width: int
) -> None:
    page = opened(color_scheme=scheme, bypass_csp=True, viewport={"width": width, "height": 900})
    draw(page)
    page.wait_for_function(ANSWERED)
    assert page.evaluate(SHIFT) == 0
    two = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": picture} for i in range(2)]
    page.set_input_files("#files", two)
    page.wait_for_function("() => document.getElementById('count').textContent.startsWith('2 of')")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.add_script_tag(path=axe)
    violations = page.evaluate("axe.run()")["violations"]
    serious = [entry for entry in violations if entry["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:3000]


@pytest.mark.slow
def test_a_prediction_set_is_named_unless_it_has_one_class(
    browser: Any, folder: Path, picture: bytes
) -> None:
    digit = images.normalise(picture)
    ranked = np.sort(inference.load(folder)(digit[None])[0])[::-1]
    for least, words in (
        (ranked[1:3].mean(), "{0} or {1}; most likely {0},"),
        (0.0, "One of 10 classes; most likely {0},"),
        (1.1, "Not sure; most like {0},"),
    ):
        limits = {"uncertain_below": -1e9, "prediction_sets": {"0.999": [float(least), None]}}
        change(folder, lambda record, to=limits: record["calibration"].update(to))
        page = browser.new_page()
        with servers.server(folder, load.request("/predict", picture)) as server:
            page.goto(f"http://127.0.0.1:{server.port}/")
            page.wait_for_selector("#state[data-state=ready]")
            file = {"name": "3.png", "mimeType": "image/png", "buffer": picture}
            page.set_input_files("#files", file)
            page.wait_for_function(ANSWERED)
            prediction, shown = page.evaluate(SHOWN)
            assert shown.startswith(words.format(prediction, shown.split("Then ")[1][0]))
        page.close()


@pytest.mark.slow
def test_a_wrong_answer_is_corrected_with_one_click(opened: Opened, registry_folder: Path) -> None:
    page = opened()
    draw(page)
    page.wait_for_function(ANSWERED)
    page.click("#labels button:nth-child(8)")
    page.wait_for_function(
        "() => document.getElementById('words').textContent.includes('Kept as 7')"
    )
    (kept,) = (registry_folder.parent / "feedback" / "7").iterdir()
    assert kept.suffix == ".png"


# --- other servers, and bad connections


CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLOTHES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SLOW = """() => {
    window.answers = 0;
    window.late = true;
    const real = window.fetch;
    window.fetch = async (path, options) => {
        const answer = await real(path, options);
        if (path.startsWith('predict')) {
            window.answers += 1;
            while (window.late) await new Promise((done) => setTimeout(done, 10));
        }
        return answer;
    };
}"""
ONCE = """(() => {
    const real = window.fetch;
    let broken = false;
    window.fetch = async (path, options) => {
        if (!broken && path.startsWith('WHAT')) {
            broken = true;
            throw new TypeError('a bad line');
        }
        return real(path, options);
    };
})()"""


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "models"))


@pytest.mark.slow
def test_late_answers_are_not_shown_and_the_server_is_not_flooded(opened: Opened) -> None:
    page = opened()
    page.evaluate(SLOW)
    draw(page)
    page.wait_for_function("answers > 0")
    page.click("#clear")
    page.evaluate("late = false")
    page.wait_for_timeout(500)  # a late answer would be shown by now
    assert page.inner_text("#words") == "Nothing drawn yet."
    assert page.evaluate("answers") <= 2  # of 20 movements of the mouse
    page.evaluate("late = true")
    draw(page, SEVEN[:3])
    draw(page, SEVEN[2:])
    page.evaluate("late = false")
    page.wait_for_function(ANSWERED)
    page.wait_for_timeout(700)  # the last request was for the whole drawing
    assert page.evaluate("answers") <= 6
    assert page.inner_text("#class").isdigit()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["predict", "models", "ready"])
def test_a_request_that_failed_is_sent_again(browser: Any, port: int, what: str) -> None:
    page = browser.new_page()
    page.add_init_script(ONCE.replace("WHAT", what))
    page.goto(f"http://127.0.0.1:{port}/")
    draw(page)
    page.wait_for_function(ANSWERED)
    page.wait_for_selector("#state[data-state=ready]")
    page.wait_for_function(
        "() => document.getElementById('about').textContent.includes('right of')"
    )
    page.close()


@pytest.mark.slow
def test_a_model_of_other_classes_takes_over_on_an_open_page(
    browser: Any, folder: Path, picture: bytes
) -> None:
    first = registry.record(folder)[0]
    clothes = save_copy(folder)
    change(folder, lambda record: record["dataset"].update(classes=CLOTHES, recipe="plain"))
    registry.use(folder, first)
    page = browser.new_page()
    with servers.server(folder, load.request("/predict", picture)) as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        draw(page)
        page.wait_for_function(ANSWERED)
        registry.use(folder, clothes)
        page.wait_for_function(
            "() => document.getElementById('draw-title').textContent.includes('Choose')"
        )
        page.wait_for_function(ANSWERED)
        assert page.inner_text("#class") in CLOTHES
        names = [name.inner_text() for name in page.query_selector_all("#bars .name")]
        assert names == CLOTHES
        assert page.query_selector_all("#bars .best .name")[0].inner_text() in CLOTHES
        page.select_option("#model", first)
        page.wait_for_function("() => document.getElementById('class').textContent.length === 1")
        page.wait_for_function(
            "() => document.getElementById('draw-title').textContent.includes('Draw a digit')"
        )
    page.close()


@pytest.mark.slow
def test_the_page_asks_for_a_key_and_shows_errors_in_words(
    browser: Any, folder: Path, picture: bytes, tmp_path: Path
) -> None:
    change(folder, lambda record: record["calibration"].update(uncertain_below=1e9))
    request = load.request("/predict", picture).replace(
        b"\r\n\r\n", b"\r\nX-API-Key: k1\r\n\r\n", 1
    )
    page = browser.new_page()
    large = tmp_path / "large.png"
    large.write_bytes(np.random.default_rng(0).bytes(50_000))
    with servers.server(folder, request, API_KEYS="k1", MAX_UPLOAD_BYTES="40000") as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#state[data-state=ready]")
        assert page.is_hidden("#key-field")
        page.evaluate(SLOW)
        draw(page, SEVEN[:3])
        page.wait_for_function("answers > 0")
        page.evaluate("late = false")
        page.wait_for_selector("#key-field", state="visible")
        assert "needs an API key" in page.inner_text("#words")
        page.evaluate("late = true; answers = 0")
        draw(page, SEVEN[2:])
        page.wait_for_function("answers > 0")  # a request without the key is still in progress
        page.fill("#key", "k1 \u2713")  # characters that no header can hold are dropped
        page.press("#key", "Enter")
        page.evaluate("late = false")
        page.wait_for_function(ANSWERED)
        assert page.inner_text("#words").startswith("Not sure; most like ")
        assert page.is_hidden("#key-field")
        page.set_input_files("#files", large)
        page.wait_for_function(
            "() => document.getElementById('words').textContent.includes('too large')"
        )
        page.set_input_files(
            "#files",
            {
                "name": "blank.png",
                "mimeType": "image/png",
                "buffer": png(np.full((50, 50), 255, np.uint8)),
            },
        )
        page.wait_for_function(
            "() => document.getElementById('words').textContent.includes('blank')"
        )
    page.close()
