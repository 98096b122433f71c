"""The `modelfs` command.

Exit codes: 0 done; 1 it failed (the daemon did not come up, the mount is busy); 2 the command or
the machine's set-up is wrong, and the text says what to do. A user's mistake never shows a
traceback: `main` is the one place where an error becomes a message and an exit code. Only
`scrub` and `fsck` have codes of their own, those of fsck(8) (`modelfsd.commands.checking`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import modelfs
from modelfs.errors import ModelfsError, UserError
from modelfsd import logs, sdnotify
from modelfsd.commands import checking, flags, launch, preflight, show
from modelfsd.commands.asking import ANSWER_SECONDS, ask_about, choose_daemon
from modelfsd.commands.control import call
from modelfsd.commands.registry import Registry
from modelfsd.commands.security import add_commands
from modelfsd.commands.stats import stats
from modelfsd.commands.unmounting import unmount_command
from modelfsd.config import Config, load_config
from modelfsd.lab.commands import lab_app
from modelfsd.printing import complain, plain, plain_lines
from modelfsd.sdnotify import Notifier
from modelfsd.units import format_size
from modelfsd.writing import recover as recovery

log = logging.getLogger(__name__)

DROP_SECONDS = 120.0  # the kernel writes dirty pages back before it drops them
EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="modelfs",
    help="The disks and NICs of a group of machines as one directory for model files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(lab_app, name="lab")
app.command()(stats)
cache_app = typer.Typer(help="What this node keeps of other nodes' files.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modelfs {modelfs.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """The disks and NICs of a group of machines as one directory for model files."""


@app.command()
def mount(
    mountpoint: Annotated[str, typer.Argument(help="An empty directory.")],
    state_dir: flags.StateDir = None,
    join: flags.Join = None,
    new_cluster: flags.NewCluster = None,
    peer: flags.Peer = None,
    etcd: flags.Etcd = None,
    etcd_ca: flags.EtcdCa = None,
    etcd_cert: flags.EtcdCert = None,
    etcd_key: flags.EtcdKey = None,
    listen: flags.Listen = None,
    replicas: flags.Replicas = None,
    cache_size: flags.CacheSize = None,
    zone: flags.Zone = None,
    name: flags.Name = None,
    data_tls: flags.DataTls = None,
    foreground: flags.Foreground = False,
    options: flags.Options = None,
) -> None:
    """Mount the cluster's files on MOUNTPOINT, and be a node of it."""
    given = {
        "state_dir": state_dir,
        "join": join,
        "new_cluster": new_cluster,
        "peers": peer,
        "etcd": etcd,
        "etcd_ca": etcd_ca,
        "etcd_cert": etcd_cert,
        "etcd_key": etcd_key,
        "listen": listen,
        "replicas": replicas,
        "cache_size": cache_size,
        "zone": zone,
        "name": name,
        "data_tls": data_tls,
        "options": ",".join(options) if options else None,
    }
    if foreground:
        _run_here(mountpoint, given)
    else:
        config = preflight.prepare(load_config(mountpoint, given))
        _launch(config)


def _launch(config: Config) -> None:
    """Start the daemon in the background, and show what it does meanwhile."""
    console = show.console(sys.stderr)
    if not console.is_terminal:
        text = launch.launch(config, lambda line: print(plain(line), file=sys.stderr), os.environ)
    else:
        with console.status("starting modelfs") as spinner:
            text = launch.launch(config, lambda line: spinner.update(plain(line)), os.environ)
    print(plain_lines(f"mounted {config.mountpoint}" + (f": {text}" if text else "")))


def _run_here(mountpoint: str, given: dict[str, Any]) -> None:
    """Be the daemon. The last word goes to whoever waits: the parent's pipe, systemd, the log."""
    reporter = launch.Reporter.from_environment(os.environ)
    logs.setup(os.environ)
    ours = logging.getLogger("modelfsd")
    try:
        if reporter.waiting:
            ours.addHandler(reporter)
        _run_node(mountpoint, given, reporter)
    except Exception as error:
        ours.removeHandler(reporter)
        if not isinstance(error, ModelfsError):
            log.exception("the daemon failed")
        reporter.error(error)
        if isinstance(error, ModelfsError):
            raise
        raise SystemExit(EXIT_FAILURE) from error
    finally:
        ours.removeHandler(reporter)


