"""Train an audio-to-term retriever.

    torchrun --nproc_per_node=2 bin/train.py --preset quickstart
    torchrun --nproc_per_node=8 bin/train.py --train_samples_path train.json --test_samples_path test.json

`train(config)` is the whole run, read from top to bottom: processes, run directory, data, model and adapters,
optimizer, resume, loop, final test. What a step computes is in bin/step.py, what is measured in bin/evaluation.py.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import itertools
import logging
import math
import os
import time
from dataclasses import replace
from functools import partial

import tomli_w
import torch
from torch import nn

from bin.bank import BankSchedule
from bin.checks import check_all_train, check_rooms_agree, describe_plan
from bin.config import Config, parse, to_toml
from bin.datasets import load_datasets, merge_drops
from bin.ending import run_program
from bin.evaluation import Evaluator, encode_terms
from bin.feed import feed, pinning
from bin.fit import fit_memory
from bin.optimizer import parameter_groups
from bin.redaction import redact
from bin.reporting import NUM_MISSES, show_test, write_run_report
from bin.rundir import (
    Resumable,
    RunState,
    choose_run_dir,
    load_checkpoint,
    save_checkpoint,
    save_trained,
    tell_status,
)
from bin.runlog import Interval, configure_logging, environment, progress_bar
from bin.step import add_gradients, center_heads
from bin.stopping import Preempted, StopRequest
from bin.tracking import MAX_PROJECTED, Tracker
from bin.update import make_update
from data.loader import Loader
from distributed import processes, watch
from distributed.atomic import json_bytes, remove_strays, write_file_atomically
from distributed.checkpoints import CheckpointStore
from distributed.gradsync import check_same_parameters
from distributed.health import ArrivingGradients, NonFiniteGuard
from distributed.rundir import RunLock, State
from lora.inject import inject_lora
from losses.temperature import Temperature
from losses.terms import TermBank
from model.build import build_model
from model.graphs import add_graphs
from retrieval.model_files import load_trained

logger = logging.getLogger("earmark")

CENTER_CLIPS = 256  # clips over which the heads are centred


def train(config: Config) -> int:
    """Run to the end, an early stop or a stop signal. Returns the exit code: 0 unless it raises."""
    cfg = config.train

    # ----------------------------------------------------------------------------------------------- processes
    world = processes.start(
        config.distributed.device, config.distributed.collective_timeout_s, config.distributed.start_timeout_s
    )
    if config.run.dry_run:
        configure_logging(world.rank, None)
        describe_plan(config, world)
        processes.stop()
        return 0

    # ------------------------------------------------------------------------------------------- run directory
    run_dir = choose_run_dir(config.run, world)
    lock = RunLock(run_dir)
    stop, state, is_ours, tracker = StopRequest(), RunState(), False, None
    configure_logging(world.rank, run_dir / f"train_{time.strftime('%Y%m%d_%H%M%S')}.log")
    try:
        store = CheckpointStore(run_dir / "checkpoints", config.distributed.keep_checkpoints)
        store.prepare()
        checkpoint = store.latest_good()
        if checkpoint is not None and config.run.resume == "never":
            raise ValueError(
                f"run_name: {run_dir} already holds checkpoints; go on with --resume auto, or take another --run_name"
            )
        is_ours = True  # from here on, whatever happens is told in status.json
        watch.report_to(lambda reason: tell_status(run_dir, "failed", state, reason))
        if world.is_main:
            remove_strays(run_dir)
            write_file_atomically(run_dir / "config.toml", tomli_w.dumps(to_toml(config)).encode())
            write_file_atomically(run_dir / "env.json", json_bytes(environment(str(world.device))))
            tell_status(run_dir, "starting", state)

        # ------------------------------------------------------------------------------------------------ data
        data = load_datasets(config.data, world, run_dir / "bad_records.jsonl")

        # -------------------------------------------------------------------------------------- model and LoRA
        torch.manual_seed(cfg.seed)  # the same weights on every rank
        started = time.perf_counter()
        built = build_model(config.model, world.device)
        model, tokenizer = built.model, built.tokenizer
        if config.model.trainable == "lora":
            logger.info("adapters on %d layers", len(inject_lora(model, config.lora)))
        temperature = Temperature(config.losses.temperature, config.losses.learn_temperature).to(world.device)
        named = [(n, p) for n, p in [*model.named_parameters(), *temperature.named_parameters()] if p.requires_grad]
        model.train()
        logger.info(
            "model ready in %.1f s: %.1f M parameters train, of %.1f M; towers from %s",
            time.perf_counter() - started,
            sum(p.numel() for _, p in named) / 1e6,
            sum(p.numel() for p in model.parameters()) / 1e6,
            {k: v for k, v in built.sources.items() if k in ("audio_tower", "language_model")},
        )
        check_rooms_agree(model)

        # -------------------------------------------------------------------------- loader, optimizer, schedule
        loader = Loader(
            data.train, cfg.batch_size // cfg.grad_accum_steps, tokenizer, config.data,
            seed=cfg.seed, rank=world.rank, world_size=world.world_size, glossary=data.glossary, windows=data.windows,
            negatives=data.negatives, drops=data.drops, reader=data.reader, pin=pinning(world.device),
        )  # fmt: skip
        steps_per_epoch = loader.steps_per_epoch // cfg.grad_accum_steps
        if steps_per_epoch == 0:
            raise ValueError(
                f"batch_size: got {cfg.batch_size}, but an epoch has only {loader.num_items} clips; lower it"
            )
        total_steps = min(cfg.epochs * steps_per_epoch, cfg.max_steps or sys.maxsize)
        groups = parameter_groups(named, built.sources, cfg.weight_decay, cfg.pretrained_lr_scale)
        update = make_update(groups, named, cfg.lr, cfg.adam_beta2, cfg.flat_optimizer)  # AdamW
        fitted = fit_memory(config, model, loader.epoch(0))
        graphs = add_graphs(model, fitted.cuda_graphs, keeps_gradients=cfg.flat_optimizer)
        # ReduceLROnPlateau drives a factor (1, then cut and cut again) that multiplies the warm-up below.
        factor = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            factor, mode="max", factor=cfg.plateau_factor, patience=cfg.plateau_patience
        )

        def learning_rate(step: int) -> float:
            warmup_steps = round(cfg.warmup_fraction * total_steps)
            ramp = min(1.0, (step + 1) / max(1, warmup_steps))
            if cfg.lr_schedule == "cosine":
                progress = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
                return cfg.lr * ramp * 0.5 * (1.0 + math.cos(math.pi * progress))
            return cfg.lr * ramp * (factor.param_groups[0]["lr"] if cfg.lr_schedule == "plateau" else 1.0)

        # ---------------------------------------------------------------------------------------------- resume
        run = Resumable(config, built, temperature, update, named, plateau, loader)
        torch.manual_seed(cfg.seed + 1_000_003 * (world.rank + 1))  # dropout differs between ranks
        bank: TermBank | None = None
        if checkpoint is not None:
            state, bank = load_checkpoint(store, checkpoint, run)
        dev = Evaluator(
            data.dev or data.test, data.terms, data.seen_terms, data.reader, data.drops, cfg.eval_batch_size, world
        )
        test = dev if data.dev is None else replace(dev, clips=data.test)
        tracker = Tracker(run_dir if world.is_main else None, config, steps_per_epoch, resumed_step=state.step)

        def set_status(name: State, message: str = "") -> None:
            if world.is_main:
                tell_status(run_dir, name, state, message)

        if checkpoint is None:
            if cfg.center_heads:
                center_heads(model, itertools.islice(loader.epoch(0), -(-CENTER_CLIPS // loader.batch_size)))
            state.before = test(model, tokenizer)
            tracker.write(state.before.flat("before/"), state.step)
            logger.info("before training: Recall@10 %.3f over %d terms", state.before.recall(10), len(data.terms))
        check_same_parameters(named)

        # ------------------------------------------------------------------------------------------------ loop
        guard, arriving = NonFiniteGuard(config.distributed.max_nonfinite_steps), ArrivingGradients(named)
        wire_dtype, hash_every = config.distributed.wire_dtype(world.device), config.distributed.parameter_hash_every
        bank_glossary = data.glossary if config.losses.enable_hard_neg and config.losses.hard_neg_weight else None
        schedule = BankSchedule(
            bank_glossary, cfg.refresh_bank_every, cfg.bank_terms, cfg.eval_batch_size, cfg.seed, world
        )
        logger.info(
            "training: %d steps of %d clips on %d process(es), %d steps an epoch, from step %d",
            total_steps, cfg.batch_size, world.world_size, steps_per_epoch, state.step,
        )  # fmt: skip
        set_status("training")
        is_first_step, interval, note = True, Interval(), ""
        is_over = state.is_over(total_steps, cfg.epochs)
        save = partial(save_checkpoint, store, run, state)
        with stop.held(lambda: save(bank)), progress_bar(config.run.progress and world.is_main) as bar:
            task = bar.add_task("training", total=total_steps, completed=state.step, note="")
            while not is_over:
                batches_of_epoch = feed(loader, state.epoch, state.step_in_epoch * cfg.grad_accum_steps, world.device)
                while not state.unmeasured and state.step_in_epoch < steps_per_epoch and state.step < total_steps:
                    bank = schedule.current(bank, model, tokenizer, state.step, state.step_in_epoch)
                    lr = learning_rate(state.step)
                    for group in update.optimizer.param_groups:
                        group["lr"] = lr * group["lr_scale"]
                    update.zero()
                    shares: dict[str, torch.Tensor] = {}
                    for _ in range(cfg.grad_accum_steps):
                        with interval.waiting():
                            batch = next(batches_of_epoch)
                        found, num_clips = add_gradients(
                            model, temperature, batch, config.losses, world, wire_dtype, bank, fitted.clips_per_pass,
                            cfg.grad_accum_steps,
                        )  # fmt: skip
                        for name, value in found.items():
                            shares[name] = shares.get(name, 0.0) + value
                        interval.num_clips += num_clips
                    if is_first_step:
                        check_all_train(arriving)
                        is_first_step = False
                        if graphs is not None:
                            graphs.start()

                    # Sums over ranks, clips and steps, unless loss or norm is not finite. (A NaN on one rank is NaN in
                    # the sums, so all ranks skip.) On a GPU nobody waits for it: what came of a step is read at the
                    # next one, at once only where the host has to wait anyway. Every rank reads the same, and must
                    # take the same way from here.
                    update.apply(state.step, shares, stop.requested, cfg.max_grad_norm)
                    done = state.step + 1
                    is_logged = done % cfg.log_every == 0 or done == total_steps
                    ends_epoch = state.step_in_epoch + 1 == steps_per_epoch or done == total_steps
                    saves = cfg.save_every_steps > 0 and done % cfg.save_every_steps == 0 and not ends_epoch
                    outcomes = update.outcomes(now=is_logged or ends_epoch or saves)
                    for outcome in outcomes:
                        guard.check(outcome.step, loss=outcome.losses["loss"], gradient_norm=outcome.gradient_norm)
                    state.step = done
                    state.step_in_epoch += 1
                    interval.num_steps += 1

                    if is_logged:
                        losses, norm = outcomes[-1].losses, outcomes[-1].gradient_norm
                        numbers = {f"train/{'loss' if k == 'loss' else 'loss_' + k}": v for k, v in losses.items()} | {
                            "train/lr": lr,
                            "train/grad_norm": norm,
                            "train/temperature": 1.0 / float(temperature().detach()),
                            "train/skipped_steps": float(guard.num_skipped),
                            **interval.numbers(),
                            **schedule.numbers(),
                            **({} if graphs is None else {"train/num_graphs": float(graphs.num_captures)}),
                        }
                        tracker.write(numbers, state.step)
                        note = f"loss {losses['loss']:.3f}  {numbers['train/clips_per_s']:.0f} clips/s"
                        logger.info(
                            "step %6d/%d  epoch %6.2f  loss %7.4f  lr %.2e  grad %8.3f  %7.1f clips/s  wait %6.1f ms",
                            state.step, total_steps, state.step / steps_per_epoch, losses["loss"], lr, norm,
                            numbers["train/clips_per_s"], numbers["data/wait_ms"],
                        )  # fmt: skip
                        interval = Interval()
                    bar.update(task, completed=state.step, note=note)
                    if hash_every and state.step % hash_every == 0:
                        check_same_parameters(named)
                    if any(outcome.wants_stop for outcome in outcomes):
                        raise Preempted(agreed=True)
                    if saves:
                        save(bank)

                # ---------------------------------------------------------------------------- end of an epoch
                if state.step_in_epoch == steps_per_epoch:  # else max_steps ended it, and a longer run may go on
                    state.epoch, state.step_in_epoch = state.epoch + 1, 0
                merge_drops(data.drops, world, run_dir / "bad_records.jsonl")
                is_over = state.epoch >= cfg.epochs or state.step >= total_steps
                state.unmeasured = state.epoch % cfg.eval_every == 0 or is_over
                if state.unmeasured:
                    set_status("evaluating")
                    result = dev(model, tokenizer)
                    recall = result.recall(10)
                    tracker.write(result.flat(), state.step)
                    plateau.step(recall)
                    is_best = recall > state.best_recall
                    if is_best:
                        state.best_recall, state.best_step, state.stale_evaluations = recall, state.step, 0
                        save_trained(run_dir, "model_best", run, state, result.flat())
                    else:
                        state.stale_evaluations += 1
                    logger.info(
                        "epoch %.4g: Recall@1/5/10 %.3f/%.3f/%.3f%s",
                        state.step / steps_per_epoch, result.recall(1), result.recall(5), recall,
                        "  best so far" if is_best else f"  (best {state.best_recall:.3f} at step {state.best_step})",
                    )  # fmt: skip
                    if cfg.patience and state.stale_evaluations >= cfg.patience:
                        logger.info("early stop: no better Recall@10 in %d evaluations", state.stale_evaluations)
                        is_over = state.stopped_early = True
                    state.unmeasured, interval = False, Interval()  # clips/s counts training only
                    set_status("training")
                if is_over or state.epoch % cfg.save_every == 0:
                    save(bank)

        # ------------------------------------------------------------------------------------------ final test
        check_same_parameters(named)
        save_trained(run_dir, "model_final", run, state, {})
        if state.best_step != state.step:
            load_trained(run_dir / "model_best", built, config.model)
        measured = test.measure(model, tokenizer)
        after = measured.result()
        tracker.write(after.flat("test/"), state.step)
        tracker.show_result(after.flat("test/"))
        tracker.show_misses(measured.misses(NUM_MISSES), data.reader)
        if config.run.tensorboard:
            shown = test.terms[:MAX_PROJECTED]
            tracker.show_terms(encode_terms(model.eval(), tokenizer, shown, cfg.eval_batch_size, world), shown)
        if world.is_main:
            show_test(state.before, measured, run_dir, config.run.show_examples)
        set_status("finished", f"Recall@10 {after.recall(10):.4f} with the model of step {state.best_step}")
        if world.is_main:
            write_run_report(run_dir, measured, data.train, data.reader, data.drops, str(world.device))
        return 0
    except Preempted:
        stop.only_note()
        known = watch.gone()
        if is_ours and watch.speaks():
            tell_status(run_dir, "preempted", state, f"{known}go on with --run_name {run_dir.name} --resume auto")
            logger.warning("stopped by a signal at step %d", state.step)
        return 0
    except BaseException as error:
        stop.only_note()
        reason = redact(f"{type(error).__name__}: {error}")[:2000]
        known = watch.last_words(error, reason)
        if is_ours and watch.speaks():
            reason += f" ({known})" if known else ""
            logger.error("failed at step %d: %s", state.step, reason)
            tell_status(run_dir, "failed", state, reason)
        raise
    finally:
        if tracker is not None:
            tracker.close()
        lock.release()
        processes.stop()
        stop.restore()


def main() -> int:
    return run_program("bin/train.py", lambda: train(parse(quiet=os.environ.get("RANK", "0") != "0")))


if __name__ == "__main__":
    sys.exit(main())
