"""Text reading, contexts and buffers against plain loops over the documents."""

import gzip
import json

import pytest
import torch

from sae.data.activations import ContextStream, ModelActivations, StreamState
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.sites import Site

DOCUMENTS = ["the man sees the dog", "she walks near the old cat .", "kings know queens", "a boy sings", "he was happy"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_same_documents_from_every_kind_of_file(tmp_path):
    lines = "".join(json.dumps({"text": d, "id": i}) + "\n" for i, d in enumerate(DOCUMENTS))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    paths = [write(tmp_path / "d.txt", "\n\n".join(DOCUMENTS)), write(tmp_path / "d.jsonl", lines)]
    paths.append(write(tmp_path / "d.ndjson", lines))
    for path in [*paths, tmp_path / "d.jsonl.gz"]:
        source = TextSource.of(path)
        assert list(source.read()) == DOCUMENTS
        assert list(source.read(3)) == DOCUMENTS[3:]
    assert list(TextSource.of([*DOCUMENTS, "  "]).read(1)) == DOCUMENTS[1:]


def test_mistakes_in_text_name_file_and_line(tmp_path):
    broken = write(tmp_path / "b.jsonl", '{"text": "a"}\n\n{"text": \n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 3: malformed JSON"):
        list(TextSource.of(broken).read())
    other = write(tmp_path / "o.jsonl", '{"body": "a"}\n')
    with pytest.raises(UserError, match=r"line 1: no text.*found body"):
        list(TextSource.of(other).read())
    assert list(TextSource.of(other, text_field="body").read()) == ["a"]
    with pytest.raises(UserError, match=r"is a table \(\.csv\)"):
        list(TextSource.of(write(tmp_path / "t.csv", "text,label\na,1\n")).read())
    with pytest.raises(UserError, match="no text file"):
        list(TextSource.of(tmp_path / "absent.txt").read())


def test_an_empty_text_is_refused(tiny_model, tmp_path):
    for texts in ([], write(tmp_path / "e.txt", "\n \n")):
        stream = ContextStream(tiny_model, TextSource.of(texts), context_length=8)
        with pytest.raises(UserError, match="is empty"):
            stream.take()


def test_a_context_longer_than_the_model_is_refused(tiny_model):
    with pytest.raises(UserError, match="context length is 65, allowed are 2 to 64"):
        ContextStream(tiny_model, TextSource.of(DOCUMENTS), context_length=65)


def rows_of(stream, n):
    found = []
    while len(found) < n:
        tokens = stream.take()
        found += [ids[mask.bool()].tolist() for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]
    return found


def test_documents_are_cut_into_contexts_of_the_wanted_length(tiny_model):
    stream = ContextStream(tiny_model, TextSource.of(DOCUMENTS), context_length=3)
    expected = []
    for text in DOCUMENTS:
        ids = tiny_model.tokenizer(text)["input_ids"]
        expected += [ids[i : i + 3] for i in range(0, len(ids), 3)]
    assert sorted(rows_of(stream, len(expected))) == sorted(expected)
    assert stream.state.epoch == 0
    assert sorted(rows_of(stream, len(expected))) == sorted(expected)  # from the beginning again
    assert stream.state.epoch == 1


def test_packed_contexts_are_the_documents_end_to_end(tiny_model):
    stream = ContextStream(tiny_model, TextSource.of(DOCUMENTS), context_length=4, packed=True)
    ids = [token for text in DOCUMENTS for token in tiny_model.tokenizer(text)["input_ids"]]
    twice = ids + ids
    rows = rows_of(stream, len(twice) // 4)
    assert [token for row in rows for token in row] == twice[: 4 * len(rows)]


def test_every_context_begins_with_bos_where_the_tokenizer_writes_one(shared_dir):
    from sae.model.load import load_model

    model = load_model(shared_dir / "models" / "tinystories-260k", check=False)
    for packed in (False, True):
        stream = ContextStream(
            model, TextSource.of(["One day a girl", "Two dogs ran"] * 9), context_length=5, packed=packed
        )
        rows = rows_of(stream, 20)
        assert all(row[0] == model.tokenizer.bos_token_id and 2 <= len(row) <= 5 for row in rows)


def buffers(activations, n):
    return {site: torch.zeros(n, width) for site, width in activations.widths.items()}


def test_a_fill_holds_the_activations_of_all_sites_at_the_same_tokens(tiny_model):
    sites = [Site.parse("mlp_0"), Site.parse("resid_1")]
    texts = ["the <pad> dog runs", "a <unk> cat"]  # special tokens in the middle are left out
    stream = ContextStream(tiny_model, TextSource.of(texts), context_length=8)
    activations = ModelActivations(tiny_model, stream, sites)
    buffer = buffers(activations, 8)
    assert activations.fill(buffer) == 5
    expected = {site: [] for site in sites}
    for text in texts:
        run = tiny_model.run(tiny_model.tokenize([text]), capture=sites)
        keep = [i not in tiny_model.special_ids for i in tiny_model.tokenizer(text)["input_ids"]]
        for site in sites:
            expected[site].append(run.activations[site][0][torch.tensor(keep)])
    for site in sites:
        torch.testing.assert_close(buffer[site][:5], torch.cat(expected[site]), atol=1e-5, rtol=1e-5)


def test_seeking_makes_the_same_fill_again(tiny_model):
    def source():
        stream = ContextStream(tiny_model, TextSource.of(DOCUMENTS), context_length=3)
        return ModelActivations(tiny_model, stream, [Site.parse("resid_0")])

    first = source()
    first.fill(buffers(first, 13))
    position = first.position()
    buffer = buffers(first, 13)
    n = first.fill(buffer)
    second, again = source(), buffers(first, 13)
    second.seek(StreamState(**json.loads(json.dumps(vars(position)), object_hook=_tuples)))
    assert second.fill(again) == n
    assert all(torch.equal(buffer[site], again[site]) for site in buffer)
    assert second.position() == first.position()


def test_the_text_is_opened_once_where_fills_follow_one_another(tiny_model, monkeypatch):
    starts, read = [], TextSource.read
    monkeypatch.setattr(TextSource, "read", lambda self, start=0: starts.append(start) or read(self, start))
    stream = ContextStream(tiny_model, TextSource.of(["the man"] * 600))
    activations = ModelActivations(tiny_model, stream, [Site.parse("resid_0")])
    for _ in range(3):
        activations.seek(activations.position())
        assert activations.fill(buffers(activations, 256))
    assert activations.position().documents > 64 and starts == [0]


def _tuples(record):
    pending = tuple(map(tuple, record["pending"]))
    return record | {"pending": pending, "rest": tuple(record["rest"])}


def test_nan_activations_name_the_site(make_tiny_model):
    model = make_tiny_model("gpt_neox", check=False)
    next(p for n, p in model.hf.named_parameters() if "layers.1.mlp" in n).data.fill_(float("nan"))
    stream = ContextStream(model, TextSource.of(DOCUMENTS), context_length=8)
    activations = ModelActivations(model, stream, [Site.parse("resid_0"), Site.parse("mlp_1")])
    with pytest.raises(UserError, match="site 'mlp_1'"):
        activations.fill(buffers(activations, 64))
