"""benchmarks/: pictures show what their names say, tables are printed, the load is correct."""

import gzip
import math
import os
import random
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from benchmarks import forecasts, hands, load, ood, robustness, time_to_accuracy, training
from mnist import data, images, models
from tests.test_images import recipe_digits, similarity


@pytest.mark.parametrize("suite", robustness.SUITES)
def test_every_suite_still_shows_the_digit(suite: str) -> None:
    for digit in recipe_digits():
        ink = robustness.render(digit)
        assert ink.shape == (robustness.SIDE, robustness.SIDE)
        file = robustness.SUITES[suite](ink, np.random.default_rng(0))
        assert similarity(images.normalise(file)[0], digit) > 0.6


def test_a_suite_is_the_same_for_the_same_seed() -> None:
    digits = np.stack([*recipe_digits()])
    one, two, other = (dict(robustness.make_suites(digits, seed)) for seed in (0, 0, 1))
    assert one == two
    assert one["noise"] != other["noise"]
    assert one["unchanged"] == other["unchanged"]


def test_the_plain_resize_inverts_paper_and_keeps_the_place() -> None:
    for digit in recipe_digits():
        for suite in ("unchanged", "inverted", "transparent"):
            file = robustness.SUITES[suite](robustness.render(digit), np.random.default_rng(0))
            assert np.abs(robustness.resize(file)[0].astype(int) - digit).mean() < 12


def test_robustness_prints_every_suite_and_the_wild_pictures(
    saved: Path, tmp_path: Path, digits: data.Dataset
) -> None:
    (tmp_path / "wild").mkdir()
    Image.fromarray(digits.train.images[0, 0].numpy()).save(tmp_path / "wild" / "a.png")
    Image.new("L", (50, 50), 255).save(tmp_path / "wild" / "b.png")  # blank: not right
    table = f"file,label\na.png,{digits.train.labels[0]}\nb.png,1\n"
    (tmp_path / "wild" / "labels.csv").write_text(table)
    options = ["--folder", str(saved), "--data-dir", str(tmp_path), "--images", "20"]
    result = CliRunner().invoke(robustness.main, options)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()[2:]
    assert [line[:24].strip() for line in lines] == [*robustness.SUITES, "wild"]
    assert lines[-1].split()[:2] == ["wild", "2"]
    assert 1 <= int(lines[-1].split()[2]) <= 2
    assert int(lines[0].split()[2]) <= 6  # errors of 20 that are unchanged


@pytest.mark.parametrize("kind", ood.NOISE)
@pytest.mark.parametrize("side", ood.SIDES)
def test_noise_is_a_picture_that_the_server_reads(kind: str, side: int) -> None:
    picture = ood.NOISE[kind](np.random.default_rng(0), side)
    assert (picture.dtype, picture.shape) == (np.uint8, (side, side))
    assert images.normalise(robustness.encode(picture)).shape == (1, 28, 28)


def test_letters_are_drawn_dark_on_light() -> None:
    pictures = [*ood.draw_letters(np.random.default_rng(0))]
    assert len(pictures) == ood.LETTER_PICTURES
    assert all(picture[0, 0] == 255 and picture.min() < 100 for picture in pictures)
    files = [robustness.encode(picture) for picture in (pictures[0], pictures[0] * 0)]
    inputs, refused = ood.normalise_all(files)
    assert (len(inputs), refused) == (1, 1)


def test_perfect_and_uninformative_scores_have_the_known_measures() -> None:
    known = np.linspace(0, 1, 101)
    far, alike = np.full(50, -1.0), np.linspace(0, 1, 101)
    assert ood.flag(known, far) == ood.compute_auroc(known, far) == 100
    assert ood.compute_fpr95(known, far) == 0
    assert ood.flag(known, alike) == pytest.approx(1, abs=0.1)
    assert ood.compute_auroc(known, alike) == pytest.approx(50)
    assert ood.compute_fpr95(known, alike) == pytest.approx(95, abs=1)


def test_a_target_that_few_seeds_reach_has_no_finite_median() -> None:
    times = [10.0, 20.0, math.inf, math.inf, math.inf]
    summary = "median inf s; reached by 2 of 5 in 15.0 ± 7.1 s"
    assert time_to_accuracy.summarise(times) == summary
    assert time_to_accuracy.summarise(times[1:]) == "reached by 1 of 4"


def test_a_forecast_is_the_first_one_after_a_moment() -> None:
    made = [(1.0, 99.0), (26.0, 70.0), (60.0, 45.0)]
    assert [forecasts.forecast_duration(made, after) for after in (0, 25, 80)] == [100, 96, 105]


def test_a_step_has_three_times_the_operations_of_a_forward_pass(digits: data.Dataset) -> None:
    model = models.build("linear", 1, digits.size, 10)
    assert training.count_step_flops(model, digits) == 3 * 2 * digits.size**2 * 10


