"""Forecast monthly sunspots and weekly CO2 with an LSTM: once torch.nn.LSTM, once fuseblock.nn.LSTM, same everything else.

    python examples/forecast.py [--quick] [--threads 2] [--plot out/forecast.png]

Data: statsmodels' own files (no download). Monthly mean sunspot numbers 1749 to mid 2009, 24 months ahead; weekly CO2 at
Mauna Loa 1958 to 2001, 26 weeks ahead. Split by time into 70 % training, 15 % validation, 15 % test: every target of
a part lies in that part (inputs may reach back, as they could when forecasting), and whatever is fitted (scales, weights,
MASE's denominator) is fitted on training data; validation picks the epoch. CO2's 59 missing weeks are interpolated
linearly, which looks ahead inside a gap; all of them lie in the training part, and the program stops if one does not.

Both models start from equal weights, see equal batches in equal order and take turns epoch by epoch, so that a
machine's noise meets both. Their loss curves may differ only by what rounding explains. How much that is, is measured:
*controls* train torch.nn.LSTM with its hidden units renumbered and the rows of each batch reordered. In exact arithmetic
they are the same network (Adam works element by element) with the same losses; in float32 every sum is rounded
in another order. fuseblock's largest difference from torch.nn has to stay within twice the largest control's plus one unit
in the last place, else the exit code is 1. Time ratios mean something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fuseblock

Array = NDArray[np.float64]
BATCH = 32


@dataclass(frozen=True)
class Series:
    """A series and how it is forecast.

    Attributes:
        name, unit: for tables and plots.
        values: observations at even steps, nothing missing.
        times: their times in years, for plots and the yearly phase.
        horizon: steps to forecast.
        window: steps that the model sees.
        season: lag of the seasonal-naive forecast.
        level: whether the model sees levels too (a bounded series); without, only changes (a trend leaves the
            range seen in training).
        yearly: whether the model sees the phase of the year.
        epochs, stride: training length; ``stride`` steps between the starts of training windows.
    """

    name: str
    unit: str
    values: Array
    times: Array
    horizon: int
    window: int
    season: int
    level: bool
    yearly: bool
    epochs: int
    stride: int

    @property
    def cuts(self) -> tuple[int, int]:
        """First indices of validation and test."""
        return int(0.70 * len(self.values)), int(0.85 * len(self.values))


def load_sunspots() -> Series:
    """Monthly mean sunspot numbers, from the table that statsmodels ships beside its yearly ones."""
    from statsmodels.datasets import sunspots

    text = (Path(sunspots.__file__).parent / "src" / "sunspots_monthly.dat").read_text()
    rows = [line.split() for line in text.splitlines() if line[:4].isdigit()]
    values = np.array([float(number) for row in rows for number in row[1:]])
    if [int(row[0]) for row in rows] != list(range(1749, 2010)) or len(values) != 260 * 12 + 6:
        raise RuntimeError("the sunspot table is not the one expected: January 1749 to June 2009")
    times = 1749 + (np.arange(len(values)) + 0.5) / 12
    return Series("sunspots", "monthly mean number", values, times, 24, 264, 132, True, False, 16, 2)


def load_co2() -> Series:
    """Weekly CO2 at Mauna Loa with its gaps interpolated, all of them in the training part."""
    from statsmodels.datasets import co2

    frame = co2.load_pandas().data["co2"]
    times = np.asarray(frame.index.year + (frame.index.day_of_year - 0.5) / 365.25, dtype=np.float64)
    raw = np.asarray(frame, dtype=np.float64)
    known = np.isfinite(raw)
    values = np.interp(np.arange(len(raw)), np.flatnonzero(known), raw[known])
    series = Series("CO2", "ppm, weekly", values, times, 26, 104, 52, False, True, 24, 1)
    if not known[series.cuts[0] - 1 :].all():
        raise RuntimeError("a gap reaches validation or test: interpolating it would look ahead")
    return series


@dataclass(frozen=True)
class Windows:
    """Inputs ``(N, window, features)`` and targets ``(N, horizon)``, both relative to the last value seen and scaled.

    ``last`` ``(N,)`` and ``first`` (index of each first target) turn a forecast back into the series' unit.
    """

    inputs: Tensor
    targets: Tensor
    last: Array
    first: NDArray[np.int64]
    scale: float

    def forecast(self, output: Tensor) -> Array:
        """A model's output in the series' unit."""
        return output.double().numpy() * self.scale + self.last[:, None]


def make_windows(series: Series, start: int, end: int, stride: int) -> Windows:
    """All windows whose targets lie in ``[start, end)``."""
    values, train = series.values, series.values[: series.cuts[0]]
    # The size of a typical change over the horizon, in training data only.
    scale = float(np.std(train[series.horizon :] - train[: -series.horizon]))
    first = np.arange(max(start, series.window), end - series.horizon + 1, stride)
    past = first[:, None] + np.arange(-series.window, 0)
    last = values[first - 1]
    features = [(values[past] - last[:, None]) / scale]
    if series.level:
        features.append((values[past] - train.mean()) / train.std())
    if series.yearly:
        phase = 2 * np.pi * series.times[past]
        features += [np.sin(phase), np.cos(phase)]
    targets = (values[first[:, None] + np.arange(series.horizon)] - last[:, None]) / scale
    return Windows(
        torch.tensor(np.stack(features, -1), dtype=torch.float32),
        torch.tensor(targets, dtype=torch.float32),
        last,
        first,
        scale,
    )


class Forecaster(nn.Module):
    """Two LSTM layers of 40 units, and a linear map from the last state to all steps of the horizon."""

    def __init__(self, lstm: type[nn.LSTM], features: int, horizon: int) -> None:
        super().__init__()
        self.lstm = lstm(features, 40, num_layers=2, batch_first=True)
        self.head = nn.Linear(40, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Map windows ``(N, window, features)`` to scaled forecasts ``(N, horizon)``."""
        _, (h, _) = self.lstm(x)
        out: Tensor = self.head(h[-1])
        return out