def _run_node(mountpoint: str, given: dict[str, Any], reporter: launch.Reporter) -> None:
    config = preflight.prepare(load_config(mountpoint, given, foreground=True))
    lock = preflight.lock_state_dir(config)
    os.chdir("/")
    os.umask(0o077)  # whatever we or etcd make under the state directory is its owner's alone
    registry = Registry()
    preflight.check(config, registry)
    # Late: what only talks to a daemon does not load FUSE and gRPC.
    from modelfsd.node import run_node

    notifier = Notifier.from_environment(os.environ)
    for variable in sdnotify.VARIABLES:  # etcd would tell systemd that it is ready
        os.environ.pop(variable, None)

    def ready(text: str) -> None:
        logging.getLogger("modelfsd").removeHandler(reporter)
        reporter.ready(text)
        notifier.ready(text)

    entry = registry.register(
        mountpoint=config.mountpoint,
        state_dir=config.state_dir,
        control=config.control_path,
        name=config.name,
    )
    try:
        run_node(config, ready)
    finally:
        notifier.stopping()
        registry.unregister(entry)
        os.close(lock)


@app.command()
def umount(mountpoint: Annotated[str, typer.Argument(help="Where modelfs is mounted.")]) -> None:
    """Stop the node of MOUNTPOINT once nobody uses it, and unmount."""
    print(unmount_command(mountpoint, Registry()))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The node with this state directory.")
    ] = None,
    mount: Annotated[
        str | None, typer.Option(metavar="MOUNTPOINT", help="The node of this mount.")
    ] = None,
) -> None:
    """The cluster, its nodes and its health, as this machine's node sees them."""
    control = choose_daemon(Registry(), state_dir, mount)
    answer = call(control, "status", ANSWER_SECONDS)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        show.console().print(show.status_view(answer))


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="A file or directory in a modelfs mount.")],
    versions: Annotated[
        bool, typer.Option("--versions", help="What the name showed before; it may be gone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """A file's version and chunks, and which node holds which; or its retained versions."""
    answer = ask_about(path, "versions" if versions else "info")
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        view = show.versions_view(answer) if versions else show.info_view(answer)
        show.console().print(view)


@app.command()
def restore(
    path: Annotated[str, typer.Argument(help="A file or directory, also one that is gone.")],
    version: Annotated[
        int, typer.Option("--version", metavar="N", help="As `modelfs info PATH --versions` says.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Make a retained version the newest one."""
    answer = ask_about(path, "restore", number=version)
    print(json.dumps(answer, indent=2) if as_json else show.restored_text(answer))


@app.command()
def policy(
    path: Annotated[str, typer.Argument(help="A directory or file in a modelfs mount.")],
    replicas: Annotated[
        str | None, typer.Option(metavar="N", help="Copies of each chunk, of new files.")
    ] = None,
    retain: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long old versions are kept: 1h, 7d, 0.")
    ] = None,
    chunk_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of new files, a power of two: 4MiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show or set what holds for PATH and below; the word `inherit` takes a setting back."""
    given = {"replicas": replicas, "retain": retain, "chunk_size": chunk_size}
    settings = {key: text for key, text in given.items() if text is not None}
    answer = ask_about(path, "policy", set=settings)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        show.console().print(show.policy_view(answer))


@app.command()
def recover(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the lost write; its start will do.")
    ] = None,
    dest: Annotated[
        str | None, typer.Argument(metavar="DEST", help="A new file on this machine.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="What can be recovered.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The node with this state directory.")
    ] = None,
    mount: Annotated[
        str | None, typer.Option(metavar="MOUNTPOINT", help="The node of this mount.")
    ] = None,
) -> None:
    """Writes that could not be committed: list them, or write one out to a file."""
    if (name is None) != (dest is None) or (list_all and name is not None):
        raise UserError("give --list, or the NAME of a lost write and the file DEST to make of it")
    state = recovery.choose_state_dir(Registry(), state_dir, mount, os.environ)
    if name is None or dest is None:
        copies = recovery.list_lost(state)
        if as_json:
            print(json.dumps({"lost": [copy.as_json() for copy in copies]}, indent=2))
        else:
            show.console().print(show.lost_view(copies))
        return
    recovered = recovery.recover(state, name, Path(dest).absolute())
    print(json.dumps(recovered.as_json(), indent=2) if as_json else plain_lines(recovered.text()))
    if recovered.missing:
        raise SystemExit(EXIT_FAILURE)


@cache_app.command("drop")
def cache_drop(
    mountpoint: Annotated[
        str | None, typer.Argument(help="Which, if several nodes run here.")
    ] = None,
) -> None:
    """Empty a node's caches: cached chunks, chunks in memory, the kernel's pages of its files."""
    freed = call(choose_daemon(Registry(), None, mountpoint), "drop", DROP_SECONDS)
    disk, memory = format_size(freed["disk_bytes"]), format_size(freed["memory_bytes"])
    print(f"dropped {disk} on disk, {memory} in memory, the pages of {freed['files']} files")


add_commands(app)
checking.add_commands(app)


def main() -> None:
    """The entry point of the `modelfs` command."""
    try:
        app()
    except UserError as error:
        _complain(error)
        sys.exit(EXIT_USAGE)
    except ModelfsError as error:
        _complain(error)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _complain(error: Exception) -> None:
    complain("modelfs", error)