def test_hands_reads_a_collection_as_the_server_does(
    saved: Path, tmp_path: Path, digits: data.Dataset
) -> None:
    lines = []
    for image, label in zip(digits.train.images[:30, 0], digits.train.labels[:30], strict=True):
        small = np.asarray(Image.fromarray(image.numpy()).resize((16, 16)), float)
        lines.append(" ".join([f"{label}.0000", *map(str, (small / 127.5 - 1).ravel())]))
    (tmp_path / "usps").mkdir()
    with gzip.open(tmp_path / "usps" / "zip.train.gz", "wt") as file:
        file.write("\n".join(lines))
    files, labels = hands.load_usps(tmp_path / "usps" / "zip.train.gz")
    assert labels.tolist() == digits.train.labels[:30].tolist()
    for file, image in zip(files, digits.train.images[:30, 0].numpy(), strict=True):
        assert similarity(images.normalise(file)[0], image) > 0.7
    result = CliRunner().invoke(hands.main, ["--folder", str(saved), "--data-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    name, n, right, uncertain, *_ = result.output.splitlines()[-1].split()
    assert (name, n) == ("usps", "30")
    assert float(right.strip("%")) > 75
    assert float(uncertain.strip("%")) < 30


def test_the_load_distinguishes_a_connection_closed_before_a_response_from_one_within_it() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    replies = [b"", whole, whole[:-1], whole + b"more"]  # to one request after the other

    class Reply(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                self.rfile.readline()
                answer = replies.pop(0)
                for part in (answer[:20], answer[20:]):
                    self.wfile.write(part)
                    time.sleep(0.01)
                if answer != whole:
                    break

    with socketserver.TCPServer(("127.0.0.1", 0), Reply) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clients = load.Clients(server.server_address[1])
        connection = clients.open()
        for _ in range(3):
            clients.wait(0)
            clients.send(connection, b"GET / HTTP/1.1\r\n\r\n", time.perf_counter())
            while clients:
                assert clients.wait(10) in ([], [connection])
        time.sleep(0.1)
        assert clients.wait(0) == []  # bytes on an idle connection are no response
        server.shutdown()
    assert [row[2:] for row in clients.rows] == [(200, 2), (-1, 1), (200, 1)]
    clients.send(connection, b"GET / HTTP/1.1\r\n\r\n", time.perf_counter())
    assert clients.wait(10) == [connection]  # at once, as no server listens any more
    assert clients.rows[-1][2:] == (0, 2)


def test_a_request_of_the_load_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rows = load.run_closed_loop(silent.getsockname()[1], [b"GET / HTTP/1.1\r\n\r\n"], 1, 0.05)
    assert [row[2:] for row in rows] == [(-1, 1)]


def test_an_open_loop_sleeps_while_it_waits_for_the_last_responses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop_once_connected(silent: socket.socket) -> None:
        with silent.accept()[0]:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.wait(60)

    ended = threading.Event()
    monkeypatch.setattr(load, "TIMEOUT_S", 1.0)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            start, worked = time.perf_counter(), time.process_time()
            threading.Thread(target=stop_once_connected, args=(silent,)).start()
            rows = load.run_open_loop(silent.getsockname()[1], [b"GET / HTTP/1.1\r\n\r\n"], 20, 60)
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, handler)
    assert {row[2:] for row in rows} == {(-1, 1)}
    assert time.process_time() - worked < (time.perf_counter() - start) / 2


@pytest.fixture
def drawing() -> Any:
    return pytest.importorskip("benchmarks.page", reason="scikit-image is in requirements-dev.txt")


def draw_ink(draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """Draw strokes, 255 on 0, at 280x280; returns them reduced to uint8 (28, 28)."""
    large = Image.new("L", (280, 280))
    draw(ImageDraw.Draw(large))
    return np.asarray(large.reduce(10))


def test_a_ring_is_traced_in_one_stroke_and_a_cross_along_its_bars(drawing: Any) -> None:
    (ring,) = drawing.trace(
        draw_ink(lambda pen: pen.ellipse((60, 60, 220, 220), width=24, outline=255))
    )
    assert np.hypot(*np.subtract(ring[0], ring[-1])) < 0.1
    lengths = [np.hypot(*np.subtract(a, b)) for a, b in pairwise(ring)]
    assert sum(lengths) == pytest.approx(np.pi, rel=0.15)
    bars = ((40, 140, 240, 140), (140, 40, 140, 240))
    cross = drawing.trace(draw_ink(lambda pen: [pen.line(bar, 255, 24) for bar in bars]))
    ends = np.abs(np.subtract(cross[0][0], cross[0][-1]))
    assert sorted(ends.tolist()) == pytest.approx([0, 1], abs=0.15)  # straight on at the crossing


def test_traced_strokes_look_like_the_digit(drawing: Any) -> None:
    for i, digit in enumerate(recipe_digits()):
        placed = drawing.place(drawing.trace(digit), random.Random(i))
        assert placed == drawing.place(drawing.trace(digit), random.Random(i))
        page = Image.new("L", (280, 280), 255)
        pen = ImageDraw.Draw(page)
        for stroke in placed:
            assert 0.049 < np.min(stroke) < np.max(stroke) < 1.036
            pen.line([(280 * x, 280 * y) for x, y in stroke], 0, 30, "curve")
        assert similarity(images.normalise(robustness.encode(np.asarray(page)))[0], digit) > 0.5
