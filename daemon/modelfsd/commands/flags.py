"""The options of `modelfs mount`; what they mean is said once, in `config`."""

from __future__ import annotations

from typing import Annotated

import typer

StateDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Where this node keeps its chunks.")
]
Join = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN", help="Join a cluster: what `modelfs token` printed, a file with it, or -."
    ),
]
NewCluster = Annotated[
    str | None, typer.Option(metavar="NAME", help="Found a cluster of this name.")
]
Peer = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="A node of the cluster; may be repeated."),
]
Etcd = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="Use this etcd, not our own; may be repeated."),
]
EtcdCa = Annotated[
    str | None, typer.Option(metavar="FILE", help="Whom to trust as that etcd (the system's).")
]
EtcdCert = Annotated[
    str | None, typer.Option(metavar="FILE", help="Our certificate for that etcd.")
]
EtcdKey = Annotated[str | None, typer.Option(metavar="FILE", help="Its key.")]
Listen = Annotated[
    str | None,
    typer.Option(metavar="ADDR[:PORT]", help="Our address for other nodes; port 7420."),
]
Replicas = Annotated[str | None, typer.Option(metavar="N", help="Copies of each chunk (2).")]
CacheSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="For copies of others' chunks: 200GiB.")
]
Zone = Annotated[
    str | None, typer.Option(metavar="Z", help="What fails together, for example a rack.")
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Of this node (its host name).")]
DataTls = Annotated[
    str | None,
    typer.Option(metavar="on|off", help="Of a new cluster: encrypt chunks on their way too (on)."),
]
Foreground = Annotated[bool, typer.Option("--foreground", help="Stay, and log to stderr.")]
Options = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="OPTIONS", help="allow_other, xattr, ro, noexec, ..."),
]
