"""Configs that are refused before anything starts, and the reason that a failed child leaves in its log."""

import json

import pytest

from counsel.errors import UserError
from serve.config import ServeConfig
from serve.launch import gateway_flags
from serve.server import Server, reason_in


def test_no_origin_is_allowed_by_default():
    """The origins that vLLM's CORS middleware gets."""
    for config, origins in (
        (ServeConfig(), []),
        (ServeConfig(allowed_origins=("https://a.example",)), ["https://a.example"]),
    ):
        flags = gateway_flags(config)
        assert json.loads(flags[flags.index("--allowed-origins") + 1]) == origins


def test_an_open_address_without_keys_is_refused(tmp_path, tiny_model):
    """Listening beyond loopback requires keys."""
    with pytest.raises(UserError, match="no keys are set"):
        Server(ServeConfig(model=str(tiny_model.path), host="0.0.0.0", port=0, logs=str(tmp_path)))


def test_a_port_in_use_is_an_error_at_once(tmp_path, tiny_model):
    """One line names the address and the option that changes it."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use; .* --port"):
            Server(ServeConfig(model=str(tiny_model.path), port=port, logs=str(tmp_path)))


def test_the_reason_is_the_last_error_that_is_not_an_echo(tmp_path):
    """vLLM's last error says 'see root cause above'; users need the cause."""
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
