"""What a training run takes: hours and dollars for each GPU type and cloud, out of measured clips a second.

    python bin/cost.py --run runs/mine                                        as fast as that run went, on its GPU
    python bin/cost.py --clips 3000000 --clips_per_s 160 --measured_on H100   your own measurement, of one GPU
    python bin/cost.py --clips 3000000 --gpus 8 --budget 500                  the rates of launch/prices.toml

    hours = clips x epochs / (clips a second of one GPU x GPUs) / efficiency, and what interruptions cost on top

A rate measured on one GPU type is carried over to the others in proportion to the rates in launch/prices.toml. Exit
code: 0; 1 when nothing fits the budget; 2 for wrong settings.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import json
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import tyro

from retrieval.evaluate import plain_table

ROOT = Path(__file__).resolve().parent.parent
PRICES = ROOT / "launch" / "prices.toml"
HOURS_A_MONTH = 730.0
SKIPPED_INTERVALS = 1  # the first log line of a run counts warm-up and compilation


@dataclass
class CostSettings:
    """Hours and dollars of a training run, for each GPU type and cloud."""

    run: str | None = None
    """A run directory: clips an epoch, epochs and clips a second are read there."""
    clips: int | None = None
    """Training clips an epoch."""
    epochs: int | None = None
    """Epochs to the end; early stopping makes it fewer. By default the run's, else 40."""
    clips_per_s: float | None = None
    """Measured clips a second of ONE GPU; by default those of the run, else of launch/prices.toml."""
    measured_on: str | None = None
    """The GPU type of that measurement, a name of launch/prices.toml; by default what the run says it ran on."""
    gpus: int = 8
    """GPUs of the job."""
    efficiency: float = 0.85
    """Share of the time that is training steps: the rest is start, evaluation, checkpoints, waiting for other GPUs."""
    storage_gib: float = 200.0
    """Disk that is kept while the job runs: audio, checkpoints, the model's cache."""
    budget: float | None = None
    """Dollars: offers above are marked, and the exit code is 1 when none fits."""
    json: bool = False
    """Print one JSON document instead of a table."""
    prices: str = str(PRICES)
    """The price file."""


@dataclass
class Offer:
    cloud: str
    gpu: str
    kind: str  # on demand, or spot
    hours: float
    interruptions: float
    gpu_dollars: float
    machine_dollars: float  # CPU cores and memory, where they are billed on their own
    storage_dollars: float
    as_of: str
    fits: bool = field(default=True)

    @property
    def total(self) -> float:
        return self.gpu_dollars + self.machine_dollars + self.storage_dollars


@dataclass
class Workload:
    clips: int
    epochs: int
    rates: dict[str, float]  # clips a second of one GPU, by GPU type
    source: str


def workload(cfg: CostSettings, prices: dict[str, Any]) -> Workload:
    """From flags, else from the run, else from the price file. ValueError says what is missing."""
    table: dict[str, float] = prices["clips_per_s_per_gpu"]
    clips, epochs, rate, measured_on = cfg.clips, cfg.epochs, cfg.clips_per_s, cfg.measured_on
    source = f"rates of {Path(cfg.prices).name}, {prices['date']}"
    if cfg.run is not None:
        run = Path(cfg.run)
        found = read_run(run)
        clips, epochs = clips or found["clips"], epochs or found["epochs"]
        if rate is None:
            rate, source = found["clips_per_s"], f"measured in {run} on {found['device']}"
            measured_on = measured_on or named_gpu(found["device"], list(table))
    elif rate is not None:
        source = "measured, as given"
    if clips is None:
        raise ValueError("clips: not given; allowed: clips of an epoch (--clips 3000000), or a run directory (--run)")
    if clips < 1 or cfg.gpus < 1 or (epochs or 1) < 1:
        raise ValueError(f"clips, epochs, gpus: got {clips}, {epochs}, {cfg.gpus}; allowed: 1 or more")
    if not 0 < cfg.efficiency <= 1:
        raise ValueError(f"efficiency: got {cfg.efficiency}; allowed: above 0, up to 1")
    rates = dict(table)
    if rate is not None:
        if measured_on not in table:
            raise ValueError(f"measured_on: got {measured_on!r}; allowed: {', '.join(table)}")
        rates = {gpu: rate * table[gpu] / table[measured_on] for gpu in table}
    return Workload(clips, epochs or 40, rates, source)


