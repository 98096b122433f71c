"""`mount.fuse.modelfs`: what mount(8) and /etc/fstab call.

mount(8) runs `/sbin/mount.fuse.modelfs SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-t TYPE]
[-o OPTIONS]` for a mount of the type `fuse.modelfs`; the file there is a link to this command:

    modelfs    /models    fuse.modelfs    _netdev,nofail,replicas=3,peer=10.0.0.5    0  0

SOURCE is `modelfs` or `none`, or the address of a node of the cluster (`host`, `host:port`, or
several with commas), which is then asked first, as with `peer=`. `mount -a` recognises the mount
only if the source is `modelfs`, since that is what the kernel's mount table says.

OPTIONS are the words of `modelfs mount -o`, the settings of `config` (`replicas=3`, `state_dir=…`;
`peer` and `etcd` may be repeated, as commas separate options), and the generic words of fstab.
What only mount(8) or systemd acts on, and what a modelfs mount is or does anyhow, is passed over.
Other words are mistakes, or passed over with -s.

Exit codes are those of mount(8): 0, 1 for a wrong call, 32 where the mount failed.
"""

from __future__ import annotations

import getopt
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelfs.errors import ModelfsError, UserError
from modelfsd.commands import launch, preflight
from modelfsd.config import SETTINGS, load_config
from modelfsd.mount_options import is_option
from modelfsd.printing import complain

EXIT_USAGE, EXIT_MOUNT_FAILURE = 1, 32

PROGRAM = "mount.fuse.modelfs"
USAGE = "usage: mount.fuse.modelfs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS]"
DEFAULT_SOURCES = frozenset({"modelfs", "none", "fuse.modelfs", ""})
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LISTS = {"peer": "peers", "peers": "peers", "etcd": "etcd"}

# For mount(8), systemd and their kind.
FOR_OTHERS = {
    *("auto", "noauto", "nofail", "user", "nouser", "users", "owner", "noowner"),
    *("group", "nogroup", "_netdev"),
}
FOR_OTHERS_PREFIXES = ("x-", "X-", "comment=", "user=", "helper=", "uhelper=")
# How a modelfs mount is anyhow: set-user-id programs and device files do nothing in it (also if
# `suid` or `dev` comes with `defaults`), and times of access are kept with `relatime` only.
GIVEN = {
    *("nosuid", "nodev", "suid", "dev", "async", "atime", "diratime", "nodiratime"),
    *("norelatime", "nostrictatime", "lazytime", "nolazytime", "loud", "silent"),
    *("nomand", "noiversion"),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What mount(8) asks for. `settings` has the keys of `config.SETTINGS`."""

    mountpoint: str
    settings: Mapping[str, str | list[str]]
    is_fake: bool = False
    is_verbose: bool = False
    unknown: Sequence[str] = field(default=())  # passed over because of -s


def main() -> None:
    """The entry point of the `mount.fuse.modelfs` command."""
    try:
        request = parse(sys.argv[1:])
    except UserError as error:
        sys.exit(_complain(error, EXIT_USAGE))
    if request.unknown:
        complain(PROGRAM, f"passed over {', '.join(request.unknown)}")
    if request.is_fake:
        return
    try:
        _mount(request)
    except ModelfsError as error:
        sys.exit(_complain(error, EXIT_MOUNT_FAILURE))
    except KeyboardInterrupt:
        sys.exit(EXIT_MOUNT_FAILURE)


def _complain(error: ModelfsError, code: int) -> int:
    complain(PROGRAM, error)
    return code


def _mount(request: Request) -> None:
    """Start the daemon; return when the mount can be used."""

    def show(line: str) -> None:
        if request.is_verbose:
            complain(PROGRAM, line)

    config = preflight.prepare(load_config(request.mountpoint, request.settings))
    environment = {"PATH": SEARCH_PATH, **os.environ}  # mount(8) takes PATH away
    environment |= _only_in_environment(request.settings)
    show(launch.launch(config, show, environment))


def _only_in_environment(settings: Mapping[str, str | list[str]]) -> dict[str, str]:
    """Settings that have no flag on the daemon's command line reach it this way."""
    return {
        f"MODELFS_{key.upper()}": value
        for key, value in settings.items()
        if isinstance(value, str) and key != "options"
    }


def parse(arguments: Sequence[str]) -> Request:
    """The call as mount(8) makes it. Raises `UserError`."""
    try:
        flags, words = getopt.gnu_getopt(list(arguments), "sfnvho:t:N:")
    except getopt.GetoptError as error:
        raise UserError(f"{error}; {USAGE}") from error
    given = dict(flags)
    if len(words) != 2 or "-h" in given:
        raise UserError(USAGE)
    if "-N" in given:
        raise UserError("a mount in another namespace is not possible: use nsenter")
    options = [word for flag, text in flags if flag == "-o" for word in split_options(text)]
    settings, unknown = read_options(options)
    if unknown and "-s" not in given:
        raise UserError(f"mount option {unknown[0]!r} is unknown")
    if words[0] not in DEFAULT_SOURCES:
        peers = settings.setdefault("peers", [])
        assert isinstance(peers, list)
        peers[:0] = words[0].split(",")
    return Request(words[1], settings, "-f" in given, "-v" in given, tuple(unknown))


def split_options(text: str) -> list[str]:
    """Options are separated by commas, but for those in double quotes."""
    parts = re.findall(r'(?:[^,"]|"[^"]*")+', text)
    return [part.replace('"', "") for part in parts]


def read_options(options: Sequence[str]) -> tuple[dict[str, str | list[str]], list[str]]:
    """(settings, words that nobody knows). Raises `UserError` for what cannot be."""
    settings: dict[str, str | list[str]] = {}
    words: list[str] = []
    unknown: list[str] = []
    for option in options:
        key, equals, value = option.partition("=")
        if option == "remount":
            raise UserError("a modelfs mount cannot be remounted: unmount it, and mount it again")
        if option in FOR_OTHERS or option in GIVEN or option.startswith(FOR_OTHERS_PREFIXES):
            continue
        if is_option(option):
            words.append(option)
        elif equals and key in LISTS:
            listed = settings.setdefault(LISTS[key], [])
            assert isinstance(listed, list)
            listed += value.split(",")
        elif equals and key in SETTINGS and key != "options":
            settings[key] = value
        else:
            unknown.append(option)
    if words:
        settings["options"] = ",".join(words)
    return settings, unknown


if __name__ == "__main__":
    main()