@dataclass
class Run:
    """A model in training, and its record. ``shuffle`` reorders the rows of each batch (controls only)."""

    name: str
    model: Forecaster
    shuffle: torch.Generator | None = None
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # With Adam's default eps and twice the rate training multiplies rounding errors to 0.05 in the losses, between
        # runs of torch.nn too, and comparing curves would say nothing. Like this they stay below 1e-6.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, eps=1e-5)

    def epoch(self, data: Windows, order: Tensor, tick: Callable[[], None]) -> None:
        """One pass over the training windows in the given order."""
        self.model.train()
        total, begin = 0.0, time.perf_counter()
        for rows in order.split(BATCH):
            if self.shuffle is not None:
                rows = rows[torch.randperm(len(rows), generator=self.shuffle)]
            loss = nn.functional.mse_loss(self.model(data.inputs[rows]), data.targets[rows])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            total += float(loss.detach()) * len(rows)
            tick()
        self.seconds.append(time.perf_counter() - begin)
        self.train_loss.append(total / len(order))

    def validate(self, data: Windows) -> None:
        """Record the validation loss; keep the weights if it is the lowest so far."""
        loss = float(nn.functional.mse_loss(predict(self.model, data), data.targets))
        if loss < min(self.validation_loss, default=math.inf):
            self.best = copy.deepcopy(self.model.state_dict())
        self.validation_loss.append(loss)


def predict(model: Forecaster, data: Windows) -> Tensor:
    """The model's outputs for all windows."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in data.inputs.split(256)])


def renumber(model: Forecaster, generator: torch.Generator) -> Forecaster:
    """The same function with the hidden units of each layer in another order."""
    twin = copy.deepcopy(model)
    previous = None
    with torch.no_grad():
        for layer in range(2):
            units = torch.randperm(40, generator=generator)
            gates = torch.cat([units + 40 * gate for gate in range(4)])
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                value = getattr(twin.lstm, f"{name}_l{layer}")
                value.copy_(value[gates])
            w_ih, w_hh = (getattr(twin.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh"))
            w_hh.copy_(w_hh[:, units])
            if previous is not None:
                w_ih.copy_(w_ih[:, previous])
            previous = units
        twin.head.weight.copy_(twin.head.weight[:, previous])
    return twin


def largest_difference(a: Run, b: Run) -> float:
    """Largest distance of two runs' training or validation losses."""
    pairs = zip(a.train_loss + a.validation_loss, b.train_loss + b.validation_loss, strict=True)
    return max(abs(x - y) for x, y in pairs)


