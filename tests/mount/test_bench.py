"""A tiny benchmark on the lab: that it measures every group, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from modelfsd.lab.cluster import Lab
from tests.bench import GROUPS
from tests.bench_report import FIGURES
from tests.mount.mount_parts import run

ROOT = Path(__file__).parents[2]


def test_every_group_of_figures_is_measured(lab: Lab, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    names = sorted(path.name for path in lab.nodes[0].mount.iterdir())
    words = ["--size-mib", "4", "--small-files", "8", "--reps", "1"]
    source = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'daemon')]!r}; import tests.bench"
    source += "; sys.exit(tests.bench.main())"
    table = run(sys.executable, "-c", source, *words, "--lab", lab.root, "--json", report)
    told = json.loads(report.read_text())
    assert told["errors"] == told["left_out"] == []
    for figure, (text, _, _) in FIGURES.items():
        medians = told["figures"][figure]["medians"]
        assert medians["modelfs"] >= 0, figure
        assert text in table
    for group in GROUPS:
        assert told["stages"][group]["freshness"]["count"] > 0, group
    assert told["figures"]["write_cpu"]["values"]["modelfs"]
    assert told["micro"]["peer protocol, verified"] > 0
    assert told["environment"]["replicas"] == 2
    assert names == sorted(path.name for path in lab.nodes[0].mount.iterdir())
