"""The page in a real browser: headless Chromium, by its driver, on pages served from loopback."""

import json
import shutil
import struct
import zlib

import pytest
import timm
import torch
from PIL import Image

import convmixer_timm
from convmixer_timm import load_model
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.images import image_loader
from convmixer_timm.inference.class_map import ClassMap
from convmixer_timm.inference.engines import unavailable

from ..conftest import IMAGES
from .browser import RUNTIME, Browser, need_browser
from .test_page import NAME, save, settings

PHONE = {"width": 375, "height": 667}


@pytest.fixture(scope="module")
def browser():
    need_browser()
    if reason := unavailable("onnxruntime"):
        pytest.skip(reason)
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory):
    """The page of a bundled checkpoint, with the runtime in it."""
    folder = tmp_path_factory.mktemp("page") / "cifar"
    convmixer_timm.page(NAME, folder, runtime=RUNTIME)
    return folder


@pytest.fixture(scope="module")
def url(browser, folder):
    return browser.serve(folder)


@pytest.fixture
def page(browser, url):
    """That page, opened; nothing may go wrong on it and nothing may leave the machine."""
    browser.open(url)
    yield browser
    assert browser.errors() == []
    assert browser.outside == []


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """100 larger pictures of many sizes and shapes, without and with loss."""
    folder = tmp_path_factory.mktemp("photographs")
    small = sorted(IMAGES.glob("*/*.png"))
    for i in range(100):
        size = (60 + 37 * i % 500, 50 + 53 * i % 400)
        image = Image.open(small[i % len(small)]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        grain = Image.effect_noise(size, 40).convert("RGB")
        Image.blend(image, grain, 0.15).save(folder / f"{i:02}.{'jpg' if i % 2 else 'png'}")
    return sorted(folder.iterdir())


def expected(model, path):
    """Logits and class maps of PyTorch."""
    with torch.inference_mode():
        logits, maps = ClassMap(model)(image_loader(model)(path)[None])
    return logits[0], maps[0]


def test_stored_images_get_pytorchs_logits_and_maps(page, tmp_path):
    model = load_model(NAME)
    paths = sorted((WEIGHTS_DIR / "images").glob("*.png"))
    for number, path in enumerate(sorted(IMAGES.glob("*/*.png"))):  # their names are the same in each folder
        paths.append(shutil.copy(path, tmp_path / f"{number}.jpg"))
    page.give("drop", *paths)
    answers = page.answers(len(paths))
    for path in paths:
        logits, maps = expected(model, path)
        answer = answers[path.name]
        assert (torch.tensor(answer["logits"]) - logits).abs().max() < 1e-3
        found = torch.tensor(answer["maps"]["data"]).view(10, 16, 16)
        assert (found - maps).abs().max() < 1e-3


def test_resized_photographs_get_pytorchs_classes(page, photographs):
    model = load_model(NAME)
    page.give("drop", *photographs)
    answers = page.answers(100)
    agreed = 0
    for path in photographs:
        logits, _ = expected(model, path)
        found = torch.tensor(answers[path.name]["logits"])
        agreed += int(found.argmax() == logits.argmax())
        if path.suffix == ".png":  # the same pixels, resized by the same arithmetic
            assert (found - logits).abs().max() < 1e-3
    assert agreed >= 98


PREPROCESSINGS = {
    "squash": {"CROP_MODE": "squash", "CROP_PCT": 0.9},
    "border": {"CROP_MODE": "border", "CROP_PCT": 0.95},
    "oblong": {"INPUT_SIZE": (3, 24, 32), "CROP_PCT": 0.8},
    "oblong squash": {"INPUT_SIZE": (3, 32, 24), "CROP_MODE": "squash"},
    "bilinear": {"INTERPOLATION": "bilinear"},
    "lanczos": {"INTERPOLATION": "lanczos"},
    "nearest": {"INTERPOLATION": "nearest"},
    "larger": {"INPUT_SIZE": (3, 224, 224), "CROP_PCT": 0.96},
    "padded": {"CROP_PCT": 1.3},
    "grey": {"INPUT_SIZE": (1, 28, 28), "in_chans": 1, "MEAN": (0.4,), "STD": (0.2,)},
}


@pytest.mark.parametrize("kind", PREPROCESSINGS)
def test_preprocessing_is_timms(kind, browser, tmp_path, photographs):
    name = save(tmp_path / "model", **PREPROCESSINGS[kind])
    convmixer_timm.page(name, tmp_path / "page", runtime=RUNTIME)
    model = load_model(name)
    paths = [path for path in photographs if path.suffix == ".png"][:8]
    browser.open(browser.serve(tmp_path / "page"))
    browser.give("drop", *paths)
    answers = browser.answers(len(paths))
    for path in paths:
        logits, maps = expected(model, path)
        assert (torch.tensor(answers[path.name]["logits"]) - logits).abs().max() < 1e-3 * logits.abs().max()
        found = torch.tensor(answers[path.name]["maps"]["data"]).view(maps.shape)
        assert (found - maps).abs().max() < 1e-3 * maps.abs().max()
    assert browser.errors() == []


def test_a_visitor_reads_classes_probabilities_and_heat_map(page):
    page.give("drop", IMAGES / "ship/0000.png")
    page.answers(1)
    assert page.text("article h3") == "ship"
    rows = page.driver.execute_script(
        """return [...document.querySelectorAll("article ol button")].map((row) =>
             [row.querySelector(".name").innerText, row.querySelector(".p").innerText, row.ariaPressed]);"""
    )
    logits, maps = expected(load_model(NAME), IMAGES / "ship/0000.png")
    best = logits.softmax(0).topk(5)
    labels = settings_labels()
    assert [(name, p) for name, p, _ in rows] == [
        (labels[i], f"{100 * p:.1f} %") for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    assert [pressed for *_, pressed in rows] == ["true", *["false"] * 4]
    assert "0000.png · 32 \N{MULTIPLICATION SIGN} 32 · " in page.text("figcaption") and page.text(
        "figcaption"
    ).endswith(" ms")

    # The map lies over the whole picture, and is brightest where PyTorch's is highest.
    assert heat_box(page) == pytest.approx([0, 0, 1, 1], abs=0.01)
    for rank in (0, 1):
        page.click(f"article li:nth-child({rank + 1}) button")
        index = best.indices[rank].item()
        evidence = (maps[index] - maps.mean(0)).clamp(0).flatten()
        brightness = torch.tensor(heat(page)).view(-1, 4)[:, :3].sum(1).float()
        if rank == 0:
            assert brightness.argmax() == evidence.argmax()
        assert torch.corrcoef(torch.stack([brightness, evidence]))[0, 1] > 0.9
        assert f"what speaks for {labels[index]}" in page.text(".hint")
    page.click(".toggle")
    assert page.driver.execute_script("return document.querySelector('.heat').hidden")
    page.click("article .remove")
    assert page.text("#results") == ""


def settings_labels():
    return timm.get_pretrained_cfg(NAME).label_names


def heat(browser):
    return browser.driver.execute_script(
        """const map = document.querySelector(".heat");
        return [...map.getContext("2d").getImageData(0, 0, map.width, map.height).data];"""
    )


def heat_box(browser):
    """Where the heat map lies on the picture: left, top, width and height, as shares of it."""
    return browser.driver.execute_script(
        """const map = document.querySelector(".heat").getBoundingClientRect();
        const picture = document.querySelector(".stage img").getBoundingClientRect();
        return [(map.x - picture.x) / picture.width, (map.y - picture.y) / picture.height,
                map.width / picture.width, map.height / picture.height];"""
    )


def test_every_way_in(page):
    from selenium.webdriver.common.by import By

    page.give("paste", IMAGES / "cat/0000.png")
    page.answers(1)
    chosen = [str(IMAGES / "truck/0000.png"), str(IMAGES / "frog/0001.png")]
    page.driver.find_element(By.ID, "files").send_keys("\n".join(chosen))
    assert set(page.answers(2)) == {"0000.png", "0001.png"}
    page.click("#examples button:nth-of-type(3)")
    assert set(page.answers(1)) == {"ship"}
    assert page.text("article h3") == "ship"
    page.click("#camera")  # Chromium has one to test with
    page.wait("document.querySelector('video').videoWidth")
    page.click("#shoot")
    assert set(page.answers(1)) == {"camera.png"}
    page.wait("!document.querySelector('video').srcObject")
    assert page.driver.execute_script("return document.querySelectorAll('article').length") == 5


def huge_png(path, side=20_000):
    """A picture of many pixels in few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_files_that_are_no_good_get_one_line_each(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    photo = (WEIGHTS_DIR / "images/cat.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(photo[: len(photo) // 2])
    huge_png(tmp_path / "huge.png")
    page.give("drop", *sorted(tmp_path.iterdir()), IMAGES / "ship/0000.png")
    page.answers(1)
    page.wait("document.querySelectorAll('.problem[role]').length === 4")
    lines = page.driver.execute_script("return [...document.querySelectorAll('.problem span')].map((l) => l.innerText)")
    assert sorted(lines) == [
        "cut.png is damaged, or no image that this browser can read.",
        "empty.png is no image that this browser can read.",
        "huge.png is too large: 400 million pixels, and this page reads up to 89.",
        "notes.txt is no image that this browser can read.",
    ]
    assert page.text("article h3") == "ship"
    page.click(".problem .remove")
    assert page.driver.execute_script("return document.querySelectorAll('.problem[role]').length") == 3


def test_nothing_is_left_to_do_after_a_damaged_or_removed_picture(page, tmp_path):
    photo = (WEIGHTS_DIR / "images/cat.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(photo[: len(photo) // 2])
    page.give("drop", IMAGES / "ship/0000.png", tmp_path / "cut.png")
    page.wait("document.querySelectorAll('.problem[role]').length === 1")
    page.answers(1)
    page.wait("document.querySelector('#state').innerText.startsWith('Runs on ')", 5)
    image = Image.linear_gradient("L").resize((6000, 4000)).convert("RGB")
    image.save(tmp_path / "large.png", compress_level=1)
    page.give("drop", tmp_path / "large.png")
    page.wait("document.querySelector('#state').innerText.startsWith('1 to go')", 20)
    page.click("article .remove")
    page.wait("document.querySelector('#state').innerText.startsWith('Runs on ')", 5)


def test_pictures_of_other_modes(page, tmp_path):
    """CMYK, grey with alpha, a palette, 16 bits, and one that lies on its side."""
    ship = Image.open(IMAGES / "ship/0000.png").convert("RGB")
    ship.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    ship.convert("P").save(tmp_path / "palette.gif")
    ship.save(tmp_path / "lossless.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    ship.rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    ship.convert("L").save(tmp_path / "grey.png")
    translucent = ship.copy()
    translucent.putalpha(200)
    translucent.save(tmp_path / "translucent.png")
    paths = sorted(tmp_path.iterdir())
    page.give("drop", *paths)
    answers = page.answers(len(paths))
    model = load_model(NAME)
    for path in paths:
        logits, _ = expected(model, path)
        found = torch.tensor(answers[path.name]["logits"])
        # A browser has its own way from inks to light, and multiplies by the alpha in 8 bits.
        tolerance = {"cmyk.jpg": None, "translucent.png": 0.2}.get(path.name, 1e-3)
        assert tolerance is None or (found - logits).abs().max() < tolerance, path.name
    assert page.driver.execute_script("return document.querySelectorAll('.problem[role]').length") == 0
    assert page.text("article h3")


def test_a_large_photograph_is_read_in_strips(page, tmp_path):
    image = Image.linear_gradient("L").resize((6000, 4000)).convert("RGB")
    image.paste(Image.open(IMAGES / "ship/0000.png").resize((2000, 2000)), (2000, 1000))
    image.save(tmp_path / "large.png", compress_level=1)
    page.give("drop", tmp_path / "large.png")
    found = page.answers(1)["large.png"]["logits"]
    logits, _ = expected(load_model(NAME), tmp_path / "large.png")
    assert (torch.tensor(found) - logits).abs().max() < 1e-3


def test_by_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        page.driver.switch_to.active_element.send_keys(*keys)

    def tab():
        key = {"type": "keyDown", "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        page.driver.execute_cdp_cmd("Input.dispatchKeyEvent", key)

    def focused(selector):
        return page.driver.execute_script("return document.activeElement.matches(arguments[0])", selector)

    for _ in range(10):
        tab()
        if focused("#examples button:nth-of-type(2)"):
            break
    press(Keys.ENTER)
    page.answers(1)
    for _ in range(10):
        tab()
        if focused("article li:nth-child(2) button"):
            break
    before = heat(page)
    press(Keys.SPACE)
    assert page.driver.execute_script("return document.activeElement.ariaPressed") == "true"
    assert heat(page) != before
    outline = page.driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    assert page.text("#heard").startswith("horse: ")


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone(dark, browser, url, photographs):
    browser.open(url, **PHONE, dark=dark)
    browser.give("drop", *photographs[:2])
    browser.answers(2)
    width, card, side = browser.driver.execute_script(
        """const box = (selector) => document.querySelector(selector).getBoundingClientRect();
        return [document.documentElement.scrollWidth, box("article").width, box(".said").left - box("figure").left];"""
    )
    assert width <= PHONE["width"] and card > 0.85 * PHONE["width"]
    assert side == 0  # one below the other
    small = browser.driver.execute_script(
        "return [...document.querySelectorAll('button')].filter((b) => b.offsetHeight && b.offsetHeight < 30).length"
    )
    assert small == 0
    ink, ground = browser.driver.execute_script(
        "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    )
    light = [sum(map(int, color.strip("rgb()").split(","))) for color in (ink, ground)]
    assert (light[0] > light[1]) == dark and abs(light[0] - light[1]) > 500
    assert browser.errors() == [] and browser.outside == []


def test_int8(browser, tmp_path, photographs):
    if reason := unavailable("openvino", "int8"):
        pytest.skip(reason)
    import onnxruntime

    convmixer_timm.page(NAME, tmp_path / "page", precision="int8", calibration=IMAGES, runtime=RUNTIME)
    browser.open(browser.serve(tmp_path / "page"))
    browser.give("drop", *photographs[:5])
    answers = browser.answers(5)
    for path in photographs[:5]:
        session = onnxruntime.InferenceSession(str(tmp_path / "page/model.onnx"), providers=["CPUExecutionProvider"])
        image = image_loader(load_model(NAME))(path)[None].numpy()
        found = torch.tensor(answers[path.name]["logits"])
        ours = torch.tensor(session.run(["logits"], {"images": image})[0][0])
        # Sums of int8 round where each processor's instructions do.
        assert found.argmax() == ours.argmax() and (found - ours).abs().max() < 0.08 * ours.abs().max()
    assert browser.errors() == []


def test_model_without_class_maps(browser, tmp_path):
    name = save(tmp_path / "model", global_pool="max")
    convmixer_timm.page(name, tmp_path / "page", runtime=RUNTIME)
    browser.open(browser.serve(tmp_path / "page"))
    browser.give("drop", IMAGES / "ship/0000.png")
    assert browser.answers(1)["0000.png"]["maps"] is None
    shown = browser.driver.execute_script(
        "return [...document.querySelectorAll('.heat, .toggle, ol button:enabled')].filter((e) => !e.hidden).length"
    )
    assert shown == 0
    assert browser.errors() == []


def test_class_names_stay_text(browser, tmp_path):
    labels = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "a", "b", "c"]
    convmixer_timm.page(save(tmp_path / "model", labels=labels), tmp_path / "page", runtime=RUNTIME)
    browser.open(browser.serve(tmp_path / "page"))
    browser.give("drop", IMAGES / "ship/0000.png")
    browser.answers(1)
    names = browser.driver.execute_script("return [...document.querySelectorAll('.name')].map((n) => n.textContent)")
    assert sorted(names) == sorted(labels)
    assert browser.errors() == []


def test_without_its_own_runtime_the_page_asks_the_cdn_alone(browser, folder, tmp_path):
    """And says what is wrong where that is out of reach, as it is here."""
    convmixer_timm.page(NAME, tmp_path / "page")
    browser.open(browser.serve(tmp_path / "page"))
    line = browser.wait("document.querySelector('.problem[role] span')?.innerText")
    assert line.startswith("The model could not be loaded: https://cdn.jsdelivr.net/npm/onnxruntime-web@")
    assert line.endswith("is out of reach, or not the file that this page was made with.")
    assert {address.split(":")[0] for address in browser.outside} == {"cdn.jsdelivr.net"}
    browser.give("drop", IMAGES / "ship/0000.png")
    browser.wait("document.querySelectorAll('.problem[role]').length === 2")


def test_runtime_from_another_address_is_checked_before_it_runs(browser, folder, tmp_path):
    """As a CDN would serve it; first as it is, then with one byte changed."""
    convmixer_timm.page(NAME, tmp_path / "page")
    shutil.copytree(folder / "runtime", tmp_path / "cdn")
    cdn = browser.serve(tmp_path / "cdn", headers={"Access-Control-Allow-Origin": "*"})
    index = tmp_path / "page/index.html"
    base = settings(tmp_path / "page")["runtime"]["base"]
    index.write_text(index.read_text().replace(json.dumps(base), json.dumps(cdn)))
    url = browser.serve(tmp_path / "page")
    browser.open(url)
    browser.give("drop", IMAGES / "ship/0000.png")
    browser.answers(1)
    assert browser.errors() == [] and browser.outside == []

    script = tmp_path / "cdn/ort.wasm.bundle.min.mjs"
    script.write_bytes(script.read_bytes() + b"\npostMessage({ type: 'ready', engine: 'wasm' });")
    browser.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.open(url)
    line = browser.wait("document.querySelector('.problem[role] span')?.innerText")
    assert "ort.wasm.bundle.min.mjs is out of reach, or not the file" in line
    assert browser.driver.execute_script("return document.documentElement.dataset.engine") is None


def test_on_webgpu(folder):
    """An emulated graphics card, which the page takes only when told to."""
    browser = Browser("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    try:
        url = browser.serve(folder)
        path = IMAGES / "ship/0000.png"
        logits, _ = expected(load_model(NAME), path)
        for query, engine in (("", "wasm"), ("?engine=webgpu", "webgpu")):
            browser.open(url + query)
            if engine == "webgpu" and not browser.driver.execute_async_script(
                "navigator.gpu.requestAdapter().then((a) => arguments[0](!!a), () => arguments[0](false))"
            ):
                pytest.skip("this Chromium emulates no graphics card")
            browser.give("drop", path)
            found = torch.tensor(browser.answers(1)["0000.png"]["logits"])
            assert (found - logits).abs().max() < 1e-3
            assert browser.driver.execute_script("return document.documentElement.dataset.engine") == engine
        assert browser.errors() == []
    finally:
        browser.close()


def test_opened_as_a_file_it_says_how_to_serve_it(browser, folder):
    browser.open((folder / "index.html").as_uri())
    assert "python -m http.server" in browser.text(".problem[role]")
