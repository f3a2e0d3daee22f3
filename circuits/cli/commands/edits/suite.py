"""`sfc test`: a suite of behaviours, each with what is expected of it; exit status 1 where one fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from circuits.cli.options import Common, Output
from circuits.cli.streams import say


@dataclass(frozen=True, kw_only=True)
class TestCommand(Common):
    """Test whether a model, edited or not, shows the behaviours that a YAML file lists: one line each, and exit status
    1 where one fails.
    """

    suite: tyro.conf.Positional[Path]
    """YAML file: model, saes, text, and behaviours with name, prompts, edit and expect, as {accuracy: ">= 0.9"}."""

    def run(self) -> Output:
        from circuits.cli.common import load_checked_saes, load_model
        from circuits.editing.suite import Suite, to_dict

        suite = Suite.load(self.suite)
        content = suite.content
        model = load_model(suite.path(content["model"]), self)
        saes = load_checked_saes(model, suite.path(content["saes"]), options=self) if "saes" in content else None
        checks = []
        for check in suite.run(model, saes):
            checks.append(check)
            value = "not measured" if check.value is None else f"{check.value:.4g}"
            if not self.json:
                verdict = "pass" if check.passed else "FAIL"
                say(f"{verdict}  {check.behaviour}: {check.quantity} {value} ({check.expected})\n")
        failed = sum(not check.passed for check in checks)
        return Output(f"{len(checks) - failed} of {len(checks)} passed", to_dict(checks), failed=failed > 0)
