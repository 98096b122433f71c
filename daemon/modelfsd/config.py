"""The node's settings: read once, checked once, frozen.

A setting comes from the first of: the command line, the environment (`MODELFS_REPLICAS=3`), the
file `/etc/modelfs/modelfs.toml` (another one with `MODELFS_CONFIG`), the default. All three are
read through the one table `SETTINGS`, so a setting means the same everywhere; its name in the
file is its key there, and on the command line it has dashes:

    state_dir = "/var/lib/modelfs"    new_cluster = "lab"       listen = "10.0.0.5:7420"
    peers = ["10.0.0.6"]              replicas = 2              cache_size = "200GiB"
    etcd = ["http://10.0.0.9:2379"]   zone = "rack-1"           name = "gpu-07"
    lock_wait = "30s"                 down_out = "10m"          options = ["xattr"]
    reclaim_grace = "1h"              retain = "1h"             join = "/root/token"
    data_tls = "on"                   etcd_ca = "/etc/ssl/etcd.pem" (also etcd_cert, etcd_key)
    metrics_listen = "127.0.0.1:9420" scrub_every = "2w"

In the environment a list is separated by commas. Mount options add up over the layers, the later
one winning. An unknown key in the file is refused; an unknown `MODELFS_*` variable is not, since
Kubernetes sets such variables on its own for a service that is called modelfs.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelfs import limits
from modelfs.errors import UserError
from modelfsd.addresses import (
    PORT_DEFAULT,
    PORT_MAX,
    HostPort,
    format_host_port,
    is_loopback,
    parse_endpoint,
    parse_host_port,
    parse_peer,
    resolve_listen,
)
from modelfsd.mount_options import MountOptions, parse_options
from modelfsd.trust.tokens import Token, read_token
from modelfsd.units import parse_duration, parse_size

CONFIG_FILE = Path("/etc/modelfs/modelfs.toml")
CONFIG_FILE_BYTES_MAX = limits.MIB
CONFIG_VARIABLE = "MODELFS_CONFIG"

DOWN_OUT_SECONDS = 600.0  # a reboot takes less, so it moves no data
RECLAIM_GRACE_SECONDS = 3600.0  # for pins and renewals to arrive, with hours of etcd in hand
RECLAIM_GRACE_SECONDS_MIN = 1.0  # less than a minute is for tests
SCRUB_SECONDS = 14 * 86_400.0  # bits flip rarely; twice a month bounds how many do together
LOCK_WAIT_SECONDS_MAX = 3600.0
METRICS_PORT_DEFAULT = 9420

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that a node is told from outside. Paths are absolute; sizes in bytes."""

    mountpoint: Path
    state_dir: Path
    name: str
    listen: HostPort  # an IP address of this machine and the data port
    options: MountOptions
    new_cluster: str | None = None
    join: Token | None = None
    data_tls: bool | None = None  # of a cluster that is founded; None: on
    peers: tuple[HostPort, ...] = ()
    etcd: tuple[str, ...] = ()  # `host:port` of an etcd that is not ours; empty: embedded
    etcd_tls: bool = False  # whether that one speaks TLS; then perhaps with these files
    etcd_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    replicas: int = limits.REPLICAS_DEFAULT
    retain_seconds: float = limits.RETAIN_SECONDS_DEFAULT  # of superseded versions
    cache_size: int | None = None  # None: a share of the free space
    zone: str = ""
    lock_wait_seconds: float = limits.LOCK_WAIT_SECONDS
    down_out_seconds: float = DOWN_OUT_SECONDS
    reclaim_grace_seconds: float = RECLAIM_GRACE_SECONDS
    scrub_every_seconds: float = SCRUB_SECONDS  # that a background scrub takes; 0: there is none
    metrics_listen: HostPort | None = None  # a loopback address; None: the admin socket alone
    foreground: bool = False

    @property
    def etcd_client_port(self) -> int:
        """The embedded etcd's port for clients."""
        return self.listen[1] + 1

    @property
    def etcd_peer_port(self) -> int:
        """The embedded etcd's port for the other members."""
        return self.listen[1] + 2

    @property
    def control_path(self) -> Path:
        """The admin socket."""
        return self.state_dir / "control.sock"

    @property
    def log_path(self) -> Path:
        """Where a node in the background logs."""
        return self.state_dir / "modelfs.log"

    @property
    def lock_path(self) -> Path:
        """Locked (flock) by the daemon that uses the state directory."""
        return self.state_dir / "lock"

    def arguments(self) -> list[str]:
        """The command line that means exactly this configuration, whatever the directory.

        Everybody may read command lines, so a token is to come by standard input.
        """
        words = ["mount", str(self.mountpoint), "--state-dir", str(self.state_dir)]
        words += ["--name", self.name, "--listen", format_host_port(self.listen)]
        words += ["--replicas", str(self.replicas)]
        if self.new_cluster is not None:
            words += ["--new-cluster", self.new_cluster]
        if self.join is not None:
            words += ["--join", "-"]
        if self.data_tls is not None:
            words += ["--data-tls", "on" if self.data_tls else "off"]
        for peer in self.peers:
            words += ["--peer", format_host_port(peer)]
        for endpoint in self.etcd:
            words += ["--etcd", f"https://{endpoint}" if self.etcd_tls else endpoint]
        for name in ("ca", "cert", "key"):
            if path := getattr(self, f"etcd_{name}"):
                words += [f"--etcd-{name}", str(path)]
        if self.cache_size is not None:
            words += ["--cache-size", str(self.cache_size)]
        if self.zone:
            words += ["--zone", self.zone]
        if self.foreground:
            words += ["--foreground"]
        options = [
            "allow_other" if self.options.allow_other else "noallow_other",
            "xattr" if self.options.xattr else "noxattr",
            "ro" if self.options.read_only else "rw",
            "noexec" if self.options.no_exec else "exec",
            "relatime" if self.options.relatime else "noatime",
        ]
        return [*words, "-o", ",".join(options)]


