"""The page in a real browser: nothing is loaded or reported, every picture is drawn, and it fits the screen."""

import io
import shutil

import pytest
from commands import liftdist
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="needs the library playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as library:
        try:
            opened = library.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("needs Chromium, or `playwright install chromium`")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(reported, tmp_path_factory, with_answers):
    """The page of two runs, one of a hostile name, with answers."""
    folder = tmp_path_factory.mktemp("written")
    runs = [shutil.copytree(reported, folder / name) for name in ("first", "<script>alert(1)" + "long" * 30)]
    for run_dir in runs:
        with_answers(run_dir, [0, 1, 0], [1, 0, 1], text="<script>alert(1)</script>" + "x" * 300)
    liftdist("report", *runs, "--output", folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_a_page_is_drawn(browser, written, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(written.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background, text = (0, 255) if scheme == "dark" else (255, 0)
    figures = page.query_selector_all("figure > svg")  # without their titles
    assert len(figures) == 5 + 1 + 2 * (3 + 9)
    for figure in figures:
        colours = Image.open(io.BytesIO(figure.screenshot())).convert("RGB").getcolors(1 << 20)
        shades = {sum(colour) / 3 for _, colour in colours}
        assert len({colour for _, colour in colours if max(colour) - min(colour) > 60}) > 3, figure.get_attribute(
            "aria-label"
        )
        assert min(abs(shade - background) for shade in shades) < 30
        assert min(abs(shade - text) for shade in shades) < 60
    page.close()
