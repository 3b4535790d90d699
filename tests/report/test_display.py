"""What people read while a study runs: an honest forecast, one line an epoch."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from harness.config.events import (
    Completed,
    Diverged,
    EpochEnded,
    EpochResult,
    Failed,
    Metrics,
    Pruned,
    Reached,
    TrialEnded,
    TrialOutcome,
    TrialStarted,
)
from harness.config.study import Study
from harness.config.train import FinalConfig
from harness.final.test_set import summary
from harness.report.display import Display, StudyConsole, forecast, side_by_side
from harness.report.overview import finished_of
from harness.store.store import Store
from tests.analytic import NOT_COMPARED, epoch_result, memory_store
from tests.conftest import make_study

ALONE = FinalConfig(seeds=3, fit_on="train", compare_base=False)
STUDY = make_study("cache", trials=10, final=ALONE)  # two epochs


@pytest.fixture
def store() -> Store:
    return memory_store(STUDY)


# -- the estimate --------------------------------------------------------------------------------------------------


def seconds_left(study: Study, finished: int, epoch: float, trial: float | None, ratio: float) -> float:
    """Before the final run has begun."""
    display = Display(study, memory_store(study), Console(file=io.StringIO()))
    display._finished, display._epoch_seconds, display._final_ratio = finished, [epoch], ratio
    display._trial_seconds = [] if trial is None else [trial]
    left = display._left()
    assert left is not None
    return left


def test_the_estimate_adds_the_trials_left_and_the_final_run() -> None:
    # 10 trials of 2 epochs of 3 s, and 3 seeds of 2 epochs.
    assert seconds_left(STUDY, 0, 3.0, None, 1.0) == 10 * 2 * 3.0 + 3 * 2 * 3.0
    assert seconds_left(STUDY, 4, 3.0, None, 1.0) == 6 * 2 * 3.0 + 3 * 2 * 3.0


def test_the_estimate_prefers_measured_trials_for_pruning_shortens_them() -> None:
    assert seconds_left(STUDY, 4, 3.0, 4.0, 1.0) == 6 * 4.0 + 3 * 2 * 3.0


def test_the_final_run_takes_longer_when_it_trains_on_the_validation_images_too() -> None:
    assert seconds_left(STUDY, 10, 3.0, None, 1.5) == 1.5 * seconds_left(STUDY, 10, 3.0, None, 1.0)
    assert seconds_left(STUDY, 4, 3.0, None, 1.5) == 6 * 2 * 3.0 + 1.5 * 3 * 2 * 3.0


def test_the_estimate_counts_the_base_and_the_second_look_at_the_best() -> None:
    every = make_study("cache", trials=10, final=FinalConfig(seeds=3, rerank=2))
    assert seconds_left(every, 10, 3.0, None, 1.0) == (3 + 3 + 2 * 3) * 2 * 3.0


def test_hours_bound_the_estimate_of_the_search_and_not_of_the_final_run(store: Store) -> None:
    endless = make_study("cache", trials=10_000, final=ALONE, hours=0.01)
    store.tell(store.ask(endless), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 4.0)
    left = Display(endless, store, Console(file=io.StringIO()))._left()
    after = 3 * 2 * 1.0  # its epochs take a second each
    assert left == pytest.approx(36.0 - 4.0 - after + after)


def test_the_estimate_is_never_negative() -> None:
    assert seconds_left(STUDY, 99, 3.0, None, 1.0) == 3 * 2 * 3.0


def test_workers_take_the_next_training_as_they_become_free() -> None:
    assert side_by_side([3.0, 1.0, 1.0, 1.0, 2.0], 1) == 8.0
    assert side_by_side([3.0, 1.0, 1.0, 1.0, 2.0], 2) == 5.0  # 3 and 2, beside 1, 1 and 1
    assert side_by_side([3.0], 4) == 3.0
    assert side_by_side([], 4) == 0.0


def test_the_last_training_takes_its_time_however_many_workers_there_are(store: Store) -> None:
    study = make_study("cache", trials=1, final=FinalConfig(seeds=3, fit_on="train", compare_base=False))
    store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 1.0)
    display = Display(study, store, Console(file=io.StringIO()), workers=2)
    assert display._left() == 2.0, "the third seed waits for the first"
    for number in (0, 1):
        display.show(started(f"final seed {number}", number))
    for epoch in (1, 2):
        display.show(EpochEnded(key=None, name="final seed 1", number=1, result=epoch_result(epoch, 0.5)))
    display.show(started("final seed 2", 2))
    assert display._left() == 1.0, "the two that are left go side by side"
    for epoch in (1, 2):
        display.show(EpochEnded(key=None, name="final seed 0", number=0, result=epoch_result(epoch, 0.5)))
    assert display._left() == 1.0
    display.show(EpochEnded(key=None, name="final seed 2", number=2, result=epoch_result(1, 0.5)))
    assert display._left() == 0.5


def test_a_study_that_was_tested_has_only_its_trials_left(store: Store) -> None:
    study = make_study("cache", trials=3, final=ALONE)
    store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 1.0)
    assert Display(study, store, Console(file=io.StringIO()))._left() == 2 * 1.0 + 3 * 1.0
    seeds = [{"seed": 0, "correct": 5, "total": 8, "accuracy": 0.625, "loss": 1.0, "weights": "", "epochs": []}]
    store.set_attribute("final", summary(seeds) | {"trial": 0, "fit_on": "train", "test_openings": 1} | NOT_COMPARED)
    assert Display(study, store, Console(file=io.StringIO()))._left() == 2 * 1.0


def test_second_looks_at_the_best_are_counted_as_they_end(store: Store) -> None:
    study = make_study("cache", trials=2, final=FinalConfig(seeds=2, rerank=2, fit_on="train", compare_base=False))
    for _ in range(2):
        store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 1.0)
    display = Display(study, store, Console(file=io.StringIO()))
    left = [display._left()]
    for trial, number in ((0, 0), (0, 1), (1, 0), (1, 1)):
        name = f"rerank seed {number} of trial {trial}"
        display.show(started(name, number))
        for epoch in (1, 2):
            display.show(EpochEnded(key=None, name=name, number=number, result=epoch_result(epoch, 0.5)))
        left.append(display._left())
    assert left == [6.0, 5.0, 4.0, 3.0, 2.0]


def test_a_forecast_of_more_than_a_day_says_so_and_what_helps() -> None:
    text = forecast(4000.0, 100_000.0, pruning_known=False)
    assert "An epoch takes 1 h 7 min here: about 1.2 days left, without pruning." in text
    assert "more than a day" in text
    assert "--set epochs=" in text
    assert "--trials" in text


def test_a_forecast_of_less_than_a_day_does_not() -> None:
    assert forecast(3.0, 78.0, pruning_known=True) == "An epoch takes 3.0 s here: about 1 min 18 s left."


def started(name: str, number: int, **changes: Any) -> TrialStarted:
    plain = TrialStarted(
        key=None,
        kind="trial",
        name=name,
        number=number,
        trial=number,
        params={},
        epochs=2,
        resumed=False,
        groups=None,
        progress=Reached(epoch=1, step=0, steps=1, epochs=[]),
    )
    return replace(plain, **changes)


def rendered(display: Display) -> str:
    """What stands at the bottom of a terminal."""
    with display._console.capture() as captured:
        display._console.print(display._render())
    return captured.get()


# -- without a terminal --------------------------------------------------------------------------------------------


def shown(study: Study, store: Store, outcomes: list[TrialOutcome], terminal: bool = False) -> str:
    """What is printed while one trial an outcome runs."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Display(study, store, console) as display:
        for outcome in outcomes:
            asked = store.ask(study)
            name = f"trial {asked.number}"
            display.show(started(name, asked.number, params=asked.params, progress=Progress()))
            results = [epoch_result(epoch, 0.3 * epoch) for epoch in (1, 2)]
            for result in results:
                store.report(asked, result.epoch, 0.3 * result.epoch)
                display.show(EpochEnded(key=None, name=name, number=asked.number, result=result))
            store.tell(asked, outcome, results, seconds=1.0)
            display.show(TrialEnded(key=name, number=asked.number, params=asked.params, outcome=outcome))
    return out.getvalue()


