"""A tiny benchmark on the lab: that it measures every group, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from modelfsd.lab.cluster import Lab
from tests.bench import GROUPS
from tests.bench_curves import Sizes, measure
from tests.bench_load import TORCH_ROWS, has_torch
from tests.bench_places import Modelfs
from tests.bench_report import FIGURES, PLAIN
from tests.mount.mount_parts import run

ROOT = Path(__file__).parents[2]


def test_every_group_of_figures_is_measured(lab: Lab, plain_lab: Lab, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    names = sorted(path.name for path in lab.nodes[0].mount.iterdir())
    words = ["--size-mib", "4", "--small-files", "8", "--reps", "1"]
    source = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'daemon')]!r}; import tests.bench"
    source += "; sys.exit(tests.bench.main())"
    words += ["--lab", str(lab.root), "--plain-lab", str(plain_lab.root)]
    table = run(sys.executable, "-c", source, *words, "--json", report, seconds=300)
    told = json.loads(report.read_text())
    assert told["errors"] == told["left_out"] == []
    assert set(told["notes"]) == (set() if has_torch() else set(TORCH_ROWS))
    for figure, row in FIGURES.items():
        assert row.text in table
        if figure in told["notes"]:
            assert f"{row.text}: {told['notes'][figure]}" in table
            continue
        assert told["figures"][figure]["medians"]["modelfs"] >= 0, figure
        has_cpu = f"{figure}_cpu" in told["figures"]
        assert has_cpu or figure.startswith("visible") or not row.unit, figure
    plain = told["figures"][f"write{PLAIN}"]
    assert plain["values"]["modelfs"] != told["figures"]["write"]["values"]["modelfs"]
    assert plain["values"]["local disk"] == told["figures"]["write"]["values"]["local disk"]
    for group in GROUPS:
        assert told["stages"][group]["freshness"]["count"] > 0, group
    assert told["figures"]["write_cpu"]["values"]["modelfs"]
    for name, micro in told["micro"].items():
        assert micro["value"] > 0 and micro["cpu"] >= 0, name
        assert name in table
    assert told["environment"]["replicas"] == 2
    assert not list(plain_lab.nodes[0].mount.glob("modelfs-bench-*"))
    assert names == sorted(path.name for path in lab.nodes[0].mount.iterdir())


def test_the_curves_of_cost_are_measured(lab: Lab) -> None:
    place = Modelfs(lab, "curves")
    sizes = Sizes(files_mib=(1, 16 * 1024), file_counts=(10, 200), chunk_counts=(100,))
    opened, loaded, placed = measure(place, sizes).values()
    assert [row["manifest pages"] for row in opened] == [1, 3]
    assert all(row["open ms"] > 0 and row["first 4 KiB ms"] > 0 for row in opened)
    assert [row["files"] for row in loaded] == [10, 200]
    assert all(row["from etcd s"] > 0 and row["from its disk s"] > 0 for row in loaded)
    assert [row["nodes"] for row in placed] == [3, 16, 64]
    assert list((place.a / "namespace").iterdir()) == []
    shutil.rmtree(place.a)
