"""Which version a name means, without a store and without an engine."""

from counsel.store import AdapterVersions
from serve.name_table import NameTable
from serve.server_registry import ServerRecord
from tests.tiny import tiny_manifest


def test_what_cannot_be_served_has_a_reason():
    """Another base's adapter and too large a rank are refused with the reason."""
    names = NameTable("tiny", ServerRecord("", "f00d", 16))
    assert names.unservable_reason(tiny_manifest("a")) is None
    assert "made for base" in (names.unservable_reason(tiny_manifest("a", base="beef")) or "")
    assert "rank 64 is above" in (names.unservable_reason(tiny_manifest("a", rank=64)) or "")


def test_a_name_means_the_loaded_version_then_the_current_one_then_the_latest_servable():
    """The three candidates in their order; an admin's unload ends the search, and a new store entry ends a failure."""
    names = NameTable("tiny", ServerRecord("", "f00d", 16))
    one, two, three = (tiny_manifest("a", digit * 12) for digit in "123")
    history = (one.version, two.version, three.version)
    adapter = AdapterVersions("a", three.version, {m.version: m for m in (one, two, three)}, False, history)
    names.update(adapter)
    assert names.current_version("a") == three
    names.serving["a"] = one.version
    assert names.current_version("a") == one
    del names.serving["a"]
    names.failed[three.id] = "no"
    assert names.current_version("a") == two
    assert names.find(three.id) == three
    names.unloaded_by_admin.add(two.id)
    assert names.current_version("a") == two
    names.update(adapter)
    assert names.current_version("a") == three
    names.update(AdapterVersions("a", None, {}, False))
    assert names.current_version("a") is names.find(one.id) is None