class Progress:
    epoch, step, steps = 1, 3, 10
    epochs: tuple[EpochResult, ...] = ()


def test_elsewhere_than_in_a_terminal_there_is_one_line_an_epoch_and_one_a_trial(store: Store) -> None:
    lines = shown(STUDY, store, [Completed(value=0.6), Completed(value=0.5)]).splitlines()
    epochs = [line for line in lines if "  epoch " in line]
    assert [line.split("  loss")[0] for line in epochs] == [
        "trial 0  epoch 1/2",
        "trial 0  epoch 2/2",
        "trial 1  epoch 1/2",
        "trial 1  epoch 2/2",
    ]
    assert "val 30.00%" in epochs[0]
    trials = [line for line in lines if "complete" in line]
    assert len(trials) == 2
    assert trials[0].startswith("trial 0")
    assert "val 60.00%" in trials[0]
    assert "  dropout = 0.1, hidden = 16, base_lr = 0.001, depth_lr_mult = 0.5  " in trials[0]
    assert len(lines) == 4 + 2 + 1  # and the forecast
    assert all("\x1b" not in line for line in lines)


def test_the_forecast_comes_once_after_the_first_epoch(store: Store) -> None:
    lines = shown(STUDY, store, [Completed(value=0.6), Completed(value=0.5)]).splitlines()
    assert [number for number, line in enumerate(lines) if line.startswith("An epoch takes")] == [1]


