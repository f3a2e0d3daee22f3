"""`from sae import ...`: the public names, without torch, and what results show of themselves."""

import inspect
import subprocess
import sys

import pandas as pd
import pytest

import sae
from sae import evaluate_saes, load_saes, top_contexts
from sae.features.matching import match_features
from sae.model.sites import Site
from tests.sae.evaluation.test_evaluate import random_sae

TEXTS = ["the man sees the old dog", "a girl walks", "kings know that they were happy ."]


def test_importing_the_package_imports_no_torch():
    code = "import os, sys; before = dict(os.environ); import sae; dir(sae)\n"
    code += "assert 'torch' not in sys.modules and dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_documented():
    for name in sae.__all__:
        public = getattr(sae, name)
        assert inspect.getdoc(public), name
        if inspect.isfunction(public):
            assert "Args:" in public.__doc__ and "Raises:" in public.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        sae.train  # noqa: B018


def test_results_have_a_frame_a_text_a_file_and_a_table_for_a_notebook(tiny_model, tmp_path):
    site = Site("mlp", 0)
    saes = {site: random_sae("mlp_0", tiny_model.d_model)}
    saes[site].save(tmp_path / "saes" / "mlp_0")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    assert "mlp_0" in repr(load_saes(tmp_path, device="cpu"))
    evaluation = evaluate_saes(tiny_model, saes, text)
    assert evaluation == evaluate_saes(tiny_model, saes, TEXTS)
    results = [
        evaluation,
        top_contexts(tiny_model, saes, text, {site: [1, 2]}),
        match_features(*2 * [saes[site].W_dec]),
    ]
    for result in results:
        assert isinstance(result.to_frame(), pd.DataFrame) and len(result.text().splitlines()) >= 1
        assert "<table" in result._repr_html_()
        path = result.save(tmp_path / f"{type(result).__name__}.json")
        assert path.stat().st_size > 100
        result.save(path)
    assert list(evaluation.to_frame().index) == ["mlp_0", "all sites"]
