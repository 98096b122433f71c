"""The settings: their layers, their checks, and the command line that repeats them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.errors import UserError
from modelfs.ids import ClusterId
from modelfsd.addresses import (
    format_host_port,
    machine_address,
    parse_endpoint,
    parse_host_port,
    resolve_listen,
)
from modelfsd.config import CONFIG_VARIABLE, Config, load_config
from modelfsd.trust.tokens import format_token, new_token

HOME = {"HOME": "/home/ada"}


def load(
    environ: dict[str, str] | None = None, *, is_root: bool = False, **given: object
) -> Config:
    return load_config("/models", given, environ={**HOME, **(environ or {})}, is_root=is_root)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return tmp_path / "modelfs.toml"


def test_the_defaults_are_those_of_the_manual() -> None:
    config = load(listen="127.0.0.1")
    assert config.mountpoint == Path("/models")
    assert config.state_dir == Path("/home/ada/.local/state/modelfs")
    assert config.replicas == 2
    assert config.listen == ("127.0.0.1", 7420)
    assert (config.etcd_client_port, config.etcd_peer_port) == (7421, 7422)
    assert config.lock_wait_seconds == 30
    assert config.down_out_seconds == 600
    assert config.reclaim_grace_seconds == 3600
    assert config.scrub_every_seconds == 14 * 86_400
    assert config.cache_size is None
    assert not config.options.allow_other


def test_root_serves_everybody_from_var_lib() -> None:
    config = load(is_root=True)
    assert config.state_dir == Path("/var/lib/modelfs")
    assert {"allow_other", "default_permissions"} <= config.options.fuse_options()
    assert "allow_other" not in load(is_root=True, options="noallow_other").options.fuse_options()


def test_the_command_line_beats_the_environment_beats_the_file(settings: Path) -> None:
    settings.write_text('replicas = 3\nzone = "file"\nname = "file"\npeers = ["a", "b:1"]\n')
    environ = {CONFIG_VARIABLE: str(settings), "MODELFS_ZONE": "env", "MODELFS_NAME": "env"}
    config = load(environ, name="line")
    assert (config.replicas, config.zone, config.name) == (3, "env", "line")
    assert config.peers == (("a", 7420), ("b", 1))


def test_what_is_not_given_leaves_the_lower_layers_alone() -> None:
    config = load({"MODELFS_PEERS": "a, b", "MODELFS_ETCD": "http://e:1"}, peers=(), etcd=None)
    assert config.peers == (("a", 7420), ("b", 7420))
    assert config.etcd == ("e:1",)


def test_mount_options_add_up(settings: Path) -> None:
    settings.write_text('options = ["xattr", "ro"]\n')
    options = load({CONFIG_VARIABLE: str(settings)}, options="rw,noexec").options
    assert options.xattr
    assert not options.read_only
    assert options.no_exec


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"replicas": "0"}, "--replicas: '0' is not a number of replicas: 1 to 16"),
        ({"replicas": "two"}, "--replicas"),
        ({"replicas": "²"}, "--replicas"),
        ({"cache_size": "much"}, "--cache-size: 'much' is not a size"),
        ({"peers": [":7420"]}, "--peer: ':7420' names no host"),
        ({"peers": ["a:b"]}, "is not a port"),
        ({"listen": "127.0.0.1:65534"}, "etcd needs the next two"),
        ({"listen": "0.0.0.0"}, "other nodes can reach"),
        ({"listen": "no.such.host.invalid"}, "is unknown"),
        ({"etcd": ["https://e:2379", "http://f:2379"]}, "some of the URLs are https://"),
        ({"data_tls": "maybe"}, "--data-tls: 'maybe' is neither on nor off"),
        ({"join": "modelfs-what?"}, "--join: this join token is damaged"),
        ({"etcd": ["ftp://e"]}, "is not an etcd endpoint"),
        ({"new_cluster": "a b"}, "--new-cluster: 'a b' is not a name"),
        ({"name": "../x"}, "is not a name"),
        ({"options": "xatr"}, "-o: mount option 'xatr' is unknown; the known ones are allow_other"),
    ],
)
def test_a_wrong_value_names_its_option(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        load(**given)
    assert complaint in str(caught.value)


def test_a_wrong_value_in_the_environment_names_its_variable() -> None:
    with pytest.raises(UserError, match="MODELFS_DOWN_OUT: 'soon' is not a duration"):
        load({"MODELFS_DOWN_OUT": "soon"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "replica = 3",
            "'replica' is unknown; the known settings are cache_size, data_tls, down_out",
        ),
        ("replicas = [3]", "replicas: "),
        ("replicas = true", "is not a text"),
        ("replicas = ", "is not TOML"),
        ("peers = 3", "is not a list"),
        ("lock_wait = '2h'", "longer than an hour"),
        ("scrub_every = '1ms'", "scrub_every: '1ms' is too short"),
        ("reclaim_grace = '0.5s'", "reclaim_grace: '0.5s' is too short"),
    ],
)
def test_a_wrong_file_is_refused_by_name(settings: Path, text: str, complaint: str) -> None:
    settings.write_text(text)
    with pytest.raises(UserError) as caught:
        load({CONFIG_VARIABLE: str(settings)})
    assert complaint in str(caught.value)
    assert str(settings) in str(caught.value)


def test_a_file_that_is_asked_for_must_exist(settings: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load({CONFIG_VARIABLE: str(settings)})


def test_variables_that_kubernetes_makes_are_no_settings() -> None:
    load({"MODELFS_PORT": "tcp://10.0.0.1:7420", "MODELFS_SERVICE_HOST": "10.0.0.1"})


NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,10}", fullmatch=True)
ADDRESSES = st.tuples(st.from_regex(r"10\.[1-9]\.[1-9]\.[1-9]", fullmatch=True), st.just(7420))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "new_cluster": NAMES,
            "name": NAMES,
            "zone": NAMES,
            "replicas": st.integers(1, 16).map(str),
            "cache_size": st.integers(0, 1 << 40).map(str),
            "peers": st.lists(ADDRESSES.map(format_host_port), max_size=3),
            "etcd": st.lists(ADDRESSES.map(format_host_port), max_size=3),
            "listen": st.integers(1, 65_533).map(lambda port: f"127.0.0.1:{port}"),
            "options": st.sampled_from(["xattr", "ro", "noexec", "allow_other", "xattr,ro"]),
        },
    )
)
def test_the_arguments_of_a_configuration_make_it_again(given: dict[str, Any]) -> None:
    config = load_config("models", given, foreground=True, environ=HOME, is_root=False)
    command, mountpoint, *words = config.arguments()
    assert command == "mount"
    again: dict[str, Any] = {"peers": [], "etcd": []}
    words.remove("--foreground")
    for flag, value in zip(words[::2], words[1::2], strict=True):
        key = {"--peer": "peers", "-o": "options"}.get(flag, flag[2:].replace("-", "_"))
        if key in ("peers", "etcd"):
            again[key].append(value)
        else:
            again[key] = value
    repeated = load_config(mountpoint, again, foreground=True, environ={"HOME": "/x"}, is_root=True)
    assert repeated == config


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", ("host", 7420)),
        ("host:1", ("host", 1)),
        (":1", ("", 1)),
        ("::1", ("::1", 7420)),
        ("[::1]", ("::1", 7420)),
        ("[fd00::5]:99", ("fd00::5", 99)),
    ],
)
def test_addresses_are_read_as_people_write_them(text: str, address: tuple[str, int]) -> None:
    assert parse_host_port(text) == address
    assert parse_host_port(format_host_port(address)) == address


@pytest.mark.parametrize("text", ["", ":", "a:", "a:0", "a:65536", "[::1", "[::1]x", "a b", "/x:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_host_port(text)


@pytest.mark.parametrize("text", ["http://e:1", "http://e:1/", "e:1"])
def test_an_etcd_endpoint_is_a_url_or_an_address(text: str) -> None:
    assert parse_endpoint(text) == "e:1"


def test_an_etcd_with_tls_is_told_by_its_url() -> None:
    assert parse_endpoint("https://e:1") == "https://e:1"
    config = load({}, etcd=["https://e:1", "https://f"], etcd_ca="/ca.pem")
    assert (config.etcd, config.etcd_tls) == (("e:1", "f:2379"), True)
    words = config.arguments()
    assert words.count("--etcd") == 2 and "https://e:1" in words and "/ca.pem" in words


def test_a_token_is_in_no_command_line_and_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = new_token(ClusterId("c" * 16), bytes(32), [("h", 1)], 0.0, 1.0, 1)
    line = format_token(token)
    config = load({"MODELFS_JOIN": line})
    assert config.join == token
    words = config.arguments()
    assert words[words.index("--join") + 1] == "-"
    shown = f"{words} {config!r}"
    assert line not in shown and repr(token.secret) not in shown


def test_this_machine_has_an_address_to_listen_on() -> None:
    assert resolve_listen("") == machine_address() != "0.0.0.0"
    assert resolve_listen("127.0.0.5") == "127.0.0.5"