def errors(forecast: Array, series: Series, data: Windows) -> tuple[float, float, float]:
    """MAE, RMSE and MASE: MAE over the seasonal-naive one's MAE on the training part."""
    truth = series.values[data.first[:, None] + np.arange(series.horizon)]
    train = series.values[: series.cuts[0]]
    naive = np.abs(train[series.season :] - train[: -series.season]).mean()
    mae = float(np.abs(forecast - truth).mean())
    return mae, float(np.sqrt(np.square(forecast - truth).mean())), mae / float(naive)


def seasonal_naive(series: Series, data: Windows) -> Array:
    """One season ago; at most one season ahead, so that only known values are used."""
    forecast: Array = series.values[data.first[:, None] + np.arange(series.horizon) - series.season]
    return forecast


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over batches, if rich is there."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        print(f"{description} ... (install rich for a progress bar)")
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def who_runs(model: Forecaster, x: Tensor) -> str:
    """Which engine and backend fuseblock takes for the model's training step."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [(*(getattr(model.lstm, f"{name}_l{layer}") for name in names), None) for layer in range(2)]
    layer = fuseblock.explain("lstm", x.transpose(0, 1), None, None, weights)
    state = x.new_zeros(1, len(x), 40)
    gates = x.new_zeros(x.shape[1], len(x), 160)
    operator = fuseblock.explain(
        "lstm_recurrence", gates, state, state, weights[0][1][None], None, None, None, True
    )
    return f"{layer}\n{operator}"


def train_all(series: Series, args: argparse.Namespace) -> tuple[list[Run], Windows, Windows]:
    """Train torch.nn, fuseblock and the controls side by side; gives the runs, training and test windows."""
    validation_start, test_start = series.cuts
    train = make_windows(series, 0, validation_start, series.stride * (8 if args.quick else 1))
    validation = make_windows(series, validation_start, test_start, 1)
    test = make_windows(series, test_start, len(series.values), 1)
    torch.manual_seed(args.seed)
    features = train.inputs.shape[-1]
    stock = Forecaster(nn.LSTM, features, series.horizon)
    ours = Forecaster(fuseblock.nn.LSTM, features, series.horizon)
    ours.load_state_dict(stock.state_dict())
    orders, units = (torch.Generator().manual_seed(args.seed + n) for n in (1, 2))
    controls = [
        Run(f"control {n}", renumber(stock, units), torch.Generator().manual_seed(n))
        for n in range(args.controls)
    ]
    runs = [Run("torch.nn", stock), Run("fuseblock", ours), *controls]
    print(who_runs(ours, train.inputs[:BATCH]))
    epochs = 2 if args.quick else series.epochs
    with progress(series.name, epochs * len(runs) * math.ceil(len(train.inputs) / BATCH)) as tick:
        for number in range(epochs):
            order = torch.randperm(len(train.inputs), generator=orders)
            # Take turns in who goes first; controls are not timed against anyone.
            pair = runs[:2] if number % 2 == 0 else runs[1::-1]
            for run in [*pair, *runs[2:]]:
                run.epoch(train, order, tick)
                run.validate(validation)
    for run in runs:
        run.model.load_state_dict(run.best)
    return runs, train, test


def study(series: Series, args: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    """Train, compare and print one series; gives whether parity held, and what `plot` draws."""
    validation_start, test_start = series.cuts
    print(
        f"\n{series.name}: {len(series.values)} steps, {series.times[0]:.1f} to {series.times[-1]:.1f}; validation from "
        f"{series.times[validation_start]:.1f}, test from {series.times[test_start]:.1f}; horizon {series.horizon}"
    )
    runs, train, test = train_all(series, args)
    stock, ours, *controls = runs

    difference = largest_difference(stock, ours)
    among = [largest_difference(stock, control) for control in controls]
    ulp = float(np.spacing(np.float32(max(stock.train_loss + stock.validation_loss))))
    bound = 2 * max(among) + ulp
    parity = difference <= bound
    print(
        f"loss curves, {len(stock.train_loss)} epochs: largest difference fuseblock to torch.nn {difference:.3g}; "
        f"torch.nn to itself in other orders of summation {', '.join(f'{value:.3g}' for value in among)}; "
        f"bound {bound:.3g}: {'within' if parity else 'BROKEN'}"
    )
    forecasts = {run.name: test.forecast(predict(run.model, test)) for run in (stock, ours)}
    forecasts[f"{series.season} steps ago"] = seasonal_naive(series, test)
    forecasts["last value"] = np.repeat(test.last[:, None], series.horizon, axis=1)
    print(f"{'test error':<16} {'MAE':>8} {'RMSE':>8} {'MASE':>8}   ({len(test.first)} forecasts)")
    for name, forecast in forecasts.items():
        mae, rmse, mase = errors(forecast, series, test)
        print(f"{name:<16} {mae:8.3f} {rmse:8.3f} {mase:8.3f}")
    # The first epoch warms both up.
    pairs = list(zip(stock.seconds, ours.seconds, strict=True))[1:]
    ratios = [a / b for a, b in pairs]
    print(
        f"training time per epoch: torch.nn {statistics.median(a for a, _ in pairs):.2f} s, fuseblock "
        f"{statistics.median(b for _, b in pairs):.2f} s; fuseblock is {statistics.median(ratios):.2f} times as fast "
        f"(paired epochs: {min(ratios):.2f} to {max(ratios):.2f}), {torch.get_num_threads()} threads"
    )
    return parity, {"series": series, "runs": runs, "test": test, "forecasts": forecasts}


def plot(studies: list[dict[str, Any]], path: Path) -> None:
    """Loss curves, and the forecast from one origin in the middle of the test part, for each series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(studies), 2, figsize=(13, 4.2 * len(studies)), squeeze=False)
    styles = {"torch.nn": {"lw": 3.5, "alpha": 0.4}, "fuseblock": {"lw": 1.3}}
    for (left, right), result in zip(axes, studies, strict=True):
        series, test = result["series"], result["test"]
        for run in result["runs"][:2]:
            epochs = range(1, len(run.train_loss) + 1)
            left.plot(
                epochs, run.train_loss, color="tab:blue", label=f"{run.name}, training", **styles[run.name]
            )
            left.plot(
                epochs,
                run.validation_loss,
                color="tab:orange",
                label=f"{run.name}, validation",
                **styles[run.name],
            )
        left.set(
            xlabel="epoch", ylabel="mean squared error (scaled)", title=f"{series.name}: loss", yscale="log"
        )
        middle = len(test.first) // 2
        origin = int(test.first[middle])
        shown = slice(origin - 3 * series.horizon, origin + series.horizon)
        right.plot(series.times[shown], series.values[shown], color="black", lw=1, label="truth")
        ahead = series.times[origin : origin + series.horizon]
        for name, forecast in result["forecasts"].items():
            style = styles.get(name, {"lw": 1, "linestyle": "--"})
            right.plot(ahead, forecast[middle], label=name, **style)
        right.axvline(ahead[0], color="gray", lw=0.5)
        right.set(
            title=f"{series.name}: forecast of {series.horizon} steps from the test part", ylabel=series.unit
        )
        for axis in (left, right):
            axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\nwrote {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the study; 0 if the loss curves agree as far as rounding explains, else 1."""
    parser = argparse.ArgumentParser(
        description="Forecast sunspots and CO2 with torch.nn.LSTM and fuseblock.nn.LSTM."
    )
    parser.add_argument("--quick", action="store_true", help="two epochs on an eighth of the data")
    parser.add_argument("--threads", type=int, default=None, help="default: PyTorch's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--controls", type=int, default=3, help="torch.nn runs that measure rounding, at least 1"
    )
    parser.add_argument("--plot", type=Path, default=Path("out/forecast.png"))
    args = parser.parse_args(argv)
    if args.controls < 1:
        parser.error("--controls must be at least 1: without a control there is no bound")
    if args.threads:
        torch.set_num_threads(args.threads)
    results = [study(load(), args) for load in (load_sunspots, load_co2)]
    try:
        plot([result for _, result in results], args.plot)
    except ImportError:
        print("\nno plot: matplotlib is not installed")
    return 0 if all(parity for parity, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
