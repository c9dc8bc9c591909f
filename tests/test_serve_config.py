"""What is refused before anything starts, and the reason a child gives."""

import json

import pytest

from counsel.errors import UserError
from serve.config import ServeConfig
from serve.launch import gateway_flags
from serve.server import Server, reason_in


def test_browsers_are_let_in_from_nowhere_unless_origins_are_named():
    """What vLLM's CORS middleware is told: no origin by default."""
    for config, origins in (
        (ServeConfig(), []),
        (ServeConfig(allowed_origins=("https://a.example",)), ["https://a.example"]),
    ):
        flags = gateway_flags(config)
        assert json.loads(flags[flags.index("--allowed-origins") + 1]) == origins


def test_an_open_address_without_keys_is_refused(tmp_path, tiny_model):
    """Listening beyond loopback needs keys, in one line, before anything starts."""
    with pytest.raises(UserError, match="no keys are set"):
        Server(ServeConfig(model=str(tiny_model.path), host="0.0.0.0", port=0, logs=str(tmp_path)))


def test_a_port_in_use_is_told_at_once(tmp_path, tiny_model):
    """The address and the way out are in the one line."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use; .* --port"):
            Server(ServeConfig(model=str(tiny_model.path), port=port, logs=str(tmp_path)))


def test_the_reason_is_the_last_error_that_is_not_an_echo(tmp_path):
    """vLLM ends with 'see root cause above'; the cause is what a user needs."""
    log = tmp_path / "server.log"
    log.write_text(
        "(EngineCore pid=1) ERROR 11-23 [core.py:1] ValueError: 5.0 GB is less than 1.2 GB\n"
        "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert reason_in(log) == "ValueError: 5.0 GB is less than 1.2 GB"
    log.write_text(
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, max_model_len (9) is greater than 8 [type=value_error]\n"
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
    )
    assert reason_in(log) == "Value error, max_model_len (9) is greater than 8 [type=value_error]"