def test_the_epoch_that_compiles_is_not_in_the_forecast(store: Store) -> None:
    store.set_attribute("runtime", {"compile": True})
    lines = shown(STUDY, store, [Completed(value=0.6), Completed(value=0.5)]).splitlines()
    assert [number for number, line in enumerate(lines) if line.startswith("An epoch takes")] == [2]


def test_a_resumed_study_knows_what_is_left_from_the_trials_before(store: Store) -> None:
    for outcome in (Completed(value=0.6), Pruned(epoch=1), Completed(value=0.5), Pruned(epoch=1)):
        asked = store.ask(STUDY)
        ran = 1 if isinstance(outcome, Pruned) else 2
        store.tell(
            asked, outcome, [replace(epoch_result(epoch + 1, 0.3), seconds=10.0) for epoch in range(ran)], 10.0 * ran
        )
    display = Display(STUDY, store, Console(file=io.StringIO()))
    assert display._left() == 6 * 15.0 + 3 * 2 * 10.0  # before it has trained anything
    progress = Progress()
    progress.epochs = (replace(epoch_result(1, 0.3), seconds=9.0),)
    display.show(started("trial 4", 4, resumed=True, progress=progress))
    assert display._left() == 6 * 15.0 + 3 * 2 * 10.0 - 9.0
    text = shown(STUDY, store, [Completed(value=0.6)])
    assert "An epoch takes 0.5 s here: about 2 min" in text
    assert "without pruning" not in text


def test_what_is_left_shrinks_in_the_final_run(store: Store) -> None:
    study = make_study("cache", trials=2, final=FinalConfig(seeds=3, fit_on="train", compare_base=True))
    for value in (0.5, 0.6):
        store.tell(store.ask(study), Completed(value=value), [epoch_result(1, 0.3), epoch_result(2, value)], 1.0)
    display = Display(study, store, Console(file=io.StringIO()))
    left = []
    for name, number in (("final seed 0", 0), ("final seed 2", 2), ("base seed 0", 0), ("base seed 2", 2)):
        display.show(started(name, number))
        left.append(display._left())
        for epoch in (1, 2):
            display.show(EpochEnded(key=None, name=name, number=number, result=epoch_result(epoch, 0.5)))
            if epoch == 1:
                left.append(display._left())
    assert left == [6.0, 5.5, 4.0, 3.5, 3.0, 2.5, 1.0, 0.5]
    assert display._left() == 0.0


