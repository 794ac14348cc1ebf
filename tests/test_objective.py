"""How far a training moved its objective: against values and gradients by hand, and what the reports say of it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.metrics.metric import from_dict, mean_metric
from surgery.objective import Moved, Term, ask
from surgery.runs.mechanism import objective, own_part
from surgery.runs.paired import differences, without_samples
from surgery.training import Plan, train, trainable

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


class Line(nn.Module):
    """y = w x, with dropout that would make every loss random."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) @ self.w


def terms(module: nn.Module, rows: Any) -> dict[str, torch.Tensor]:
    y = module(X[list(rows)])
    return {"fit": 2 * (y - 1).square(), "keep": 0.001 * y.square()}


def means(line: Line) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(each.mean()) for name, each in terms(line.eval(), [0, 1, 2]).items()}


def test_values_and_gradients_are_those_by_hand() -> None:
    line = Line().train()
    found = ask(line, {"w": line.w}, terms, [[0, 1], [2]])
    y = X @ line.w.detach()
    np.testing.assert_allclose(found.values["fit"], 2 * (y - 1) ** 2, rtol=1e-6)
    by_hand = {"fit": (4 * (y - 1) @ X / 3).norm(), "keep": (0.002 * y @ X / 3).norm()}
    assert found.gradients == pytest.approx({name: float(norm) for name, norm in by_hand.items()}, rel=1e-5)
    assert line.w.grad is None


def test_a_training_says_how_far_it_moved_on_the_same_examples() -> None:
    line = Line()
    logged: list[Any] = []
    with trainable(line, ["w"]) as parameters:
        losses, far = train(line, parameters, terms, 3, Plan(0.1, 20, 2, dropout=True), seed=0, log=logged.append)
        now = means(line)
    was = means(line)
    assert len(losses) == 40 and far.examples == 3
    assert {name: term.before for name, term in far.terms.items()} == pytest.approx(was)
    assert {name: term.after for name, term in far.terms.items()} == pytest.approx(now)
    assert far.before == pytest.approx(sum(was.values())) and far.after == pytest.approx(sum(now.values()))
    assert 0.3 < far.share <= 1 and Moved.from_dict(far.to_dict()) == far


def test_what_is_learnt_is_the_mean_of_the_last_steps() -> None:
    def learnt(average: float) -> tuple[list[list[float]], list[float], float, float]:
        line, steps = Line(), []

        def look(step: int, optimizer: Any) -> bool:
            steps.append(line.w.detach().clone())
            return False

        with trainable(line, ["w"]) as parameters:
            _, far = train(line, parameters, terms, 3, Plan(0.3, 3, 2, average=average), seed=0, after=look)
            return torch.stack(steps).tolist(), line.w.tolist(), far.after, sum(means(line).values())

    steps, last, *_ = learnt(0.0)
    assert len(steps) == 6 and last == steps[-1]
    for average, count in ((0.4, 3), (1.0, 6), (0.01, 1)):  # of six steps, rounded up
        same, mean, after, now = learnt(average)
        assert same == steps  # the way there is the same
        np.testing.assert_allclose(mean, np.mean(steps[-count:], axis=0), rtol=1e-6)
        assert after == pytest.approx(now)  # the objective is asked of the mean


def test_a_long_gradient_is_shortened_and_keeps_its_direction() -> None:
    def gradients(clip: float) -> torch.Tensor:
        line, found = Line(), []

        def look(step: int, optimizer: Any) -> bool:
            found.append(line.w.grad.clone())
            return True

        with trainable(line, ["w"]) as parameters:
            train(line, parameters, terms, 3, Plan(0.3, 1, 3, clip=clip), seed=0, after=look)
        return found[0]

    free = gradients(0.0)
    norm = float(free.norm())
    assert norm > 0 and torch.equal(gradients(2 * norm), free)
    torch.testing.assert_close(gradients(norm / 4), free / 4)


def test_one_example_has_no_interval_and_goes_into_json() -> None:
    line = Line()
    with trainable(line, ["w"]) as parameters:
        _, far = train(line, parameters, terms, 1, Plan(0.1, 4, 2), seed=0)
    assert (far.low, far.high, far.examples) == (None, None, 1)
    read = json.loads(json.dumps(far.to_dict(), allow_nan=False))
    assert "which so few examples do not tell from none" in next(objective(read))


