"""Sparse probing (Gurnee et al. 2023; SAEBench): how well do the k best features of a class tell it from the others?

For each class, texts of it and as many of the others:
1. rank features by |mean activation on the class − mean activation elsewhere|, on the texts to learn from;
2. logistic regression on the activations of the first k;
3. accuracy, and area under the ROC curve, on as many test texts of the class as of others.

A classifier of two classes is one probe. Beside it: the same with the k best coordinates of x, and a probe of all of x.

Shapes: B texts, d model width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.debiasing.probing import Pooled, interval
from circuits.debiasing.targeted import against_others
from circuits.metrics.fit_probe import regress
from circuits.prompts.alignment import numbered


@dataclass(frozen=True)
class Probing:
    """Sparse probes of k features, mean over the classes."""

    data: str
    """Data set."""
    site: str
    """Site."""
    k: int
    """Features that a probe reads."""
    accuracy: float
    """Share of test texts it is right on, as many of the class as of others."""
    interval: tuple[float, float]
    """95 % interval over test texts."""
    auc: float
    """Area under the ROC curve."""
    coordinates: float
    """Accuracy of a probe of the k best coordinates of the activation."""
    dense: float
    """Accuracy of a probe of all coordinates of the activation."""
    by_class: dict[str, float]
    """Accuracy by class."""
    features: dict[str, list[int]]
    """The features of each class, best first."""


def by_difference(f: Tensor, is_one: Tensor) -> Tensor:
    """[F] features by |mean on the class − mean elsewhere|, most first; f [B, F], is_one [B] bool."""
    return (f[is_one].mean(0) - f[~is_one].mean(0)).abs().argsort(descending=True)


@dataclass(frozen=True)
class _Task:
    """Telling one class from the others."""

    train: Tensor  # [n] rows
    train_is: Tensor  # [n] bool
    test: Tensor  # [m] rows
    test_is: Tensor  # [m] bool


def sparse_probing(
    data: str, site: str, train: Pooled, labels: Sequence[str], test: Pooled, test_labels: Sequence[str], *,
    sizes: Sequence[int], penalty: float = 1.0, seed: int = 0, test_texts: Sequence[str] = (),
) -> list[Probing]:  # fmt: skip
    """Sparse probes of each of some sizes; labels: the class of each text to learn from and to test on; test_texts: the
    latter themselves, all different by default.
    """
    texts = numbered(test_texts or range(len(test_labels)))
    classes = sorted(set(labels))
    asked = classes[1:] if len(classes) == 2 else classes
    tasks = {one: _task(labels, test_labels, one, seed) for one in asked}
    orders = {one: by_difference(train.f[task.train], task.train_is) for one, task in tasks.items()}
    of_x = {one: by_difference(train.x[task.train], task.train_is) for one, task in tasks.items()}
    dense = {one: _dense(task, train.x, test.x, penalty) for one, task in tasks.items()}
    results = []
    for k in sizes:
        right, auc = {}, {}
        for one, task in tasks.items():
            right[one], auc[one] = _sparse(task, train.f, test.f, orders[one][:k], penalty)
        few = {one: _sparse(task, train.x, test.x, of_x[one][:k], penalty)[0] for one, task in tasks.items()}
        accuracy, bounds = _mean(right, tasks, texts)
        results.append(
            Probing(
                data, site, k, accuracy, bounds, sum(auc.values()) / len(auc),
                _mean(few, tasks, texts)[0], _mean(dense, tasks, texts)[0],
                {one: values.mean().item() for one, values in right.items()},
                {one: order[:k].tolist() for one, order in orders.items()},
            )
        )  # fmt: skip
    return results


def _task(labels: Sequence[str], test_labels: Sequence[str], one: str, seed: int) -> _Task:
    halves = []
    for names in (labels, test_labels):
        rows, told = against_others(names, one, seed)
        halves += [torch.tensor(rows), torch.tensor([label == one for label in told])]
    return _Task(*halves)


def _sparse(task: _Task, f: Tensor, test_f: Tensor, chosen: Tensor, penalty: float) -> tuple[Tensor, float]:
    """Whether a probe of the chosen columns is right on each test text, [m], and its area under the curve."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    x, test_x = f[task.train][:, chosen].numpy(), test_f[task.test][:, chosen].numpy()
    probe = LogisticRegression(C=penalty, max_iter=1000).fit(x, task.train_is.numpy())
    output = torch.from_numpy(probe.decision_function(test_x))
    return ((output > 0) == task.test_is).float(), float(roc_auc_score(task.test_is.numpy(), output.numpy()))


def _dense(task: _Task, x: Tensor, test_x: Tensor, penalty: float) -> Tensor:
    weight, bias = regress(x[task.train].double().numpy(), task.train_is.int().tolist(), penalty=penalty)
    return ((test_x[task.test].double() @ weight + bias > 0) == task.test_is).float()


def _mean(right: dict[str, Tensor], tasks: dict[str, _Task], texts: Tensor) -> tuple[float, tuple[float, float]]:
    """Mean over classes of the share that is right, and its interval over texts, each of which is in several tests;
    texts: [B] which text each is.
    """
    weight, score = torch.zeros(len(texts)), torch.zeros(len(texts))
    for one, values in right.items():
        share = torch.full_like(values, 1 / len(values))
        weight.index_add_(0, tasks[one].test, share)
        score.index_add_(0, tasks[one].test, share * values)
    tested = weight > 0
    bounds = interval(score[tested] / weight[tested], weight[tested], texts[tested])
    return (score.sum() / weight.sum()).item(), bounds
