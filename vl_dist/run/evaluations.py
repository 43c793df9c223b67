"""When held-out records are evaluated while training, and what becomes of it.

A request to stop does not wait for an evaluation, which ends between two batches on all ranks and is made when the run
goes on.
"""

from collections.abc import Callable

from vl_dist.evaluate.held_out import evaluate, write_samples
from vl_dist.run.interrupt import StopRequest
from vl_dist.run.metrics import scores_of
from vl_dist.run.prepare import Run


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every_steps is not None and step % every_steps == 0


def is_evaluated(run: Run, step: int) -> bool:
    """Whether the held-out records, if there are any, are evaluated after this step."""
    ends = (0, run.plan.num_steps)
    return run.data.held_out is not None and (step in ends or is_due(step, run.config.eval.every_steps))


def evaluate_what_is_missing(run: Run, stop: StopRequest) -> bool:
    """Before the first step: the evaluation that is due there, or that a request to stop cut short (all ranks).

    Returns:
        False where such a request came again.
    """
    step = run.first_step
    if not is_evaluated(run, step):
        return True
    row = run.ranks.on_main(lambda: run.record.row(step))
    if (row is None and step > 0) or (row is not None and scores_of(row)):
        return True
    # Signals and STOP do cut it, a time limit does not: one that is shorter would keep the run from ever making a step.
    scores = evaluate_now(run, step, lambda: stop.reason is not None)
    if scores is None:
        return False
    whole = (row or {"step": step, "epoch": run.first_epoch}) | scores
    run.record.complete(whole)
    run.tracking.log({"step": step} | scores if row is not None else whole)
    if step > 0 and run.ranks.any(run.best.improves(whole)):
        run.tracking.adapter(run.best.move(whole), step, ("best",))
    return True


def evaluate_now(run: Run, step: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
    """The scores of the held-out records; None if a rank was to stop meanwhile (all ranks)."""
    assert run.data.held_out is not None
    with run.engine.whole_model(), run.console.captioning() as show:

        def on_progress(done: int, total: int) -> None:
            run.watch.doing(f"captioning after step {step}, {done} of {total}")
            show(done, total)

        evaluation = evaluate(
            run.model,
            run.data.held_out,
            run.ranks,
            run.config.eval,
            tokenizer=run.processor.tokenizer,
            max_tokens=run.config.batch.max_tokens_per_pack,
            frequency=run.frequency,
            on_progress=on_progress,
            stopping=stopping,
        )
    if evaluation is None:
        return None
    if run.ranks.is_main:
        write_samples(run.config.run.output_dir / "samples", step, evaluation.samples)
    run.tracking.samples(step, evaluation.samples)
    run.console.evaluation(f"held-out captions after step {step}", evaluation)
    return evaluation.scores
