"""The page in a real browser: mouse, keys, Korean, pastes, two tabs, a server that dies, markup in the text."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import pytest

import unmask

if TYPE_CHECKING:
    from tests.serve.conftest import Server

STATIC = Path(unmask.__file__).parent / "serve" / "static"
SENTENCE = "the cat sat on the mat"
Result = TypeVar("Result")


class Page:
    """A tab of the browser with the playground in it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str, **values: str) -> None:
        """Load the page anew, with a link's values."""
        self.driver.get("about:blank")
        self.driver.get(f"{address}#{urlencode(values)}" if values else address)
        self.until(lambda: self.all("#words button"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
        )

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def type(self, text: str) -> None:
        """Replace the text by typing."""
        self.one("#text").clear()
        self.one("#text").send_keys(text)

    def paste(self, text: str) -> None:
        """Replace the text as a paste does."""
        self.one("#text").click()
        self.driver.execute_script(
            "document.getElementById('text').select(); document.execCommand('insertText', false, arguments[0])", text
        )

    def until(self, condition: Callable[[], Result], seconds: float = 20) -> Result:
        """Wait until a condition holds, and return what it returned."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.driver.execute_script("return document.body.innerText")
            time.sleep(0.02)
        return found

    def errors(self) -> list[str]:
        """What the console shows as an error since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromedriver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if chromedriver is None or chromium is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--lang=en", "--window-size=1200,1000", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield started
    started.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    """A tab without errors in its console before."""
    opened = Page(driver)
    opened.errors()
    yield opened
    while len(driver.window_handles) > 1:
        driver.close()
        driver.switch_to.window(driver.window_handles[0])


def expected(server: Server, text: str) -> list[list[str]]:
    """The candidates that the page should show for each mask."""
    (result,) = server.post("/fill", {"texts": [text], "top": 8})[1]["results"]
    return [[candidate["shown"] for candidate in mask["candidates"]] for mask in result["masks"]]


def cards(page: Page, number: int = 1) -> list[list[str]]:
    """The candidates that the page shows for each mask of a model."""
    column = f".column:nth-of-type({number}) .card"
    return [page.texts(f"{column}:nth-of-type({card + 1}) .candidate") for card in range(len(page.all(column)))]


def test_words_are_masked_by_mouse_and_by_keys_as_one_types(page: Page, server: Server) -> None:
    page.open(server.address, b="")
    page.type(SENTENCE)
    page.until(lambda: page.texts("#words button") == SENTENCE.split())
    page.all("#words button")[1].click()
    page.until(lambda: cards(page) == expected(server, "the [MASK] sat on the mat"))
    assert "cat" in page.texts(".card h3")[0] and page.texts("#status")[0].startswith("cats, mask 1:")
    page.keys("\ue014", "\ue014", "\ue014", "\ue014", " ")  # four times to the right
    page.until(lambda: cards(page) == expected(server, "the [MASK] sat on the [MASK]"))
    pressed = [one.get_attribute("aria-pressed") for one in page.all("#words button")]
    assert pressed == ["false", "true", "false", "false", "false", "true"]
    assert page.all("#words button")[5].accessible_name == "mat, masked"
    page.one("#text").send_keys("\ue011", "and ")  # at the beginning; the masks move with their words
    page.until(lambda: cards(page) == expected(server, "and the [MASK] sat on the [MASK]"))
    page.all("#words button")[2].send_keys("\ue007")  # Enter
    page.until(lambda: cards(page) == expected(server, "and the cat sat on the [MASK]"))
    assert page.errors() == []


def test_a_word_of_several_tokens_is_masked_as_a_whole_and_filled_jointly(page: Page, server: Server) -> None:
    (tokenized,) = server.post("/tokenize", {"texts": ["the moon sat"]})[1]["results"]
    count = tokenized["words"][1]["num_tokens"]
    assert count > 1
    page.open(server.address, text="the moon sat", masks="1", a="cats", b="")
    page.until(lambda: cards(page) == expected(server, f"the {'[MASK]' * count} sat"))
    assert f"token 1 of {count}" in page.texts(".card h3")[0]
    page.one("#controls select").send_keys("all masks together, from")
    (result,) = server.post("/fill", {"texts": [f"the {'[MASK]' * count} sat"], "joint": "beam", "top": 8})[1][
        "results"
    ]
    page.until(lambda: page.texts(".sentence") == [filling["sequence"] for filling in result["fillings"]])
    assert page.errors() == []


def test_every_view_is_reached_by_keys_and_answers_for_both_models(page: Page, server: Server) -> None:
    page.open(server.address, text=SENTENCE, masks="1", a="cats", b="cats/step-0000003")
    page.until(lambda: len(page.all(".column")) == 2 and cards(page, 2))
    assert page.texts("h2") == ["cats", "cats/step-0000003"]
    page.one("#tab-fill").send_keys("\ue014")
    page.until(lambda: len(page.all(".surprisal")) == 2)
    scored = page.texts(".column:first-child .scored span")
    assert scored == SENTENCE.split() and page.driver.switch_to.active_element.get_attribute("id") == "tab-surprisal"
    page.keys("\ue014")
    page.until(lambda: page.texts("#controls option")[:6] == SENTENCE.split())
    page.all("#controls input")[0].send_keys("moon")
    page.until(lambda: len(page.all(".result")) == 2)
    assert page.texts(".column:first-child .surprisal")[1].count("moon") == 1
    page.all("#controls input")[0].clear()
    page.all("#controls input")[0].send_keys("cat")  # the word itself
    page.until(lambda: ["as many bits" in text for text in page.texts(".result")] == [True, True])
    page.one("#tab-swap").send_keys("\ue014")
    page.until(lambda: len(page.all(".heat")) == 2)
    tokens = ["[CLS]", "the", "[MASK]", "sat", "on", "the", "mat", "[SEP]"]
    assert page.texts(".column:first-child .heat th[scope=col]") == tokens
    page.all(".column:first-child .distances button")[3].click()
    page.until(lambda: "layer 2, head 2" in page.texts(".heat caption")[0])
    page.one("#tab-attention").send_keys("\ue014")
    page.until(lambda: page.one("#controls button[type=submit]").is_displayed())
    page.all("#controls input[type=range]")[1].send_keys("\ue010")  # End: the highest speed
    page.all("#controls input")[0].send_keys("\ue007")
    page.until(lambda: [text.startswith("step 12 of 12") for text in page.texts(".facts")] == [True, True])
    assert page.texts(".generated")[0].startswith("the")
    page.one("#tab-generate").send_keys("\ue014")
    page.until(lambda: page.all(".question .box"))
    page.all("#controls input")[0].send_keys("cat", "\ue007")
    page.until(lambda: "of 1" in page.texts("#answers .facts")[0])
    assert re.search("It was “[a-z]+”", page.texts(".result")[0])
    page.type("the cat sat on the [MASK]")
    page.until(lambda: page.texts("#answers") == ["Remove [MASK] from the text: the quiz hides a word itself."])
    assert page.errors() == []


def test_korean_is_typed_and_the_page_is_korean(page: Page, server: Server) -> None:
    agent = page.driver.execute_script("return navigator.userAgent")
    for language, heading in (("ko-KR", "빈칸 채우기"), ("en-US", "Fill")):
        override = {"userAgent": agent, "acceptLanguage": language}
        page.driver.execute_cdp_cmd("Network.setUserAgentOverride", override)
        page.open(server.address, b="")
        assert page.texts("#tab-fill") == [heading]
        assert page.driver.execute_script("return document.documentElement.lang") == language[:2]
        page.type("고양이가 매트 위에 앉아")
        page.until(lambda: page.texts("#words button") == ["고양이가", "매트", "위에", "앉아"])
        page.all("#words button")[3].click()
        (tokenized,) = server.post("/tokenize", {"texts": ["고양이가 매트 위에 앉아"]})[1]["results"]
        masks = "[MASK]" * tokenized["words"][3]["num_tokens"]
        page.until(lambda masks=masks: cards(page) == expected(server, f"고양이가 매트 위에 {masks}"))
    assert page.errors() == []


def test_errors_of_the_server_are_korean_on_the_korean_page(page: Page, server: Server) -> None:
    agent = page.driver.execute_script("return navigator.userAgent")
    page.driver.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "ko-KR"})
    page.open(server.address, text="cat " + "[MASK] " * 101, b="")
    (problem,) = page.until(lambda: page.texts(".problem"))
    assert re.search("101개.*100개.*마스크를 줄이세요", problem) and not re.search("[a-z]", problem)
    page.open(server.address, text=SENTENCE, b="", view="attention")
    page.type("the cat sat " * 60)
    page.until(lambda: page.texts(".problem") and re.search("어텐션.*글을 줄이세요", page.texts(".problem")[0]))
    page.driver.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en-US"})


