"""The playground over HTTP: pictures in, answers out, and everything that is refused."""

import base64
import copy
import errno
import io
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lvm.playground
from lvm.generate import Sampling, decode, draw, encode, rank
from lvm.playground import answers as answers_module
from lvm.playground.asked import LIMITS
from lvm.playground.pictures import MOST_BYTES
from tokenizer.images import encode_image, read_image

STATIC = Path(lvm.playground.__file__).parent / "static"
LONGEST = 20.0  # seconds that a condition is waited for


def asked_of(client, pictures: np.ndarray, kind: str = "pairs", **settings: float) -> dict:
    ids = [client.upload(picture) for picture in pictures]
    return {"kind": kind, "images": ids, "settings": settings}


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def drawn_by_hand(answerer, pictures: np.ndarray, **options):
    floats = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    prompt = encode(answerer.model, answerer.tok, floats)
    drawn = draw(answerer.model, prompt, Sampling(**options))
    images = (decode(answerer.tok, drawn.codes) * 255).round().byte().movedim(-3, -1).numpy()
    return prompt, drawn, images


# The page.


def test_the_page_and_its_files_come_with_a_policy_that_lets_nothing_else_in(client):
    page = client.ask("/")
    assert page.status == 200 and b"<html" in page.body
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy
    for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.body.decode()):
        file = client.ask(name)
        assert file.status == 200 and file.headers["x-content-type-options"] == "nosniff", name
        assert file.headers["content-security-policy"] == policy


def test_the_files_of_the_page_name_no_other_machine():
    for file in STATIC.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.|@import", text), file
        assert not re.search(r"<script>|<style>|\sstyle=|\son[a-z]+=\"", text), file


def test_about_says_what_the_page_needs(client):
    about = client.ask("/api/about").json
    assert (about["model"], about["size"], about["codes"], about["room"]) == ("small", 8, 4, 5)
    assert set(about["limits"]) == set(LIMITS)
    assert about["limits"]["top_k"]["high"] == 40  # codes of the tokenizer
    assert [e["kind"] for e in about["examples"]] == ["pairs", "pairs", "pairs", "frames"]
    shown = client.ask(f"/api/images/{about['examples'][0]['images'][0]}.png")
    assert pixels(base64.b64encode(shown.body).decode()).shape == (8, 8, 3)


# Pictures.


def test_a_picture_is_kept_as_the_model_sees_it_and_nothing_else_of_the_file(client, np_rng):
    photo = Image.fromarray(np_rng.integers(0, 256, (30, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = io.BytesIO()
    photo.save(data, "JPEG", exif=exif)
    key = client.ask("/api/images?name=a.jpg", data.getvalue()).json["id"]
    kept = client.ask(f"/api/images/{key}.png")
    assert kept.headers["content-type"] == "image/png"
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(kept.body))), read_image(data.getvalue(), size=8)
    )
    files = list(client.service.store.folder.iterdir())
    assert [f.name for f in files] == [f"{key}.png"]
    assert b"where I live" not in files[0].read_bytes()


def bomb() -> bytes:
    """100 megapixels in 12 KB."""
    data = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(data, "PNG")
    return data.getvalue()


