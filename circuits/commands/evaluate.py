"""`sfc evaluate`: how good the autoencoders of a run are, each alone and all of them together in the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from circuits.commands.common import Common, Output, at_least, load_checked_saes, load_model
from sae.evaluation import EVALUATION_FILE, evaluate
from sae.files import write_json
from sae.text import TextSource


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Measure the autoencoders of a run on text: each alone in the model, and all of them spliced in together."""

    model: str
    """Hugging Face model: hub name or folder."""
    saes: str
    """Run folder with autoencoders (`sfc train`), or the folder inside it."""
    text: str
    """Text: a .txt file (a document a line), a .jsonl file (field text), or a hub data set."""
    tokens: int = 50_000
    """Tokens measured."""
    context: int = 128
    """Tokens of a text that are read at once."""
    batch_size: int = 16
    """Texts that go through the model at once."""

    def run(self) -> Output:
        at_least(self, tokens=1, context=2, batch_size=1)
        model = load_model(self.model, self)
        saes = load_checked_saes(model, self.saes)
        with tqdm(total=self.tokens, desc="evaluate", unit="token", disable=self.quiet) as bar:
            result = evaluate(
                model,
                saes,
                TextSource.of(self.text).read(),
                max_tokens=self.tokens,
                context=self.context,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        data = result.to_dict()
        text = result.table()
        folder = Path(self.saes)
        folder = folder / "saes" if (folder / "saes").is_dir() else folder
        if folder.is_dir():
            write_json(folder / EVALUATION_FILE, data)
            text += f"\nwrote {folder / EVALUATION_FILE}"
        return Output(text, data)