def test_every_error_that_the_page_can_cause_has_a_korean_text(server: Server) -> None:
    script = (STATIC / "words.js").read_text("utf-8")
    patterns = [re.compile(found) for found in re.findall(r'^  \[/(.+)/, "', script, re.MULTILINE)]
    long = "the cat sat " * 800
    requests: list[tuple[str, dict[str, object]]] = [
        ("/fill", {"texts": ["[MASK]" * 101]}),
        ("/fill", {"texts": ["[MASK] " * 60], "joint": "beam", "words": 4}),
        ("/fill", {"texts": ["[MASK] [MASK] [MASK] [MASK] [MASK] [MASK] [MASK]"], "joint": "beam", "words": 6}),
        ("/fill", {"texts": [long + "[MASK]"], "joint": "best-first"}),
        ("/attention", {"text": long}),
        ("/generate", {"prefix": long, "length": 5}),
        ("/generate", {"prefix": SENTENCE, "length": 100}),
        ("/score", {"texts": [long] * 4}),
    ]
    for path, body in requests:
        status, answer = server.post(path, body)
        assert status == 400, (path, answer)
        for text in (answer["error"], answer["hint"]):
            assert any(pattern.search(text) for pattern in patterns), (path, text)


def test_a_paste_that_is_too_long_is_refused_and_the_page_goes_on(page: Page, server: Server) -> None:
    page.open(server.address, text=SENTENCE, b="")
    page.paste("고" * 100_000)
    alert = page.until(lambda: page.one("#alert").text)
    assert "100,000 characters" in alert and "10,000" in alert
    assert page.one("#text").get_attribute("value") == SENTENCE
    page.paste("the moon")
    page.until(lambda: page.texts("#words button") == ["the", "moon"] and not page.one("#alert").is_displayed())
    assert page.errors() == []


