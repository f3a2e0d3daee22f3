"""Records of measurements on a model, edited or not; an edit's report is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

COMMON = 0.25
"""Share of a text's predictions from which on the behaviour's answers are not told apart from other tokens."""


@dataclass(frozen=True)
class Score:
    """The behaviour on one group of prompts."""

    n: int
    """Number of prompts."""
    metric: float
    """Mean of `EditReport.metric`."""
    accuracy: float | None
    """Share of prompts with the right answer ahead of the wrong one; without pairs, ahead of all tokens. None where
    prompts have no answers, for probes.
    """


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of the model, edited or not."""

    overall: Score
    """On all prompts."""
    by_case: dict[str, Score] = field(default_factory=dict)
    """On the prompts of each case, where there are several."""
    ce: float | None = None
    """Cross-entropy on other text, nats a token; None where no text was given."""

    ce_behaviour: float | None = None
    """The same at predictions of the behaviour's answers alone; None where the text has none."""
    ce_elsewhere: float | None = None
    """The same at all other predictions."""
    kl: float | None = None
    """Divergence of the predictions on other text from those of the model as it is, nats a token."""

    @property
    def size(self) -> float:
        """Mean over cases of |metric|, each case weighing alike; the metric itself where there are no cases."""
        scores = self.by_case.values()
        return sum(abs(score.metric) for score in scores) / len(scores) if scores else self.overall.metric

    @property
    def mean(self) -> float:
        """Mean over cases of the metric, each case weighing alike."""
        scores = self.by_case.values()
        return sum(score.metric for score in scores) / len(scores) if scores else self.overall.metric


@dataclass(frozen=True)
class Continuation:
    """A prompt with its continuations before and after the edit."""

    prompt: str
    """The prompt."""
    before: str
    """Greedy continuation of the model as it is."""
    after: str
    """Greedy continuation of the edited model."""


@dataclass(frozen=True)
class Dose:
    """The edit at another strength."""

    scale: float
    """What the changes are multiplied by."""
    behaviour: Behaviour
    """The model under that edit."""


@dataclass(frozen=True)
class Bias:
    """To which side the answers lean: the mean over cases of the logit difference, towards the answers of one side."""

    towards: list[str]
    """The cases whose answers it leans to after the edit."""
    before: float
    """Bias of the model as it is, 0 where it leans to neither."""
    after: float
    """Bias of the edited model; as large as the behaviour itself where it gives the same answers in all cases."""


@dataclass(frozen=True)
class Fluency:
    """How good the continuations are as text."""

    perplexity: float | None
    """Perplexity of the continuations under the model as it is."""
    repetition: float
    """Share of their three tokens in a row that occurred before in the same continuation."""


@dataclass(frozen=True)
class Step:
    """A step of choosing features: which was added or dropped, and how the set stands after it, on training prompts."""

    added: list[str]
    """Features that were added."""
    dropped: list[str]
    """Features that were dropped."""
    left: float
    """Share of the behaviour that is left, the root mean square over cases."""
    ce_elsewhere: float
    """Cost of the set at predictions that are none of the behaviour's, nats a token."""
    strength: float = 1.0
    """Strength of the edit."""


@dataclass(frozen=True)
class Choice:
    """How features were chosen."""

    features: list[str]
    """The features that were chosen."""
    steps: list[Step]
    """How they were chosen."""
    penalty: float
    """Weight of a nat elsewhere against all of the behaviour."""
    n_candidates: int
    """Features that were tried."""
    n_trials: int
    """Sets that were measured."""
    seconds: float
    """How long it took."""
    cheap: Step | None = None
    """What features before the dearest of the choice can do at little cost; None where that is nothing."""
    dearest: str | None = None
    """The chosen feature that costs most elsewhere by itself."""


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of what an edit leaves, by drawing the prompts anew."""

    drawn: str
    """The units that were drawn, such as `200 prompts drawn by their 17 templates`."""
    remaining: tuple[float, float] | None = None
    """Interval of the mean size over cases."""
    by_case: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Interval of each case."""
