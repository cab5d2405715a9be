"""The page of `view` in a real browser: what is drawn, and what the filter and a click do."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenizer.images import encode_image
from visual_sentences.image_shards import write_images
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.view import View, view

pytestmark = pytest.mark.slow

SIZE, ROWS, IMAGES = 64, 25, 16  # pixels; rows of each source, images of a row
SOURCES = {"birds": ("category", (210, 40, 40)), "walks": ("video", (30, 90, 200))}
WIDTH, HEIGHT = 1500, 1000


def write_source(folder: Path, name: str, colour: tuple[int, int, int]) -> ShardEntry:
    """Write rows of flat pictures: the first of row 0 has `colour`, all others are darker."""
    bright = encode_image(np.full((SIZE, SIZE, 3), colour, np.uint8), format="JPEG")
    dark = encode_image(np.full((SIZE, SIZE, 3), colour, np.uint8) // 2, format="JPEG")
    written = write_images(
        folder / f"{name}-train-00000.arrow",
        jpegs=[
            [dark if row or image else bright for image in range(IMAGES)] for row in range(ROWS)
        ],
        labels=[0 if name == "birds" else -1] * ROWS,
        keys=[
            [
                f"{name}/{row:03d}/{image:02d}.jpg" + "|flip" * (image == 3)
                for image in range(IMAGES)
            ]
            for row in range(ROWS)
        ],
        metadata={},
    )
    return ShardEntry(
        name=f"{name}-train-00000.arrow",
        source=name,
        split="train",
        rows=ROWS,
        documents=ROWS,
        images=ROWS * IMAGES,
        bytes=written.bytes,
        sha256=written.sha256,
        offset=0,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 50 rows of 16 images, two sources."""
    folder = tmp_path_factory.mktemp("page")
    Manifest(
        tokenizer="",
        codebook_size=0,
        codes_per_image=0,
        image_size=SIZE,
        row_len=0,
        seed=0,
        form="images",
        sources=tuple(
            SourceEntry(
                name=name,
                kind=kind,
                weight=None,
                repeat=None,
                preprocess="squash",
                license="CC0",
                note="",
                inputs=ROWS * IMAGES,
                good=ROWS * IMAGES,
                bad={},
                classes=("robin",) if name == "birds" else (),
            )
            for name, (kind, _) in SOURCES.items()
        ),
        shards=tuple(write_source(folder, name, SOURCES[name][1]) for name in SOURCES),
    ).save(folder)
    return view(View(data=folder, rows=ROWS))


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "force-device-scale-factor=1",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, service=webdriver.ChromeService(driver))
    browser.set_window_size(WIDTH, HEIGHT)
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, page: Path) -> Iterator:
    browser.get(page.as_uri())
    yield browser
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not errors, errors


def shown(browser) -> list[tuple[str, str]]:
    """Return source and number of the rows that are on the page, as the browser lays it out."""
    return [
        (row.get_attribute("data-source"), row.get_attribute("data-row"))
        for row in browser.find_elements("css selector", ".row")
        if row.is_displayed()
    ]


def choose(browser, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_visible_text(value)


def type_text(browser, text: str) -> None:
    field = browser.find_element("id", "text")
    field.clear()
    field.send_keys(text)


def count(browser) -> str:
    return browser.find_element("id", "count").text


def test_a_screenshot_shows_the_pictures(opened, tmp_path: Path) -> None:
    opened.save_screenshot(str(tmp_path / "page.png"))
    with Image.open(tmp_path / "page.png") as image:
        shot = np.asarray(image.convert("RGB")).astype(int)
    # The window's own frame takes the rest; 0.8: headless Chromium's is some 140 px high.
    assert shot.shape[1] == WIDTH and 0.8 * HEIGHT <= shot.shape[0] <= HEIGHT
    assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 50, "blank"
    first = opened.find_element("css selector", ".picture img")
    place = first.rect
    middle = shot[int(place["y"] + place["height"] / 2), int(place["x"] + place["width"] / 2)]
    # 4: JPEG of one flat colour rounds it in YCbCr
    assert np.abs(middle - SOURCES["birds"][1]).max() <= 4, middle
    assert place["width"] == place["height"] == 96


def test_all_pictures_load_and_the_page_is_not_wider_than_the_window(opened) -> None:
    broken = opened.execute_script(
        "return [...document.images].filter(i => i.src && !(i.complete && i.naturalWidth)).length"
    )
    assert broken == 0
    assert len(opened.find_elements("css selector", ".picture")) == 2 * ROWS * IMAGES
    for width in (WIDTH, 500):
        opened.set_window_size(width, HEIGHT)
        over = opened.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert over <= 0
    opened.set_window_size(WIDTH, HEIGHT)


def test_the_filter_leaves_what_was_asked_for(opened) -> None:
    everything = [(name, str(row)) for name in SOURCES for row in range(ROWS)]
    assert shown(opened) == everything and count(opened) == "50 rows"
    choose(opened, "source", "walks")
    assert shown(opened) == everything[ROWS:] and count(opened) == "25 of 50 rows"
    choose(opened, "kind", "category")
    assert shown(opened) == [] and count(opened) == "0 of 50 rows"
    choose(opened, "source", "all")
    assert shown(opened) == everything[:ROWS]
    choose(opened, "kind", "all")
    type_text(opened, "/017/")
    assert shown(opened) == [("birds", "17"), ("walks", "17")]
    type_text(opened, "WALKS/004/07")
    assert shown(opened) == [("walks", "4")]
    found = opened.find_elements("css selector", ".picture.found")
    assert [p.get_attribute("data-name") for p in found] == ["walks/004/07.jpg"]
    type_text(opened, "flip")
    assert len(shown(opened)) == 2 * ROWS


def test_a_click_says_where_the_picture_stands(opened) -> None:
    type_text(opened, "birds/004/03")
    opened.find_element("css selector", ".picture.found").click()
    dialog = opened.find_element("id", "about")
    assert dialog.is_displayed()
    lines = dialog.find_elements("css selector", "tr")
    facts = dict(
        tuple(cell.text for cell in line.find_elements("css selector", "th, td")) for line in lines
    )
    assert facts == {
        "name": "birds/004/03.jpg",
        "edit": "flip",
        "class": "robin",
        "source": "birds",
        "kind": "category",
        "split": "train",
        "shard": "birds-train-00000.arrow",
        "row": "4",
        "place": "3",
        "sentence": "0",
        "license": "CC0",
    }
    dialog.find_element("css selector", "button").click()
    assert not dialog.is_displayed()
