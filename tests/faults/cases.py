"""The faults: each function disturbs one run and returns what came of it. See soak.py."""

import os
import random
import signal
import time
from typing import Literal

from distributed.atomic import damage
from tests.faults.job import Job, Workshop
from tests.faults.outcome import Case, Outcome, Row, compared
from tests.faults.storage import damaged_checkpoint, full_disk, log_disk_gone, read_only, write_limit

GRACE_S = 30.0  # torchrun's, between SIGTERM and SIGKILL
NAMED_S = 5.0  # from the death of a loader's worker to an error that names it


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def kill(target: str, launcher: str, moment: Literal["any", "save"] = "any") -> Case:
    def case(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        reference = shop.reference()
        job = Job(shop, name, launcher=launcher)
        job.start("slow_steps:30")
        if moment == "save":
            nth = chance.randrange(1, 7)  # checkpoints and best models are both saves
            for i in range(nth):
                if i:
                    job.until(lambda: not job.is_saving())
                job.until(job.is_saving)
            where = f"save {nth}"
        else:
            if launcher == "torchrun":
                job.until(job.dir.exists)
            delay_s = chance.uniform(0.0, 2.0)
            time.sleep(delay_s)
            where = f"{delay_s:.2f} s"
        hit = job.kill(target)
        job.wait()
        job.until_gone()
        stopped_at = job.status()
        job.launcher = "nursery"
        job.finish()
        equal = job.trained() == reference
        return Outcome(True, equal, job.leftovers(), f"{where}, {stopped_at['state']}" + ("" if hit else ", too late"))

    return case


def kill_rank_0_under_torchrun(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    """As when the kernel kills it for memory: the rank that writes the status is gone, and another writes it."""
    reference = shop.reference()
    job = Job(shop, name, launcher="torchrun")
    job.start("slow_steps:100")
    job.until(lambda: job.status()["state"] == "training")
    time.sleep(chance.uniform(0.0, 0.5))
    pid, asked = job.rank_pids()[0], time.monotonic()
    job.kill("rank0")
    job.until(lambda: job.status()["state"] == "failed")
    seconds = time.monotonic() - asked
    job.wait()
    job.until_gone()
    status = job.status()
    told = status["state"] == "failed" and f"rank 0 is gone: process {pid} has ended" in status["message"]
    job.launcher = "nursery"
    job.finish()
    return Outcome(
        told, job.trained() == reference, job.leftovers(), f"{seconds:.1f} s" + ("" if told else f", {status}")
    )


def kill_under_the_launcher(target: str) -> Case:
    """launch/attempts.py brings the run to its end by itself, without a hand."""

    def case(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        reference = shop.reference()
        job = Job(shop, name, launcher="attempts")
        job.start("slow_steps:100")
        job.until(job.dir.exists)
        delay_s = chance.uniform(0.0, 2.0)
        time.sleep(delay_s)
        # A rank whose work is done may die while rank 0 writes the report: the run has finished all the same.
        too_late = not job.kill(target) or job.status()["state"] == "finished"
        (code,), told = job.wait(), job.told()
        again = "attempt 1 of 4 failed" in told or too_late
        good = code == 0 and again and job.status()["state"] == "finished"
        return Outcome(good, job.trained() == reference, job.leftovers(), f"{delay_s:.2f} s, code {code}")

    return case


def kill_a_loader_worker(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    """One of two a rank: named in the output within 5 s and in the status, whichever rank it worked for.

    The undisturbed run has one worker a rank: their number must not show in what is trained.
    """
    reference = shop.reference()
    job = Job(shop, name, ("--num_workers", "2"), grace_s=10.0)
    job.start("slow_steps:50")
    job.until(lambda: len(job.loader_workers()) == 2 * shop.ranks and job.status()["state"] == "training")
    workers = job.loader_workers()
    unseen = set(workers) - set(shop.processes())
    assert not unseen, f"the search for left processes does not see {unseen}"
    time.sleep(chance.uniform(0.0, 0.5))
    victim = chance.choice(workers)
    os.kill(victim, signal.SIGKILL)
    asked, words = time.monotonic(), f"(process {victim}) was killed by SIGKILL"
    job.until(lambda: words in job.told())
    seconds = time.monotonic() - asked
    codes, status = job.wait(), job.status()
    job.until_gone()
    named = seconds < NAMED_S and status["state"] == "failed" and words in status["message"]
    note = f"named after {seconds:.1f} s, codes {codes}" + ("" if named else f", {status}")
    job.finish()
    return Outcome(named and 0 not in codes, job.trained() == reference, job.leftovers(), note)


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


def terminated(fault: str, states: tuple[str, ...] = ("preempted",)) -> Case:
    """SIGTERM on all ranks at a place in the program, as torchrun hands it on."""

    def case(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        planted = fault.replace("?", str(chance.randrange(1, 9)))
        job = Job(shop, name)
        asked = time.monotonic()
        job.start(planted)
        codes = job.wait()
        status, seconds = job.status(), time.monotonic() - asked
        saved = job.checkpoints()
        good = not any(codes) and status["state"] in states and seconds < GRACE_S
        if status["step"]:
            good = good and saved[-1].name == f"step-{status['step']:08d}" and damage(saved[-1]) is None
        outcome = compared(job)
        outcome.survived = good
        outcome.note = f"{planted}: {status['state']} at step {status['step']}, codes {codes}"
        return outcome

    return case


def terminate_torchrun(times: int) -> Case:
    def case(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        job = Job(shop, name, launcher="torchrun")
        job.start("slow_steps:100")
        job.until(lambda: job.status()["state"] == "training" and job.status()["step"] == 0 and job.dir.exists())
        time.sleep(chance.uniform(0.0, 1.0))
        asked = time.monotonic()
        for _ in range(times):
            job.kill("torchrun", signal.SIGTERM)
            time.sleep(0.05)
        job.wait()
        job.until_gone()
        seconds, status = time.monotonic() - asked, job.status()
        good = status["state"] == "preempted" and seconds < GRACE_S and bool(job.checkpoints())
        job.launcher = "nursery"
        outcome = compared(job)
        outcome.survived = good
        outcome.note = f"{status['state']} at step {status['step']} after {seconds:.1f} s"
        return outcome

    return case


# --- ranks, clocks, neighbours ---------------------------------------------------------------------------------------


def stalled(fault: str, words: str, grace_s: float = 1.0) -> Case:
    """grace_s: what the launcher waits until it kills; enough of it where a rank has to end by itself, as it says."""

    def case(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        reference = shop.reference()
        job = Job(shop, name, grace_s=grace_s)
        asked = time.monotonic()
        # On a GPU the limit must hold for the first steps too, in which kernels are compiled and graphs captured.
        limit_s = 4 if shop.device == "cpu" else 60
        job.start(f"{fault}:{chance.randrange(2, 9)}", "--collective_timeout_s", str(limit_s))
        codes = job.wait(60 + 2 * limit_s)
        seconds, status, told = time.monotonic() - asked, job.status(), job.told()
        named = words in told and words in status["message"]
        job.finish()
        note = f"ended after {seconds:.1f} s, codes {codes}" + ("" if named else f"; not named: {status}")
        return Outcome(named and 0 not in codes, job.trained() == reference, job.leftovers(), note)

    return case


def nan_on_one_rank(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    """Both ranks skip that step, once. Equal: with the run that had the NaN too, but was not stopped in that step."""
    step = chance.randrange(2, 9)
    through, stopped = Job(shop, f"{name}-through"), Job(shop, name)
    through.start(f"nan_on_one_rank:{step}")
    codes, told = through.wait(), through.told()
    good = all(f"{rank} step {step - 1} is skipped: loss is nan" in told for rank in ("WARNING:", "[rank 1] WARNING"))
    stopped.start(f"nan_and_term:{step}")
    codes += stopped.wait()
    good = good and not any(codes) and stopped.status()["state"] == "preempted"
    stopped.finish()
    trained = through.trained()
    differs = trained != shop.reference()  # a step was left out
    leftovers = through.leftovers() + stopped.leftovers()
    return Outcome(good and differs, stopped.trained() == trained, leftovers, f"step {step}")


def second_job(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    reference = shop.reference()
    first, second = Job(shop, name), Job(shop, name)
    first.start("slow_steps:150")
    first.until(lambda: first.status()["state"] == "training")
    told_first = first.out
    told_first.rename(told_first.with_suffix(".first"))
    asked = time.monotonic()
    second.start()
    codes = second.wait(60)
    seconds = time.monotonic() - asked
    refused = codes[0] == 2 and "is in use by process" in second.told() and not first.is_over()
    codes = first.wait()
    good = refused and not any(codes) and first.status()["state"] == "finished"
    return Outcome(good, first.trained() == reference, first.leftovers(), f"refused after {seconds:.1f} s")


def other_world_sizes(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    """2 -> 1 -> 2 ranks. Sums over ranks round differently, so the losses agree to 1e-4 and not bit for bit."""
    more = ("--tower_dropout", "0", "--lr", "1e-3")
    shop.reference(*more)
    undisturbed = Job(shop, f"undisturbed-{list(shop.references).index(more)}")
    job = Job(shop, name, more)
    job.start("term_mid_step:4")
    good = not any(job.wait()) and job.status()["state"] == "preempted"
    job.ranks = 1
    job.start("term_mid_step:4")
    good = good and job.wait() == [0] and job.status()["state"] == "preempted"
    job.ranks = shop.ranks
    job.finish()
    ours, theirs = job.losses(), undisturbed.losses()
    furthest = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return Outcome(good and furthest < 1e-4, None, job.leftovers(), f"losses within {furthest:.0e}")


def clock_set_back(shop: Workshop, name: str, chance: random.Random) -> Outcome:
    reference = shop.reference()
    job = Job(shop, name)
    job.start("term_mid_step:5")
    job.wait()
    job.start("clock_goes_back:0")  # the next machine's clock is a day behind
    codes = job.wait()
    steps_in_order = job.metric_steps() == sorted(job.metric_steps())
    within = Job(shop, f"{name}-within")
    within.start("clock_goes_back:5")
    codes += within.wait()
    good = not any(codes) and steps_in_order and within.status()["state"] == "finished"
    equal = job.trained() == reference and within.trained() == reference
    return Outcome(good, equal, job.leftovers() + within.leftovers())


TABLE = (
    Row("SIGKILL of one rank, any moment", kill("rank1", "nursery"), in_ci=True),
    Row("SIGKILL of rank 0, any moment", kill("rank0", "nursery")),
    Row("SIGKILL of one rank inside a save", kill("rank1", "nursery", "save")),
    Row("SIGKILL of rank 0 inside a save", kill("rank0", "nursery", "save"), in_ci=True),
    Row("SIGKILL of all ranks inside a save", kill("all", "nursery", "save")),
    Row("SIGKILL of one rank under torchrun", kill("rank1", "torchrun")),
    Row("SIGKILL of rank 0 under torchrun: told by another", kill_rank_0_under_torchrun, in_ci=True),
    Row("SIGKILL of torchrun", kill("torchrun", "torchrun"), in_ci=True),
    Row("SIGKILL of torchrun inside a save", kill("torchrun", "torchrun", "save")),
    Row("SIGKILL of one rank under the launcher", kill_under_the_launcher("rank1"), in_ci=True),
    Row("SIGKILL of torchrun under the launcher", kill_under_the_launcher("torchrun")),
    Row("SIGKILL of a loader worker", kill_a_loader_worker, in_ci=True),
    Row("SIGTERM while starting", terminated("term_at_start:1"), every_round=False),
    Row("SIGTERM in a step", terminated("term_mid_step:?"), in_ci=True),
    Row("SIGTERM to one rank alone", terminated("term_one_rank:?"), in_ci=True),
    Row("SIGTERM in evaluation", terminated("term_in_evaluation:3"), every_round=False, in_ci=True),
    Row("SIGTERM while the glossary is embedded", terminated("term_in_evaluation:2"), every_round=False),
    Row("SIGTERM in a save", terminated("term_in_save:?"), in_ci=True),
    Row("SIGTERM twice in a row", terminated("term_twice:?")),
    Row("SIGTERM to torchrun", terminate_torchrun(1)),
    Row("SIGTERM to torchrun, twice", terminate_torchrun(2)),
    Row("disk full", full_disk, in_ci=True),
    Row("write refused half-way through a file", write_limit),
    Row("run directory read-only", read_only, every_round=False, in_ci=True),
    Row("log disk gone", log_disk_gone, in_ci=True),
    Row("a checkpoint file damaged, one at random", damaged_checkpoint(every_file=False), in_ci=True),
    Row("every checkpoint file damaged in every way", damaged_checkpoint(every_file=True), every_round=False),
    Row("NaN on one rank", nan_on_one_rank),
    Row("a rank stopped", stalled("stop_one_rank", "rank 1 does not answer"), every_round=False, in_ci=True),
    Row("a rank stalled", stalled("stall_one_rank", "rank 1 is at tests/faults/rank.py"), every_round=False),
    Row(
        "a rank killed, the others wait on a device",
        stalled("die_while_the_others_wait", "rank 1 is gone: process", GRACE_S),
        every_round=False,
        in_ci=True,
    ),
    Row("two jobs on one run directory", second_job, every_round=False, in_ci=True),
    Row("world size 2 -> 1 -> 2", other_world_sizes, every_round=False, in_ci=True),
    Row("clock set back a day", clock_set_back, every_round=False),
)
