"""A headless Chromium that looks at a page served from loopback, and can reach nothing else."""

import functools
import os
import shutil
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# What Chromium asks its makers by itself, page or none.
_ITS_OWN = (".google.com", ".googleapis.com", ".gstatic.com")
RUNTIME = os.environ.get("ONNXRUNTIME_WEB", "")


def need_browser() -> None:
    """Skips where there is no Chromium, no driver for it or no runtime, and says which."""
    pytest.importorskip("selenium")
    for name in ("chromium", "chromedriver"):
        if not shutil.which(name):
            pytest.skip(f"no {name}: Debian's packages chromium and chromium-driver have it")
    if not RUNTIME:
        pytest.skip("set ONNXRUNTIME_WEB to a folder of npm's onnxruntime-web (npm pack, unpacked)")


class _Quiet(SimpleHTTPRequestHandler):
    """The standard library's file server: no header beyond the usual, as static hosting has it."""

    def __init__(self, *args, headers=None, **kwargs):
        self._added = headers or {}
        super().__init__(*args, **kwargs)

    def end_headers(self):
        for name, value in self._added.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format, *args):
        pass


class _Outside(ThreadingHTTPServer):
    """The browser's way out: a proxy that answers nothing and writes down what was wanted."""

    def __init__(self):
        self.wanted: list[str] = []

        class Handler(_Quiet):
            def _refuse(self):
                self.server.wanted.append(self.path)
                self.send_error(403)

            do_GET = do_POST = do_HEAD = do_PUT = do_CONNECT = do_OPTIONS = _refuse

        super().__init__(("127.0.0.1", 0), Handler)


class Browser:
    """Chromium with its driver.

    Attributes:
        driver: Selenium's.
        outside: What it asked of any other address than loopback since the last `open`.
    """

    def __init__(self, *options: str):
        from selenium import webdriver

        self._proxy = _Outside()
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        settings = webdriver.ChromeOptions()
        settings.binary_location = shutil.which("chromium")
        for option in (
            "--headless=new",
            "--no-sandbox",  # of root in a container, which may make no namespaces
            "--disable-dev-shm-usage",
            "--force-color-profile=srgb",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-features=MediaRouter,OptimizationHints",
            "--use-fake-device-for-media-stream",
            "--use-fake-ui-for-media-stream",
            f"--proxy-server=http://127.0.0.1:{self._proxy.server_address[1]}",
            *options,
        ):
            settings.add_argument(option)
        settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(settings, webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.set_script_timeout(120)
        self._servers: list[ThreadingHTTPServer] = []

    @property
    def outside(self) -> list[str]:
        return [address for address in self._proxy.wanted if not any(host in address for host in _ITS_OWN)]

    def serve(self, folder: Path, headers: dict[str, str] | None = None) -> str:
        """The address of a folder."""
        handler = functools.partial(_Quiet, directory=str(folder), headers=headers)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Loads a page in a window of that size; its answers are kept from now on."""
        self._proxy.wanted.clear()
        self.driver.get_log("browser")
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(url)
        self.driver.execute_script(
            """window.answers = [];
            document.addEventListener("classified", ({ detail: { logits, maps, ...rest } }) => answers.push({
              ...rest, logits: [...logits], maps: maps && { ...maps, data: [...maps.data] } }));"""
        )

    def wait(self, script: str, seconds: float = 60):
        """The first value of a script's expression that counts as true."""
        end = time.monotonic() + seconds
        while not (value := self.driver.execute_script(f"return {script}")):
            assert time.monotonic() < end, f"{script}: still {value!r}; {self.text('body')!r}; {self.errors()}"
            time.sleep(0.05)
        return value

    def give(self, event: str, *files: Path) -> None:
        """Drops or pastes files, as a visitor would from a file manager ('drop', 'paste')."""
        from selenium.webdriver.common.by import By

        self.driver.execute_script(
            """const input = document.createElement("input");
            Object.assign(input, { type: "file", multiple: true, id: "given" });
            document.body.append(input);"""
        )
        self.driver.find_element(By.ID, "given").send_keys("\n".join(map(str, files)))
        self.driver.execute_script(
            """const input = document.getElementById("given");
            const data = new DataTransfer();
            for (const file of input.files) data.items.add(file);
            input.remove();
            const options = { bubbles: true, cancelable: true };
            const event = arguments[0] === "paste"
              ? new ClipboardEvent("paste", { ...options, clipboardData: data })
              : new DragEvent("drop", { ...options, dataTransfer: data });
            document.getElementById("drop").dispatchEvent(event);""",
            event,
        )

    def answers(self, count: int, seconds: float = 120) -> dict[str, dict]:
        """The next answers by file name, as soon as there are so many."""
        self.wait(f"answers.length >= {count}", seconds)
        return {answer["name"]: answer for answer in self.driver.execute_script("return answers.splice(0)")}

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def errors(self) -> list[str]:
        """The console's errors since the last `open` or `errors`."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def click(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def close(self) -> None:
        self.driver.quit()
        for server in (*self._servers, self._proxy):
            server.shutdown()
            server.server_close()