def read_run(run: Path) -> dict[str, Any]:
    """clips an epoch, epochs, clips a second of one process (median of the log intervals), device."""
    try:
        with (run / "config.toml").open("rb") as file:
            config = tomllib.load(file)
        device = json.loads((run / "env.json").read_bytes())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"run: {run} is no run directory with results ({error.strerror}: {error.filename})") from None
    steps = [line for line in lines if line.get("train/clips_per_s")]
    if len(steps) <= SKIPPED_INTERVALS:
        raise ValueError(f"run: {run} has logged {len(steps)} intervals of steps; let it run a little longer")
    rates = [line["train/clips_per_s"] for line in steps[SKIPPED_INTERVALS:]]
    last = steps[-1]
    batch = config["train"]["batch_size"]
    return {
        "clips": round(last["step"] / last["epoch"] * batch),
        "epochs": config["train"]["epochs"],
        "clips_per_s": statistics.median(rates) / device.get("world_size", 1),
        "device": device["device"],
    }


def named_gpu(device: str, known: Sequence[str]) -> str | None:
    """`NVIDIA A100-SXM4-40GB` -> `A100-40GB`: the longest known name all of whose parts are in the device's name."""
    fitting = [name for name in known if all(part in device.upper() for part in name.upper().split("-"))]
    return max(fitting, key=len, default=None)


def offers(work: Workload, cfg: CostSettings, prices: dict[str, Any]) -> Iterator[Offer]:
    """Every GPU type of every cloud, on demand and spot."""
    lost_h = prices["lost_per_interruption"]["hours"]
    for cloud, table in prices["clouds"].items():
        own = prices.get(cloud, {})  # Modal bills cores and memory on their own
        per_kind = {
            "on demand": (own.get("gpu_hour") or table.get("gpu_hour", {}), table["interruptions_per_hour"]),
            "spot": (table.get("spot_gpu_hour", {}), table.get("spot_interruptions_per_hour", 0.0)),
        }
        for kind, (gpu_hour, per_hour) in per_kind.items():
            for gpu, dollars in gpu_hour.items():
                undisturbed_h = work.clips * work.epochs / (work.rates[gpu] * cfg.gpus) / 3600 / cfg.efficiency
                machines = -(-cfg.gpus // 8)
                interruptions = undisturbed_h * per_hour * machines
                hours = undisturbed_h + interruptions * lost_h
                machine = 8 * own.get("cpu_core_hour", 0.0) + 32 * own.get("memory_gib_hour", 0.0)  # a GPU's share
                storage = table.get("storage_gib_month", 0.0) * cfg.storage_gib / HOURS_A_MONTH
                offer = Offer(
                    cloud, gpu, kind, hours, interruptions, hours * cfg.gpus * dollars, hours * cfg.gpus * machine,
                    hours * storage, table.get("spot_as_of", table["as_of"]) if kind == "spot" else table["as_of"],
                )  # fmt: skip
                offer.fits = cfg.budget is None or offer.total <= cfg.budget
                yield offer


def money(dollars: float) -> str:
    return f"{dollars:,.0f}" if dollars >= 10 else f"{dollars:.2f}"


def show(found: list[Offer], work: Workload, cfg: CostSettings) -> None:
    header = ["cloud, GPU", "clips/s/GPU", "hours", "GPU $", "CPU+mem $", "disk $", "retries", "total $", "prices of"]
    rows = [
        [
            f"{o.cloud} {o.gpu} {o.kind}", f"{work.rates[o.gpu]:.0f}", f"{o.hours:,.1f}", money(o.gpu_dollars),
            money(o.machine_dollars), money(o.storage_dollars), f"{o.interruptions:.1f}",
            money(o.total) + ("" if o.fits else " !"), o.as_of,
        ]
        for o in found
    ]  # fmt: skip
    print(f"{work.clips:,} clips x {work.epochs} epochs on {cfg.gpus} GPU(s); {work.source}\n")
    print(plain_table(header, rows))
    if cfg.budget is not None:
        print(f"\n! is above the budget of {cfg.budget:,.0f} $")
        if not any(o.fits for o in found):
            print(f"nothing fits: the cheapest is {money(found[0].total)} $; fewer --epochs, or other --gpus")


def cost(cfg: CostSettings) -> int:
    with Path(cfg.prices).open("rb") as file:
        prices = tomllib.load(file)
    work = workload(cfg, prices)
    found = sorted(offers(work, cfg, prices), key=lambda o: o.total)
    if cfg.json:
        rows = [{**asdict(o), "total": o.total} for o in found]
        print(json.dumps({"workload": asdict(work), "gpus": cfg.gpus, "offers": rows}, indent=1))
    else:
        show(found, work, cfg)
    return 0 if any(o.fits for o in found) else 1


def main(argv: Sequence[str] | None = None) -> int:
    cfg = tyro.cli(CostSettings, args=argv, use_underscores=True, prog="bin/cost.py")
    try:
        return cost(cfg)
    except (ValueError, FileNotFoundError) as error:
        print(f"bin/cost.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