def test_markup_in_the_text_is_text(page: Page, server: Server) -> None:
    text = "<img src=x onerror='document.title=1'> <b>cat</b> & <script>x</script>"
    page.open(server.address, text=text, masks="0", b="")
    page.until(lambda: page.all(".card"))
    assert page.texts("#words") == [text]
    for view in ("surprisal", "swap", "attention", "generate", "quiz"):
        page.one(f"#tab-{view}").click()
        page.until(lambda: page.all("#answers *"))
    page.one("#tab-surprisal").click()
    page.until(lambda: page.all(".surprisal"))
    assert page.all("main img, main b, main script") == [] and page.driver.title == "unmask"
    assert page.errors() == []


def test_two_tabs_have_their_own_texts_and_a_link_opens_the_same_page(page: Page, server: Server) -> None:
    page.open(server.address, text=SENTENCE, masks="1", b="")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open(server.address, text="a dog ran", b="")
    page.all("#words button")[2].click()
    page.until(lambda: len(cards(page)) > 0)
    link, shown = page.driver.current_url, cards(page)
    page.driver.switch_to.window(first)
    page.until(lambda: cards(page) == expected(server, "the [MASK] sat on the mat"))
    page.driver.get(link)  # only the fragment changes
    page.until(lambda: page.texts("#words button") == ["a", "dog", "ran"] and cards(page) == shown)
    assert page.errors() == []


def test_a_server_that_dies_is_reported_and_the_page_recovers(page: Page, server: Server) -> None:
    page.open(server.address, text=SENTENCE, masks="1", a="cats", b="")
    page.until(lambda: cards(page))
    page.one("#tab-generate").click()
    page.until(lambda: page.all("#controls button[type=submit]"))
    page.all("#controls input")[2].clear()
    page.all("#controls input")[2].send_keys("50", "\ue007")  # in mid-request
    page.until(lambda: page.all(".generated"))
    try:
        server.stop(signal.SIGKILL)
        page.one("#tab-fill").click()
        page.type("the cat sat")
        page.until(lambda: "does not answer" in page.one("#alert").text)
    finally:
        server.start_again()
    page.until(lambda: page.texts("#words button") == ["the", "cat", "sat"])
    page.until(lambda: not page.one("#alert").is_displayed())
    page.until(lambda: cards(page) == expected(server, "the [MASK] sat"))
    page.driver.get("about:blank")


def test_a_page_of_another_origin_can_not_read_answers(page: Page, server: Server) -> None:
    page.driver.get("data:text/html,elsewhere")
    script = """
        const done = arguments[arguments.length - 1];
        fetch(arguments[0], {method: "POST", body: "{}", headers: {"Content-Type": "application/json"}})
            .then((answer) => done(answer.status), (error) => done(error.name));
    """
    assert page.driver.execute_async_script(script, f"{server.address}fill") == "TypeError"


def test_both_languages_have_the_same_words_and_use_them_all() -> None:
    tables = re.findall(r"const (?:EN|KO) = \{\n(.*?)\n\};", (STATIC / "words.js").read_text("utf-8"), re.DOTALL)
    english, korean = (dict(re.findall(r'^  (\w+): "(.*)",$', table, re.MULTILINE)) for table in tables)
    assert list(english) == list(korean)
    fields = re.compile(r"\{(\w+)\}")
    for key, text in english.items():
        assert sorted(fields.findall(text)) == sorted(fields.findall(korean[key])), key
    code = "".join(path.read_text("utf-8") for path in STATIC.iterdir() if path.name not in ("words.js", "app.js"))
    code += (STATIC / "app.js").read_text("utf-8")
    views = set(re.search(r"const VIEWS = \{ (.*) \};", code)[1].split(", "))  # pyright: ignore[reportOptionalSubscript]
    unused = [key for key in english if f'"{key}"' not in code and key not in views]
    assert unused == []
