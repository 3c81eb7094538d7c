"""Draw a run's loss curve.

python examples/plot_loss.py RUN          writes RUN/loss.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run: Path) -> None:
    """Read metrics.jsonl, write loss.png."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "validation_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([row["tokens"] for row in rows], [row["loss"] for row in rows], linewidth=1, label="training")
    if measured:
        axes.plot(
            [row["tokens"] for row in measured],
            [row["validation_loss"] for row in measured],
            "o-",
            label=f"validation, {measured[-1]['bits_per_byte']:.2f} bits per byte at the end",
        )
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{run.name}: {len(rows)} steps")
    figure.tight_layout()
    figure.savefig(run / "loss.png", dpi=150)
    print(run / "loss.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
