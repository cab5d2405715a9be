"""The playground in a real browser: pictures in, rows appearing, answers out, mistakes shown."""

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvm.playground import answers as answers_module
from tokenizer.images import encode_image, read_image, save_image

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 1300, 1000
LONGEST = 20.0  # seconds that a condition is waited for


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for word in (
        "headless=new", "no-sandbox", "disable-dev-shm-usage", "force-device-scale-factor=1",
        # Whatever is not for this machine goes to a port where nobody listens.
        "proxy-server=127.0.0.1:9", "proxy-bypass-list=127.0.0.1",
    ):  # fmt: skip
        options.add_argument(f"--{word}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, service=webdriver.ChromeService(driver))
    browser.set_window_size(WIDTH, HEIGHT)
    yield browser
    browser.quit()


class Page:
    """What a user does and sees."""

    def __init__(self, browser, port: int) -> None:
        self.browser, self.address = browser, f"http://127.0.0.1:{port}"

    def open(self, place: str = "/") -> None:
        self.browser.get("about:blank")  # or a change of the hash alone would load nothing
        self.browser.get(self.address + place)
        self.wait(lambda: self.all("#slots .slot"))

    def wait(self, condition: Callable[[], object]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, LONGEST, poll_frequency=0.05).until(lambda _: condition())

    def find(self, name: str):
        return self.browser.find_element("id", name)

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def run(self, script: str, *arguments: object):
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def choose(self, files: list[Path]) -> None:
        self.find("files").send_keys("\n".join(map(str, files)))

    def put(self, name: str, value: float) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].oninput?.()"
        self.run(script, self.find(f"set-{name}"), value)

    def filled(self, count: int) -> None:
        self.wait(lambda: len(self.all("#slots .slot.full")) == count)

    def generate(self) -> None:
        self.find("go").click()
        self.done()

    def done(self) -> None:
        self.wait(lambda: self.find("tools").is_displayed() and self.find("go").is_enabled())

    @property
    def problems(self) -> list[str]:
        return [item.text for item in self.all("#problems li")]

    @property
    def answers(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('#cards img')].map(i => i.src)")

    def requests(self) -> set[str]:
        """Addresses of all requests since the last call."""
        entries = [
            json.loads(line["message"])["message"] for line in self.browser.get_log("performance")
        ]
        sent = [e for e in entries if e["method"] == "Network.requestWillBeSent"]
        return {e["params"]["request"]["url"] for e in sent}


@pytest.fixture
def page(browser, client) -> Iterator[Page]:
    page = Page(browser, client.port)
    page.requests()
    browser.get_log("browser")
    page.open()
    yield page
    browser.set_window_size(WIDTH, HEIGHT)
    local = (page.address + "/", "data:", "blob:", "about:")
    seen = page.requests()
    assert page.address + "/api/about" in seen
    assert not [url for url in seen if not url.startswith(local)]
    # A status of our own is logged by the browser too; anything else is a mistake of the page's.
    severe = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not [m for m in severe if "the server responded with a status of" not in m], severe


