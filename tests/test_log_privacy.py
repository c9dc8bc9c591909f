"""Log records of modules that see requests contain no words of a request. Other records are unchanged."""

import subprocess
import sys

from tests.test_layout import ROOT

CODE = """
import logging
from serve import log_privacy
logging.basicConfig(format="%(name)s: %(message)s")
log_privacy.register(); log_privacy.register()
sees, other = logging.getLogger("vllm.entrypoints.chat"), logging.getLogger("vllm.v1.worker")
word = "-".join(("can", "ary"))  # a traceback shows this source from Python 3.13 on
sees.warning("refused: %s", word)
try:
    raise ValueError(word)
except ValueError:
    sees.exception("failed")
other.error("out of %s", "memory")
assert logging.makeLogRecord({"msg": "as it was"}).getMessage() == "as it was"
"""


def test_what_a_module_that_sees_requests_fills_in_is_dropped():
    """The format string, the kind of error and the place stay, and so do other modules' messages."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:2] == [
        "vllm.entrypoints.chat: refused: %s",
        "vllm.entrypoints.chat: failed (ValueError)",
    ]
    assert "line 10, in <module>" in done.stderr
    assert "vllm.v1.worker: out of memory" in done.stderr
    assert "can-ary" not in done.stderr