# ---------------------------------------------------------------- one setting, from any layer


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise UserError(f"{value!r} is not a text")
    return str(value)


def _texts(value: object) -> tuple[str, ...]:
    """A list, or one text with commas."""
    parts = _text(value).split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence):
        raise UserError(f"{value!r} is not a list")
    texts = (_text(part).strip() for part in parts)
    return tuple(text for text in texts if text)


def _word(value: object) -> str:
    text = _text(value)
    if not _NAME.fullmatch(text):
        raise UserError(
            f"{text!r} is not a name: 1 to 63 letters, digits, dots, dashes and underlines, "
            "beginning with a letter or a digit"
        )
    return text


def _replicas(value: object) -> int:
    text = _text(value)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= limits.REPLICAS_MAX:
        raise UserError(f"{text!r} is not a number of replicas: 1 to {limits.REPLICAS_MAX}")
    return int(text)


def _switch(value: object) -> bool:
    words = {"on": True, "off": False, True: True, False: False}
    if not isinstance(value, str | bool) or value not in words:
        raise UserError(f"{value!r} is neither on nor off")
    return words[value]


def _listen(value: object) -> HostPort:
    host, port = parse_host_port(_text(value))
    if port > PORT_MAX:
        raise UserError(f"port {port} is too high: etcd needs the next two, so {PORT_MAX} at most")
    return host, port


def _directory(value: object) -> Path:
    text = _text(value)
    if not text or "\0" in text:
        raise UserError("a directory's name is empty")
    return Path(os.path.abspath(Path(text).expanduser()))


def _lock_wait(value: object) -> float:
    seconds = parse_duration(_text(value))
    if seconds > LOCK_WAIT_SECONDS_MAX:
        raise UserError(f"{value!r} is longer than an hour: a waiting open could not be told apart")
    return seconds


def _reclaim_grace(value: object) -> float:
    seconds = parse_duration(_text(value))
    if seconds < RECLAIM_GRACE_SECONDS_MIN:
        raise UserError(f"{value!r} is too short: readers and writers must have time to answer")
    return seconds


def _scrub_every(value: object) -> float:
    seconds = parse_duration(_text(value))
    if 0 < seconds < 1:
        raise UserError(f"{value!r} is too short for reading a disk; 0 turns the scrub off")
    return seconds


def _metrics_listen(value: object) -> HostPort:
    host, port = parse_host_port(_text(value), METRICS_PORT_DEFAULT)
    if not is_loopback(host):
        raise UserError(
            f"{host} is not a loopback address: metrics are served to whoever asks, in the clear; "
            "let an agent or a proxy on this machine pass them on"
        )
    return host, port