@pytest.fixture
def files(tmp_path: Path, pictures) -> list[Path]:
    """Two pairs and a query, whose order by name is that of the prompt."""
    paths = [tmp_path / f"{i}.png" for i in (1, 2, 3, 10, 11)]
    for path, picture in zip(paths, pictures, strict=True):
        save_image(path, picture)
    return paths


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Stop every answer after its first row until the event is set."""
    go, real = threading.Event(), answers_module.stream

    def stream(*args):
        pieces = real(*args)
        yield next(pieces)
        assert go.wait(LONGEST)
        yield from pieces

    monkeypatch.setattr(answers_module, "stream", stream)
    return go


def png(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


def test_from_files_to_answers_that_appear_row_by_row(page, client, files, pictures, held):
    page.choose(files[::-1])
    page.filled(5)
    ids = page.run("return [...document.querySelectorAll('#slots img')].map(i => i.src)")
    for source, picture in zip(ids, pictures, strict=True):
        kept = client.ask(source.removeprefix(page.address)).body
        assert np.array_equal(read_image(kept, size=8), picture)
    page.find("go").click()
    page.wait(lambda: page.find("status").text == "Row 1 of 2")
    page.wait(lambda: len(page.all("#cards img")) == 4)
    sizes = (
        "return [...document.querySelectorAll('#cards img')]"
        ".map(i => [i.naturalWidth, i.naturalHeight])"
    )
    page.wait(lambda: page.run(sizes) == [[8, 4]] * 4)
    assert page.find("progress").is_displayed() and not page.find("tools").is_displayed()
    assert page.find("stop").is_displayed() and not page.find("go").is_enabled()
    shown, place = (page.run(f"return document.querySelector('{s}').getBoundingClientRect()")
                    for s in ("#cards img", "#cards .picture"))  # fmt: skip
    assert shown["height"] == pytest.approx(place["height"] / 2, abs=1)  # whole CSS pixels
    held.set()
    page.done()
    page.wait(lambda: page.run(sizes) == [[8, 8]] * 4)
    assert page.find("status").text.startswith("4 answers in")
    assert len(page.all(".tag")) == 1 and not page.problems


def test_answers_are_ordered_and_downloaded(page, files, downloads):
    from selenium.webdriver.support.ui import Select

    page.choose(files)
    page.filled(5)
    page.generate()
    drawn = page.answers
    Select(page.find("order")).select_by_value("nats")
    nats = [
        float(card.text.split(" nats")[0].split()[-1]) for card in page.all("#cards figcaption")
    ]
    assert nats == sorted(nats) and sorted(page.answers) == sorted(drawn)
    assert "likeliest" in page.all(".card")[0].text
    Select(page.find("order")).select_by_value("gain")
    gains = [c.text.split("prompt ")[1].split()[0] for c in page.all("#cards figcaption")]
    values = [float(gain.replace("−", "-")) for gain in gains]
    assert values == sorted(values, reverse=True)
    Select(page.find("order")).select_by_value("drawn")
    assert page.answers == drawn
    page.all("figcaption .files a")[1].click()
    page.find("sheet").click()
    page.wait(lambda: {"answer-2.png", "sheet.png"} <= {p.name for p in downloads.iterdir()})
    assert (downloads / "answer-2.png").read_bytes() == png(drawn[1])
    with Image.open(downloads / "sheet.png") as sheet:
        assert sheet.size == (2 * 98 + 2, 6 * 98 + 2)


def test_a_link_reproduces_prompt_settings_and_answers(page, files):
    page.choose(files)
    page.filled(5)
    for name, value in (("seed", 11), ("temperature", 0.7), ("candidates", 2), ("guidance", 1.5)):
        page.put(name, value)
    page.generate()
    answers, link = page.answers, page.browser.current_url
    assert len(answers) == 2 and "#p=" in link
    page.put("seed", 12)
    page.generate()
    assert page.answers != answers and page.browser.current_url != link
    page.open(link.removeprefix(page.address))
    page.done()
    assert page.answers == answers and not page.problems
    values = page.run(
        "return ['seed', 'temperature', 'candidates', 'guidance']"
        ".map(k => document.getElementById('set-' + k).value)"
    )
    assert values == ["11", "0.7", "2", "1.5"]
    page.open("/#p=" + "0" * 20)
    page.wait(lambda: page.problems)
    assert "the prompt of this link is not stored here" in page.problems[0]


def test_mistakes_are_shown_and_leave_the_page_usable(page, files, tmp_path: Path):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "poster.png")
    page.find("go").click()
    assert "some places of the prompt are empty" in page.problems[0]
    page.choose([tmp_path / "notes.png", tmp_path / "poster.png", files[0]])
    page.filled(1)
    page.wait(lambda: len(page.problems) == 2)
    assert "notes.png cannot be used: not an image" in page.problems[0]
    assert "poster.png cannot be used: too large (100 megapixels" in page.problems[1]
    page.find("clear").click()
    page.choose(files)
    page.filled(5)
    assert not page.problems
    page.choose([files[0]])
    page.wait(lambda: page.problems)
    assert "has no place: this model reads at most 5 pictures" in page.problems[0]
    page.generate()
    assert not page.problems and len(page.answers) == 4


def test_files_are_dropped_on_places_and_pasted(page, pictures):
    give = """
        const transfer = new DataTransfer();
        for (const [name, data] of arguments[2]) {
          transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
        }
        const all = { bubbles: true, cancelable: true };
        arguments[0].dispatchEvent(arguments[1] === "paste"
          ? new ClipboardEvent("paste", { clipboardData: transfer, ...all })
          : new DragEvent(arguments[1], { dataTransfer: transfer, ...all }));
    """
    data = [
        (f"{i}.png", base64.b64encode(encode_image(p)).decode()) for i, p in enumerate(pictures)
    ]
    places = page.all("#slots .slot[data-place]")
    page.run(give, places[2], "dragover", data[:1])
    assert "over" in places[2].get_attribute("class")
    page.run(give, places[2], "drop", data[:1])
    page.filled(1)
    full = page.all("#slots .slot.full")[0]
    assert full.get_attribute("data-place") == "2" and not page.all(".over")
    page.run(give, page.find("ask"), "paste", data[1:3])
    page.filled(3)
    page.run(give, page.find("answers"), "drop", [])
    assert "that was no picture file" in page.problems[0]


def test_the_keyboard_is_enough(page, files, held):
    from selenium.webdriver.common.keys import Keys

    page.all("#examples button")[0].send_keys(Keys.ENTER)
    page.filled(5)
    page.all("#slots .slot button")[0].send_keys(Keys.DELETE)
    page.filled(4)
    label = page.browser.switch_to.active_element.get_attribute("aria-label")
    assert label == "Before 1: empty; choose a picture"
    page.choose(files[:1])
    page.filled(5)
    page.find("set-candidates").send_keys(Keys.HOME, Keys.RIGHT)
    page.press(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.find("status").text == "Row 1 of 2")
    assert len(page.all(".card")) == 2
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.find("status").text == "Cancelled.")
    assert not page.all(".card") and page.find("go").is_enabled()
    held.set()
    page.press(Keys.CONTROL, Keys.ENTER)
    page.done()
    assert len(page.answers) == 2


def test_frames_and_the_history_of_the_session(page, files):
    page.all(".kinds label")[1].click()
    page.choose(files[:3])
    page.filled(3)
    page.put("new", 2)
    page.put("candidates", 1)
    page.generate()
    frames = page.answers
    assert len(frames) == 2 and page.all("#cards.long")
    page.all("#examples button")[0].click()
    page.filled(5)
    assert not page.find("set-new").is_displayed()
    page.generate()
    assert len(page.all("#history button")) == 2 and len(page.answers) == 1
    page.all("#history button")[1].click()
    assert page.answers == frames
    page.filled(3)
    assert page.run("return document.querySelector('[name=kind]:checked').value") == "frames"


def test_everything_has_a_name_and_fits_a_narrow_screen_in_light_and_dark(page, tmp_path: Path):
    page.all("#examples button")[0].click()
    page.filled(5)
    page.generate()
    controls = page.all("button, input, select, a[href], progress, figure, #cards img")
    shown = [control for control in controls if control.is_displayed()]
    assert len(shown) > 30
    assert not [c.get_attribute("outerHTML") for c in shown if not c.accessible_name.strip()]
    pages = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for width in (WIDTH, 360):
            metrics = {
                "width": width,
                "height": HEIGHT,
                "deviceScaleFactor": 1,
                "mobile": width < 500,
            }
            page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            over = page.run(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert over <= 0, (scheme, width)
            page.browser.save_screenshot(str(tmp_path / "page.png"))
            with Image.open(tmp_path / "page.png") as image:
                pages[scheme, width] = np.asarray(image.convert("L")).astype(float)
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for width in (WIDTH, 360):
        assert np.median(pages["light", width]) > 200 and np.median(pages["dark", width]) < 60
        for shot in (pages["light", width], pages["dark", width]):
            assert len(np.unique(shot)) > 50, "blank"