def test_where_the_base_is_the_chosen_one_it_is_not_trained_again(store: Store) -> None:
    study = make_study("cache", trials=2, final=FinalConfig(seeds=3, fit_on="train", compare_base=True))
    for value in (0.6, 0.5):
        store.tell(store.ask(study), Completed(value=value), [epoch_result(1, 0.3), epoch_result(2, value)], 1.0)
    display = Display(study, store, Console(file=io.StringIO()))
    assert display._left() == 6.0  # it is not chosen yet
    display.show(started("final seed 2", 2))
    assert display._left() == 1.0


def test_where_only_the_base_is_tried_no_other_is_expected(store: Store) -> None:
    study = make_study("cache", trials=1, final=FinalConfig(seeds=3, fit_on="train", compare_base=True))
    store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 1.0)
    assert Display(study, store, Console(file=io.StringIO()))._left() == 3.0


def test_several_trials_under_way_share_the_time_that_is_left(store: Store) -> None:
    study = make_study("cache", trials=4, final=FinalConfig(seeds=1, fit_on="train", compare_base=False))
    out = io.StringIO()
    alone, both = (Display(study, store, Console(file=out), workers=count) for count in (1, 2))
    for display in (alone, both):
        for number in (0, 1):
            name = f"trial {number}"
            display.show(started(name, number))
            display.show(EpochEnded(key=None, name=name, number=number, result=epoch_result(1, 0.5)))
    assert alone._left() == 0.5 + 0.5 + 1.0 + 1.0 + 1.0  # two half trials, two trials, the seed
    assert both._left() == 1.5 + 1.0  # nobody helps with the only seed
    assert "trial 0  epoch 1/2" in out.getvalue()
    assert "trial 1  epoch 1/2" in out.getvalue()


def test_a_price_shows_what_is_spent_and_what_the_rest_costs(store: Store) -> None:
    study = make_study("cache", trials=4, final=FinalConfig(seeds=1, fit_on="train", compare_base=False))
    store.set_attribute("price", 3600.0)  # 1 a second
    store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 1.5)
    out = io.StringIO()
    display = Display(study, store, Console(file=out), workers=2)
    for number in (1, 2):
        display.show(started(f"trial {number}", number))
        display.show(EpochEnded(key=None, name=f"trial {number}", number=number, result=epoch_result(1, 0.5)))
    # After the first epoch: 1.0 and 1.5 of the trials under way, 1.5 of the last one, 1.0 of the seed.
    assert "about 3.5 s left, for about 5.00 at 3,600.00 per hour." in out.getvalue()
    assert display._spent() == 1.5 + 0.5 + 0.5
    assert "spent 2.50" in rendered(display)
    display.show(started("final seed 0", 0))
    display.show(EpochEnded(key=None, name="final seed 0", number=0, result=epoch_result(1, 0.5)))
    assert display._spent() == 3.0
    store.set_attribute("price", None)
    assert "spent" not in rendered(Display(study, store, Console(file=out)))


def test_the_best_trial_so_far_is_marked(store: Store) -> None:
    lines = shown(STUDY, store, [Completed(value=0.5), Completed(value=0.4), Completed(value=0.6)]).splitlines()
    assert [("best so far" in line) for line in lines if "complete" in line] == [True, False, True]


def test_every_outcome_has_its_words(store: Store) -> None:
    failed = Failed(reason="RuntimeError: out of memory", traceback="")
    text = shown(STUDY, store, [Pruned(epoch=1), Diverged(epoch=2, step=7, lr=0.5, grad_norm=31.4), failed])
    assert "pruned after epoch 1" in text
    assert (
        "diverged: loss or gradient not finite at step 7 of epoch 2, learning rate 0.5, gradient norm up to 31.4"
        in text
    )
    assert "failed: RuntimeError: out of memory" in text


