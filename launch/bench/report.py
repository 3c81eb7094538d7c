"""Numbers of a server as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.config import BenchConfig
from parallel.config import to_table
from parallel.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["as_json", "paint", "row", "table_head"]

_COLUMNS = (("TTFT ms", "ttft_ms"), ("TPOT ms", "tpot_ms"), ("ITL ms", "itl_ms"), ("E2E ms", "e2e_ms"))
_INK, _SOFT, _GRID, _LINES = "#1f2225", "#63676c", "#e2dfd7", {"p50": "#14776a", "p90": "#8a8a3c", "p99": "#b2691a"}


def table_head(config: BenchConfig) -> list[str]:
    """Two lines above the rows."""
    load = "rate/s" if config.rates else "at once" if config.open else "at a time"
    first = f"{load:>9} {'ok':>6} {'429':>5} {'fail':>5} {'cut':>4} {'req/s':>8} {'good/s':>8} {'tok/s':>8}"
    groups = "".join(f" {name + ' p50  p90  p99':>25}" for name, _ in _COLUMNS)
    return [first + groups, "-" * len(first + groups)]


def row(load: Mapping[str, Any], config: BenchConfig) -> str:
    """One load."""
    outcomes = load["outcomes"]
    many = outcomes.get("429", 0)
    fail = sum(count for name, count in outcomes.items() if name not in ("ok", "429", "cut", "unsent"))
    name = "all" if load["load"] is None else f"{load['load']:g}"
    first = f"{name:>9} {outcomes.get('ok', 0):>6} {many:>5} {fail:>5} {outcomes.get('cut', 0):>4}"
    first += f" {load['requests_per_s']:>8.2f} {load['goodput_per_s']:>8.2f} {load['output_tokens_per_s']:>8.1f}"
    return first + "".join(f" {_three(load[key]):>25}" for _, key in _COLUMNS)


def _three(spread: Mapping[str, float] | None) -> str:
    return "-" if spread is None else " ".join(f"{spread[name]:>7.1f}" for name in ("p50", "p90", "p99"))


def as_json(
    target: str, model: str, config: BenchConfig, loads: Sequence[Mapping[str, Any]], *, interrupted: bool
) -> str:
    """Everything; no key is in it."""
    value = {
        "lockstep": version("lockstep"),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "target": target,
        "model": model,
        "config": to_table(config),
        "interrupted": interrupted,
        "loads": list(loads),
    }
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def paint(loads: Sequence[Mapping[str, Any]], config: BenchConfig, path: Path, title: str) -> None:
    """Latency and throughput against load.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("png: needs matplotlib (pip install matplotlib)") from None
    style: dict[Any, Any] = {"font.size": 9.5, "text.color": _INK, "axes.edgecolor": _GRID, "axes.labelcolor": _SOFT}
    style |= {"xtick.color": _SOFT, "ytick.color": _SOFT, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(10, 6.4), dpi=150, facecolor="#fffefb", layout="constrained")
        axes = figure.subplots(2, 2)
        xs = [float("nan") if load["load"] is None else load["load"] for load in loads]
        xs = [0.0] if len(xs) == 1 and math.isnan(xs[0]) else xs
        limits = (config.objective.ttft_ms, config.objective.tpot_ms, config.objective.e2e_ms)
        latencies = (("Time to first token", "ttft_ms"), ("Time per token", "tpot_ms"), ("End to end", "e2e_ms"))
        for axis, (name, key), most in zip(axes.flat, latencies, limits, strict=False):
            _latency(axis, xs, loads, name, key, most)
        _throughput(axes.flat[3], xs, loads, goals=any(most is not None for most in limits))
        for axis in axes.flat:
            _dress(axis, xs, config)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
        try:
            FigureCanvasAgg(figure).print_png(str(path))
        except OSError as error:
            raise ConfigError(f"png = {str(path)!r}: {error.strerror}") from None


def _latency(
    axis: Axes, xs: Sequence[float], loads: Sequence[Mapping[str, Any]], name: str, key: str, most: float | None
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for share, colour in _LINES.items():
        ys = [math.nan if load[key] is None else load[key][share] for load in loads]
        axis.plot(xs, ys, color=colour, marker="o", markersize=4, linewidth=1.8, label=share)
    if most is not None:
        axis.axhline(most, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)), label="objective")
    axis.set_title(f"{name}, ms", loc="left", fontsize=10.5)
    values = [load[key]["p99"] for load in loads if load[key]]
    lows = [load[key]["p50"] for load in loads if load[key]]
    if values and min(lows) > 0 and max(values) > 20 * min(lows):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(min(lows) / 1.6, max([*values, most or 0]) * 3)
    elif values:
        axis.set_ylim(0, max([*values, most or 0]) * 1.2)


def _throughput(axis: Axes, xs: Sequence[float], loads: Sequence[Mapping[str, Any]], *, goals: bool) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8}
    rates = [load["requests_per_s"] for load in loads]
    axis.plot(xs, rates, color=_LINES["p50"], label="answered", **style)
    if goals:
        good = [load["goodput_per_s"] for load in loads]
        axis.plot(xs, good, color=_LINES["p99"], label="within the objective", linestyle=(0, (4, 2)), **style)
    for x, load in zip(xs, loads, strict=True):
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 7.5, "color": _SOFT}
        axis.annotate(f"{load['output_tokens_per_s']:,.0f} tok/s", (x, load["requests_per_s"]), **place)
    axis.set_title("Requests a second", loc="left", fontsize=10.5)
    axis.set_ylim(0, max([*rates, 1e-3]) * 1.3)
    axis.margins(x=0.09)


def _dress(axis: Axes, xs: Sequence[float], config: BenchConfig) -> None:
    axis.set_facecolor("#fffefb")
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    if len(xs) > 2 and min(xs) > 0 and max(xs) >= 6 * min(xs):
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
    axis.set_xticks(list(xs), [f"{x:g}" for x in xs] if config.rates or not config.open else ["all at once"])
    axis.set_xlabel("requests that arrive a second" if config.rates else "" if config.open else "requests at a time")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", borderaxespad=0.2)
