"""Runs `convmixer-timm` commands for tests, one a line, so that torch is imported once and not each time."""

import contextlib
import io
import json
import os
import sys
import time

from convmixer_timm.cli import main

answers, sys.stdout = sys.stdout, sys.stderr
time.sleep = lambda seconds: None  # before another attempt
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if request["token"]:
        os.environ["HF_TOKEN"] = request["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(request["args"])
        except SystemExit as error:
            code = error.code
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)