SETTINGS: dict[str, Callable[[object], Any]] = {
    "state_dir": _directory,
    "new_cluster": _word,
    "join": lambda value: read_token(_text(value)),
    "data_tls": _switch,
    "peers": lambda value: tuple(parse_peer(text) for text in _texts(value)),
    "etcd": lambda value: tuple(parse_endpoint(text) for text in _texts(value)),
    "etcd_ca": _directory,
    "etcd_cert": _directory,
    "etcd_key": _directory,
    "listen": _listen,
    "replicas": _replicas,
    "retain": lambda value: parse_duration(_text(value)),
    "cache_size": lambda value: parse_size(_text(value)),
    "zone": _word,
    "name": _word,
    "options": _texts,
    "lock_wait": _lock_wait,
    "down_out": lambda value: parse_duration(_text(value)),
    "reclaim_grace": _reclaim_grace,
    "scrub_every": _scrub_every,
    "metrics_listen": _metrics_listen,
}
_FLAGS = {"peers": "--peer", "options": "-o"}


# ---------------------------------------------------------------- the layers


def load_config(
    mountpoint: str | Path,
    given: Mapping[str, Any],
    *,
    foreground: bool = False,
    environ: Mapping[str, str] = os.environ,
    is_root: bool | None = None,
) -> Config:
    """The configuration of `modelfs mount MOUNTPOINT`.

    `given` is the command line: keys of SETTINGS; None and () mean "not given". Raises `UserError`
    that names the setting, where it stood, and what is allowed.
    """
    is_root = os.geteuid() == 0 if is_root is None else is_root
    options = MountOptions(allow_other=is_root)
    values: dict[str, Any] = {}
    for label, layer in (
        _file_layer(environ),
        _environment_layer(environ),
        (_flag, {key: value for key, value in given.items() if value not in (None, (), [])}),
    ):
        for key, value in layer.items():
            try:
                parsed = SETTINGS[key](value)
                if key == "options":
                    options = parse_options(parsed, options)
            except UserError as error:
                raise UserError(f"{label(key)}: {error}") from error
            values[key] = parsed
    values.pop("options", None)
    host, port = values.pop("listen", ("", PORT_DEFAULT))
    for key in ("retain", "lock_wait", "down_out", "reclaim_grace", "scrub_every"):
        if key in values:
            values[f"{key}_seconds"] = values.pop(key)
    values["etcd"], values["etcd_tls"] = _etcd(values.get("etcd", ()))
    values.setdefault("state_dir", default_state_dir(environ, is_root))
    values.setdefault("name", _host_name())
    return Config(
        mountpoint=_directory(mountpoint),
        listen=(resolve_listen(host), port),
        options=options,
        foreground=foreground,
        **values,
    )


def _etcd(urls: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """(endpoints, whether they speak TLS)."""
    secure = [url for url in urls if url.startswith("https://")]
    if secure and len(secure) < len(urls):
        raise UserError("--etcd: some of the URLs are https:// and some are not: use one of both")
    return tuple(url.removeprefix("https://") for url in urls), bool(secure)


def default_state_dir(environ: Mapping[str, str], is_root: bool) -> Path:
    """Where a node keeps its chunks when nobody says where."""
    if is_root:
        return Path("/var/lib/modelfs")
    base = environ.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "modelfs"
    return Path(environ.get("HOME") or os.path.expanduser("~")) / ".local/state/modelfs"


def _host_name() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:63]
    return name or "node"


Layer = tuple[Callable[[str], str], Mapping[str, Any]]


def _flag(key: str) -> str:
    return _FLAGS.get(key) or "--" + key.replace("_", "-")


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    names = {key: f"MODELFS_{key.upper()}" for key in SETTINGS}
    found = {key: environ[name] for key, name in names.items() if environ.get(name)}
    return names.__getitem__, found


def _file_layer(environ: Mapping[str, str]) -> Layer:
    """The settings file. It must exist only if MODELFS_CONFIG names it."""
    named = environ.get(CONFIG_VARIABLE)
    path = Path(named) if named else CONFIG_FILE
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        if named:
            raise UserError(f"{CONFIG_VARIABLE} names {path}, which does not exist") from error
        return str, {}
    except OSError as error:
        raise UserError(f"the settings in {path} cannot be read: {error.strerror}") from error
    if len(content) > CONFIG_FILE_BYTES_MAX:
        raise UserError(f"{path} is larger than 1 MiB: this is not a settings file")
    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    for key in table:
        if key not in SETTINGS:
            known = ", ".join(sorted(SETTINGS))
            raise UserError(f"{path}: {key!r} is unknown; the known settings are {known}")
    return lambda key: f"{path}: {key}", table
