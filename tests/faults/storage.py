"""Faults of disks and of what lies on them."""

import random
import shutil
import subprocess
from pathlib import Path

from distributed.atomic import damage
from tests.faults.job import Job, Workshop
from tests.faults.outcome import Case, Outcome, Skipped, compared

KILOBYTES_OF_DISK = 700


class Mount:
    """A small file system in memory; Skipped where this process may not mount."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._mount(options)

    def _mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise Skipped(f"mount is not allowed here ({done.stderr.strip()})")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def __enter__(self) -> "Mount":
        return self

    def __exit__(self, *exc_info: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def full_disk(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    """A disk of a few hundred kilobytes; after the failure it is made larger."""
    reference = shop.reference("--keep_checkpoints", "99")
    size = KILOBYTES_OF_DISK + chance.randrange(0, 300)
    with Mount(shop.folder / f"disk-{name}", f"size={size}k") as disk:
        job = Job(shop, name, ("--keep_checkpoints", "99"), runs_dir=disk.folder)
        job.start()
        codes = job.wait()
        good = any(codes) and "No space left on device" in job.told()
        damaged = [str(p) for p in job.checkpoints() if damage(p) is not None]
        disk.remount("size=64m")
        job.finish()
        outcome = Outcome(good and not damaged, job.trained() == reference, job.leftovers(), f"{size} kB")
    return outcome


def write_limit(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    """The kernel refuses the bytes of a file half-way, on every rank, without any need to mount."""
    reference = shop.reference()
    job = Job(shop, name)
    job.start("slow_steps:1")
    job.until(lambda: job.checkpoints())
    job.kill("all")
    job.wait()
    largest = max(p.stat().st_size for p in job.checkpoints()[-1].iterdir()) // 1024
    job.start(f"small_disk:{chance.randrange(largest // 2, largest)}")
    codes = job.wait()
    good = any(codes) and ("was not saved" in job.told() or "File too large" in job.told())
    good = good and job.status()["state"] == "failed" and all(damage(p) is None for p in job.checkpoints())
    job.finish()
    return Outcome(good, job.trained() == reference, job.leftovers())


def read_only(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    with Mount(shop.folder / f"disk-{name}", "ro,size=1m") as disk:
        job = Job(shop, name, runs_dir=disk.folder)
        job.start()
        codes = job.wait(60)
        told = job.told()
        good = codes[0] == 2 and "cannot be written (Read-only file system)" in told and "--runs_dir" in told
        disk.remount("rw,size=64m")
        outcome = compared(job)
        outcome.survived = good
    return outcome


def log_disk_gone(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    reference = shop.reference()
    job = Job(shop, name, ("--tensorboard",))
    job.start(f"log_disk_gone:{chance.randrange(2, 9)}")
    codes = job.wait()
    told = job.told()
    good = not any(codes) and job.status()["state"] == "finished"
    good = good and told.count("metrics.jsonl cannot be written") == 1 and told.count("log file") == 1
    return Outcome(good, job.trained() == reference, job.leftovers())


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def damaged_checkpoint(every_file: bool) -> Case:
    def case(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        reference = shop.reference()
        original = Job(shop, f"{name}-original")
        original.start("term_mid_step:7")
        original.wait()
        newest, previous = original.checkpoints()[-1], original.checkpoints()[-2]
        files = sorted(p.name for p in newest.iterdir())
        todo = [(file, harm) for file in files for harm in (truncate, flip_a_bit, Path.unlink)]
        bad = []
        todo = todo if every_file else chance.sample(todo, 1)
        for i, (file, harm) in enumerate(todo):
            job = Job(shop, f"{name}-{i}")
            shutil.copytree(original.dir, job.dir)
            harm(job.dir / "checkpoints" / newest.name / file)
            job.start()
            codes = job.wait()
            said = "is damaged and passed over" in job.told() and f"falling back to checkpoint {job.dir}" in job.told()
            went_on = f"{previous.name}: step" in job.told() and not any(codes)
            if not (said and went_on and job.trained() == reference) or job.leftovers():
                bad.append(f"{file} {harm.__name__}")
            shutil.rmtree(job.dir)
        return Outcome(not bad, not bad, [], f"{len(todo)} damages" + (f", bad: {bad}" if bad else ""))

    return case