def test_an_objective_without_a_gradient_is_refused_before_the_first_step() -> None:
    line = Line()
    nothing = lambda module, rows: {"forget": 0 * module(X[list(rows)]), "keep": torch.zeros(len(rows))}  # noqa: E731
    with (
        trainable(line, ["w"]) as parameters,
        pytest.raises(SurgeryError, match=r"\(forget, keep\) has no gradient in any of the 1 trained .* above 0"),
    ):
        train(line, parameters, nothing, 3, Plan(0.1, 1, 2), seed=0, log=lambda _: pytest.fail("stepped"))


def test_steps_too_few_to_move_the_loss_are_said() -> None:
    line = Line()
    with trainable(line, ["w"]) as parameters:
        _, far = train(line, parameters, terms, 3, Plan(1e-5, 1, 3), seed=0)
    (first, *_) = objective(far.to_dict())
    assert first.startswith("Warning: the objective moved by 0.0% only: ") and "more steps" in first


def test_a_term_that_has_no_say_is_said() -> None:
    def of(loud: tuple[float, float], faint: tuple[float, float]) -> list[str]:
        each = {"forget": Term(2, 1, *loud), "retain": Term(1, 1, *faint)}
        return list(objective(Moved(3.0, 2.0, -1.2, -0.8, 32, each).to_dict()))

    assert "fell by 33%" in of((1, 1), (1, 1))[0] and "gradient of" not in "".join(of((1, 1), (1, 1)))
    assert "the gradient of forget is 32 times that of retain before" in of((32.0, 30.0), (1.0, 1.0))[-1]
    # A hold has no gradient where nothing has moved; what counts is whether it has one in the end.
    assert len(of((32.0, 30.0), (0.0, 5.0))) == 3
    assert "all, none being that of retain before" in of((32.0, 30.0), (0.0, 0.0))[-1]


def test_few_examples_are_no_small_effect_and_a_term_that_was_not_asked_is_no_silent_one() -> None:
    terms = {"words": Term(0.33, 0.05, 3.0, 0.2), "texts": Term(0.0, 0.0, 0.0, 0.0)}
    said = list(objective(Moved(0.33, 0.05, -0.57, 0.01, 32, terms).to_dict()))
    assert said[0].startswith("The objective fell by 85%") and said[0].endswith(
        "so few examples do not tell from none."
    )
    assert said[-1] == "None of the examples asked belongs to texts: its say is not known."
    assert not any(line.startswith("Warning") for line in said)


def test_what_is_read_again_is_paired_as_it_was_and_leaves_no_samples_behind() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    say: Any = {"scorer": "s", "data": "d", "ideal": 0.0, "direction": "lower"}

    def scores(shift: float) -> dict[str, Any]:
        metric = mean_metric(values + shift + 0.01 * rng.normal(size=40), **say)
        assert from_dict(metric.to_dict(samples=True)).samples == pytest.approx(metric.samples, abs=1e-6)
        return {"gas": {"gas": metric.to_dict(samples=True)}, "skipped": ["row 1"]}

    summary: dict[str, Any] = {
        "before": scores(0.0),
        "after": scores(-0.1),
        "controls": {"off": {"after": scores(0.2)}},
    }
    found = differences(summary)
    assert found["off"]["gas.gas"]["value"] == pytest.approx(-0.3, abs=0.01)
    assert found["off"]["gas.gas"]["high"] < -0.28  # each value alone is known to about 0.3
    assert found["before"]["gas.gas"]["verdict"] == "better"
    bare = without_samples(summary | {"differences": found})
    assert (
        "samples" not in str(bare) and bare["after"]["gas"]["gas"]["value"] == summary["after"]["gas"]["gas"]["value"]
    )
    own = {"part": "the module", "without": "off", "metrics": ["gas.gas", "absent"]}
    (line,) = own_part(bare | {"own_part": own})
    assert line.startswith("What the module does itself (control off): gas gas ") and "better" in line