def test_an_epoch_without_validation_shows_the_training_accuracy(store: Store) -> None:
    out = io.StringIO()
    result = replace(epoch_result(1, 0.5), val=None, train=Metrics(loss=1.0, correct=1, total=4))
    with Display(STUDY, store, Console(file=out)) as display:
        display.show(EpochEnded(key=None, name="final seed 0", number=0, result=result))
    assert "final seed 0  epoch 1/2  loss 1.000  train 25.00%" in out.getvalue()


def test_a_resumed_trial_says_that_it_starts_again(store: Store) -> None:
    out = io.StringIO()
    with Display(STUDY, store, Console(file=out)) as display:
        display.show(started("trial 4", 4, resumed=True, progress=Progress()))
    assert "trial 4 was interrupted" in out.getvalue()


def test_in_a_terminal_trials_are_printed_and_epochs_are_not(store: Store) -> None:
    text = shown(STUDY, store, [Completed(value=0.6)], terminal=True)
    assert "complete" in text
    assert "trial 0  epoch 1/2" not in text


def test_a_dumb_terminal_gets_lines(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "trial 0  epoch 1/2" in shown(STUDY, store, [Completed(value=0.6)], terminal=True)


@pytest.mark.parametrize("width", [40, 80])
def test_in_a_terminal_of_any_width_every_worker_has_one_line(store: Store, width: int) -> None:
    display = Display(STUDY, store, Console(file=io.StringIO(), width=width), workers=8)
    for number in range(8):
        display.show(started(f"final seed {number}", number))
    lines = rendered(display).splitlines()
    assert len(lines) == 1 + 8 + 1
    assert max(map(len, lines)) <= width
    assert all("epoch 1/2" in line for line in lines[1:9])


def test_a_study_with_more_trials_than_asked_for_says_a_count_that_can_be(store: Store) -> None:
    study = make_study("cache", trials=1, final=ALONE)
    shown(STUDY, store, [Completed(value=0.6), Completed(value=0.5)])
    assert "2/2 trials" in rendered(Display(study, store, Console(file=io.StringIO(), width=80)))
    assert finished_of(2, 1) == "2 trials finished (asked for: 1)"
    assert finished_of(1, 2) == "1 of 2 trials finished"


def test_what_is_going_on_is_said_before_the_first_epoch_and_after_the_last(store: Store) -> None:
    study = make_study("cache", trials=1, final=FinalConfig(seeds=1, fit_on="train", compare_base=False))
    display = Display(study, store, Console(file=io.StringIO()), workers=2)
    assert "The workers are starting" in rendered(display)
    display.show(started("trial 0", 0))
    assert rendered(display).splitlines()[-1] == "best none yet   time left …"
    store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.3), epoch_result(2, 0.6)], 1.0)
    display.show(TrialEnded(key="trial-0", number=0, params={}, outcome=Completed(value=0.6)))
    assert "time left 1.0 s" in rendered(display)
    display.show(started("final seed 0", 0))
    display.show(EpochEnded(key=None, name="final seed 0", number=0, result=epoch_result(2, 0.6)))
    assert rendered(display).splitlines()[-1] == "best 60.00% (trial 0)   nearly done"


def test_in_a_terminal_lines_are_not_cut_inside_words(store: Store) -> None:
    out = io.StringIO()
    display = Display(STUDY, store, Console(file=out, force_terminal=True, width=30))
    display._say("trial 0 complete dropout = 0.1234 hidden = 128-64")
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "trial 0 complete dropout =",
        "0.1234 hidden = 128-64",
    ]


def test_brackets_in_a_trials_error_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    StudyConsole().print("failed: RuntimeError: no file [/tmp/x] in [red]box[/red]")
    assert "no file [/tmp/x] in [red]box[/red]" in capsys.readouterr().out