def test_bad_files_are_named_with_what_is_wrong_and_the_server_goes_on(client, pictures):
    good = encode_image(pictures[0])

    def refused(name: str, data: bytes, words: str, status: int = 400) -> None:
        answer = client.ask(f"/api/images?name={name}", data)
        assert answer.status == status, answer.body
        assert re.search(words, answer.json["error"]), answer.json
        assert name in answer.json["error"]

    refused("notes.txt", b"no picture", "not an image; wanted a whole picture file")
    refused("empty.png", b"", "empty file")
    refused("cut.png", good[: len(good) // 2], "truncated|unreadable")
    refused("big.png", bomb(), r"too large \(100 megapixels, at most 40 .*make it smaller")
    refused("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image")
    assert client.ask("/api/images?name=good.png", good).status == 200
    assert len(list(client.service.store.folder.iterdir())) == 1


def test_a_file_that_is_too_long_is_refused_unread(client):
    with socket.create_connection(("127.0.0.1", client.port), LONGEST) as sock:
        length = f"Content-Length: {MOST_BYTES + 1}"
        lines = ("POST /api/images?name=film.png HTTP/1.1", "Host: localhost", length, "", "")
        sock.sendall("\r\n".join(lines).encode())  # and not a byte of it
        answer = b""
        while b"make it smaller" not in answer:
            part = sock.recv(4096)
            assert part, answer
            answer += part
    assert b" 413 " in answer and b"film.png is larger than 32 MiB" in answer
    # One that does not say how long it is, is read up to the limit.
    body = [b"x" * 2**15] * 3
    answer = client.ask("/api/answers", iter(body))
    assert answer.status == 413 and "the request is larger than 64 KiB" in answer.json["error"]


# Answers.


def test_answers_are_those_of_draw_row_by_row(client, answerer, pictures):
    asked = asked_of(client, pictures, candidates=3, seed=5, temperature=0.9, top_k=30)
    events = client.answers(asked)
    options = {"candidates": 3, "seed": 5, "temperature": 0.9, "top_k": 30}
    prompt, drawn, images = drawn_by_hand(answerer, pictures, **options)
    assert [e["event"] for e in events] == ["prompt", "queued", "start", "rows", "rows", "done"]
    rows = [e for e in events if e["event"] == "rows"]
    assert [(e["frame"], e["rows"], e["of"]) for e in rows] == [(0, 1, 2), (0, 2, 2)]
    assert [pixels(png).shape for png in rows[0]["images"]] == [(4, 8, 3)] * 3
    above = drawn.codes[:, 0, :2].repeat(1, 2)  # what is not drawn yet repeats the row above it
    half = (decode(answerer.tok, above) * 255).round().byte().movedim(-3, -1).numpy()[:, :4]
    for candidate, png in enumerate(rows[0]["images"]):
        assert np.array_equal(pixels(png), half[candidate])
    for candidate, png in enumerate(rows[1]["images"]):
        assert np.array_equal(pixels(png), images[candidate, 0])
    done = events[-1]
    # 1e-5: the same numbers in another order of sums
    assert done["nats"] == pytest.approx((-drawn.log_likelihood.sum(-1) / 4).tolist(), rel=1e-5)
    assert np.argsort(done["nats"]).tolist() == rank(answerer.model, prompt, drawn).tolist()
    by_gain = rank(answerer.model, prompt, drawn, by="gain").tolist()
    assert np.argsort([-gain for gain in done["gain"]]).tolist() == by_gain
    assert pixels(done["sheet"]).shape == (5 * 98 + 2, 2 * 98 + 2, 3)


def test_frames_go_on_past_the_row(client, answerer, pictures):
    events = client.answers(asked_of(client, pictures[:4], "frames", candidates=2, new=3))
    _, drawn, images = drawn_by_hand(answerer, pictures[:4], candidates=2, new=3)
    whole = [e for e in events if e["event"] == "rows" and e["rows"] == e["of"]]
    for frame, event in enumerate(whole):
        for candidate, png in enumerate(event["images"]):
            assert np.array_equal(pixels(png), images[candidate, frame])
    found = (-drawn.log_likelihood.sum(-1) / 12).tolist()
    assert events[-1]["nats"] == pytest.approx(found, rel=1e-5)  # as above
    assert pixels(events[-1]["sheet"]).shape == (2 * 98 + 2, 7 * 98 + 2, 3)


def test_guidance_and_min_p_reach_the_engine_and_one_picture_has_no_gain(client, pictures):
    def answer(kind: str = "pairs", pictures: np.ndarray = pictures, **settings: float) -> dict:
        events = client.answers(asked_of(client, pictures, kind, **settings))
        assert events[-1]["event"] == "done", events[-1]
        return events[-1]

    plain = answer()
    assert plain["sheet"] != answer(guidance=4)["sheet"]
    assert plain["sheet"] != answer(min_p=0.5)["sheet"]
    assert plain["sheet"] == answer(seed=0)["sheet"] != answer(seed=1)["sheet"]
    assert answer("frames", pictures[:1])["gain"] is None


def test_a_link_gives_the_same_answer_and_says_if_the_model_is_another(start, pictures):
    client = start()
    asked = asked_of(client, pictures, seed=3)
    first = client.answers(asked)
    key = first[0]["id"]
    again = client.ask(f"/api/prompts/{key}").json
    assert again["same_model"] and again["images"] == asked["images"]
    assert again["settings"] == {key: limit.start for key, limit in LIMITS.items()} | {"seed": 3}
    again.pop("same_model")
    second = client.answers(again)
    assert second[0]["id"] == key
    assert [e.get("images") for e in second] == [e.get("images") for e in first]
    with torch.no_grad():
        client.service.answerer.model.head.weight[0, 0] += 1
    client.service.answerer.id = answers_module.fingerprint(
        client.service.answerer.model, client.service.answerer.tok
    )
    other = start()  # the same store
    assert not other.ask(f"/api/prompts/{key}").json["same_model"]


def test_another_tokenizer_or_another_last_weight_is_another_model(make_model, tok):
    model, other = make_model(), copy.deepcopy(tok)  # the model does not know its tokenizer
    with torch.no_grad():
        other.quantize.embedding.weight[0, 0] += 1
    first = answers_module.fingerprint(model, tok)
    assert first == answers_module.fingerprint(make_model(), tok)
    assert first != answers_module.fingerprint(model, other)
    with torch.no_grad():
        model.head.weight[-1, -1] += 1
    assert first != answers_module.fingerprint(model, tok)


def test_examples_outlive_their_server_in_links(start):
    client = start()
    example = client.ask("/api/about").json["examples"][0]
    asked = {"kind": example["kind"], "images": example["images"][-3:], "settings": {}}
    key = client.answers(asked)[0]["id"]
    without = start(examples=[])
    again = without.ask(f"/api/prompts/{key}").json
    again.pop("same_model")
    assert without.answers(again)[-1]["event"] == "done"


def test_what_was_dropped_from_the_store_is_said(start, pictures):
    client = start(most=3 * 4096)  # three files
    asked = asked_of(client, pictures)
    answer = client.ask("/api/answers", json.dumps(asked).encode())
    assert answer.status == 410 and "2 of the 5 pictures are not stored" in answer.json["error"]
    assert client.ask(f"/api/images/{asked['images'][0]}.png").status == 404
    gone = client.ask("/api/prompts/" + "0" * 20)
    assert gone.status == 404 and "drop the pictures in again" in gone.json["error"]


def test_pictures_of_a_server_with_another_tokenizer_are_refused(client, pictures):
    asked = asked_of(client, pictures)
    larger = np.repeat(np.repeat(pictures[0], 2, 0), 2, 1)
    asked["images"][1] = client.service.store.put(encode_image(larger), suffix=".png")
    answer = client.ask("/api/answers", json.dumps(asked).encode())
    assert answer.status == 410 and "another tokenizer, not 8 × 8" in answer.json["error"]


def test_no_json_and_no_such_page_are_answered_in_json(client):
    for body in (b"{", b"[" * 60_000):
        assert "is no JSON" in client.ask("/api/answers", body).json["error"]
    refused = client.ask("/api/answers", b"[]")
    assert refused.status == 400 and "no JSON object" in refused.json["error"]
    long = {"kind": "pairs", "images": ["0" * 64] * 7, "settings": {}}
    refused = client.ask("/api/answers", json.dumps(long).encode())
    assert refused.status == 400
    assert re.search("7 pictures is too long: .* 5 frames, or 2 pairs", refused.json["error"])
    assert client.ask("/nowhere").status == 404 and "error" in client.ask("/nowhere").json
    assert client.ask("/static/../server.py").status == 404
    assert client.ask("/api/images", None).status == 405


# Who may ask.


def test_only_our_own_addresses_are_answered(client):
    hosts = {
        "127.0.0.1:{port}": True,
        "localhost:{port}": True,
        "localhost:9999": True,  # through an SSH tunnel
        "[::1]:{port}": True,
        "evil.example:{port}": False,
        "localhost.evil.example": False,
        "192.168.0.7:{port}": False,
        "": False,
        "[": False,
    }
    for host, good in hosts.items():
        answer = client.ask("/api/about", headers={"Host": host.format(port=client.port)})
        assert answer.status == (200 if good else 403), host
        assert good or "is not this server's" in answer.json["error"]


def test_names_and_numbers_of_a_server_that_is_open_to_a_network(start):
    client = start(bound="0.0.0.0", names=("GPU7",))
    for host, good in (("192.168.0.7", True), ("gpu7:80", True), ("evil.example", False)):
        assert client.ask("/", headers={"Host": host}).status == (200 if good else 403)


def test_pages_of_other_sites_may_not_ask(client, pictures):
    for path in ("/api/answers", "/api/images?name=x", "/api/about"):
        body = None if path.endswith("about") else encode_image(pictures[0])
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            answer = client.ask(path, body, headers={"Origin": origin})
            assert answer.status == 403 and origin in answer.json["error"]
        own = client.ask(path, body, headers={"Origin": f"http://127.0.0.1:{client.port}"})
        assert own.status != 403


# The queue.


class Gate:
    """Stands in for the model: each answer waits at its second step until it is let through."""

    def __init__(self) -> None:
        self.started, self.go, self.closed = threading.Event(), threading.Event(), threading.Event()

    def answer(self, images: np.ndarray, asked: object) -> Generator[dict, None, None]:
        try:
            yield {"event": "start"}
            self.started.set()
            assert self.go.wait(LONGEST)
            yield {"event": "rows"}
            yield {"event": "done"}
        finally:
            self.closed.set()


@pytest.fixture
def gated(start, pictures, monkeypatch) -> Callable[..., tuple]:
    """Return a function that starts a server whose answers wait in turn at the gates given."""

    def serve(*gates: Gate, waiting: int = 8) -> tuple:
        client = start(waiting=waiting)
        asked = asked_of(client, pictures)
        turns = iter([*gates, Gate()])  # one more for who is refused
        monkeypatch.setattr(client.service.answerer, "answer", lambda *a: next(turns).answer(*a))
        return client, asked

    return serve


def test_one_job_at_a_time_the_others_know_their_place(gated):
    gates = [Gate(), Gate(), Gate()]
    client, asked = gated(*gates, waiting=2)
    first = client.open_answers(asked)[1]
    assert gates[0].started.wait(LONGEST)
    second, third = client.open_answers(asked)[1], client.open_answers(asked)[1]
    assert [next(second)["event"], next(second)] == ["prompt", {"event": "queued", "ahead": 1}]
    assert [next(third)["event"], next(third)] == ["prompt", {"event": "queued", "ahead": 2}]
    full = client.ask("/api/answers", json.dumps(asked).encode())
    assert full.status == 503 and "is at work and 2 wait" in full.json["error"]
    assert client.ask("/api/about").status == 200  # the model's thread is not the server's
    assert not gates[1].started.is_set()
    gates[0].go.set()
    assert list(first)[-1] == {"event": "done"}
    assert next(third) == {"event": "queued", "ahead": 1}
    gates[1].go.set()
    gates[2].go.set()
    assert list(second)[-1] == list(third)[-1] == {"event": "done"}


def test_hanging_up_in_the_queue_makes_room(gated):
    gates = [Gate(), Gate()]
    client, asked = gated(gates[0], Gate(), gates[1])
    first = client.open_answers(asked)[1]
    assert gates[0].started.wait(LONGEST)
    sock, second = client.open_answers(asked)
    assert next(second)["event"] == "prompt"
    third = client.open_answers(asked)[1]
    assert [next(third)["event"], next(third)["ahead"]] == ["prompt", 2]
    sock.shutdown(socket.SHUT_RDWR)
    assert next(third) == {"event": "queued", "ahead": 1}
    for gate in gates:
        gate.go.set()
    assert list(first)[-1] == list(third)[-1] == {"event": "done"}


def test_hanging_up_stops_the_model(client, pictures, monkeypatch):
    reached, go, closed = threading.Event(), threading.Event(), threading.Event()
    real, drawn = answers_module.stream, []

    def watched(*args):
        pieces = real(*args)
        try:
            for piece in pieces:
                drawn.append(piece)
                yield piece
                reached.set()
                assert go.wait(LONGEST)
        finally:
            pieces.close()
            closed.set()

    monkeypatch.setattr(answers_module, "stream", watched)
    sock, events = client.open_answers(asked_of(client, pictures[:1], "frames", new=4))
    assert [next(events)["event"] for _ in range(4)] == ["prompt", "queued", "start", "rows"]
    assert reached.wait(LONGEST)
    ticket = client.jobs.running
    sock.shutdown(socket.SHUT_RDWR)
    assert ticket.cancelled.wait(LONGEST)
    go.set()
    assert closed.wait(LONGEST)
    assert len(drawn) == 2, "of eight rows the one at work when it was noticed, and no more"
    monkeypatch.undo()
    assert client.answers(asked_of(client, pictures))[-1]["event"] == "done"


def test_a_server_that_is_stopped_says_so_to_those_who_wait(gated):
    gates = [Gate(), Gate()]
    client, asked = gated(*gates)
    first = client.open_answers(asked)[1]
    assert gates[0].started.wait(LONGEST)
    second = client.open_answers(asked)[1]
    assert next(second)["event"] == "prompt"
    client.jobs.stop()
    for events in (first, second):
        assert "the server was stopped" in list(events)[-1]["error"]
    gates[0].go.set()
    assert gates[0].closed.wait(LONGEST)
    late = client.ask("/api/answers", json.dumps(asked).encode())
    assert late.status == 503 and "is being stopped" in late.json["error"]


def test_a_defect_of_ours_is_a_message_without_a_traceback(client, pictures, monkeypatch, caplog):
    asked = asked_of(client, pictures)

    def broken(*args):
        yield {"event": "start"}
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(client.service.answerer, "answer", broken)
    last = client.answers(asked)[-1]
    assert last["event"] == "error" and "the server failed on this prompt" in last["error"]
    assert "secret" not in last["error"] and "secret of the server" in caplog.text
    monkeypatch.undo()
    assert client.answers(asked)[-1]["event"] == "done"
    monkeypatch.setattr(client.service, "recall", lambda key: 1 / 0)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(client.service.store, "put", lambda *a, **k: (_ for _ in ()).throw(full))
    failed = client.ask("/api/images?name=x", encode_image(pictures[0]))
    assert failed.status == 507 and "No space left on device" in failed.json["error"]
    failed = client.ask("/api/prompts/" + "0" * 20)
    assert failed.status == 500 and failed.json == {
        "error": "the server failed; its log says where"
    }
