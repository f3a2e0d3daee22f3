"""Tiny random models of every supported architecture, and the folder of shared material."""

from __future__ import annotations

import gc
import logging
import os

if gc.isenabled():  # until everything is imported and collected: it would look through a million objects a dozen times
    gc.disable()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads double what short texts cost
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looks for a GPU without CUDA, which survives no fork

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before Triton is imported

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sae.data.activations import ContextStream
from sae.model import huggingface
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.training import trainer
from tests.forked import ForkedCommands
from tests.graphs.browser import Browser, find_chromium
from tests.workers import pytest_addoption, run_in_workers, wants_workers  # noqa: F401 (the first is a hook)

MODEL_FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3_text")
TEXT = """
the a this that man men woman women boy boys girl girls king kings queen queens dog dogs cat cats teacher teachers
he she they him her his it is are was were runs run sees see likes like knows know walks walk sings sing
near behind with and but who which old young small tall happy . ,
"""
WORDS = TEXT.split()
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


THREADS = int(os.environ["OMP_NUM_THREADS"])
"""One, since the tests run in two processes; `make test-anywhere` asks for two as well."""
torch.set_num_threads(THREADS)

os.fsync = lambda handle: None  # it waits for the disk, of which no test takes the power away
huggingface.auto_device = lambda: torch.device("cpu")  # also where there is a GPU: tests of one name it
trainer.MIN_BUFFER_TOKENS = 2048  # a run of some thousand tokens reads no more than it needs
ContextStream.__init__.__kwdefaults__["forward_tokens"] = 2048

FORKED = pytest.StashKey[ForkedCommands]()


@pytest.fixture(autouse=True, scope="module")
def _set_aside() -> Iterator[None]:
    """Look once through what a file of tests leaves, such as models, not in every collection from then on."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(THREADS)
    torch.default_generator.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("needs_shared")


def pytest_collection_finish() -> None:
    """Let pytest listen to torch through the root logger, not through each of its sixty, six times a test."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "torch":
            logging.getLogger(name).propagate = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Set what is imported aside, and fork while no test has run, and so no thread of torch.

    The collector would else look through a million objects of torch and transformers again and again, at a second each.
    """
    gc.freeze()
    gc.set_threshold(5000, 10, 50)
    gc.enable()
    if wants_workers(session):
        start, end = partial(_start_commands, session), partial(_end_commands, session.config)
        run_in_workers(session, on_start=start, on_end=end)
        return True
    if not session.config.option.collectonly:
        _start_commands(session)
    return None


def _start_commands(session: pytest.Session) -> None:
    if any("forked" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[FORKED] = ForkedCommands(THREADS)


def _end_commands(config: pytest.Config) -> None:
    if FORKED in config.stash:
        config.stash[FORKED].close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    _end_commands(session.config)


@pytest.fixture
def forked(request: pytest.FixtureRequest) -> ForkedCommands:
    """Processes that have imported everything and started no thread: `run` a command, or `call` a function."""
    return request.config.stash[FORKED]


@pytest.fixture
def forked_sfc(forked: ForkedCommands) -> Callable[..., Any]:
    """forked_sfc("train", ..., before=function) -> status and outputs of `sfc` in a process of its own, which is cheap.

    See `tests.forked.ForkedCommands.run`. Standard output is not a terminal, and there is no GPU.
    """
    return forked.run


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; special tokens as given, all four by default."""
    special = special or SPECIAL
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_hf(architecture: str, *, layers: int = 2, seed: int = 0, width: int = 32) -> PreTrainedModel:
    """A random Hugging Face model of width 32 whose layers all matter to the logits."""
    heads, inner = 4, 2 * width
    sizes: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    if architecture == "gpt2":
        sizes = {key: value for key, value in sizes.items() if key != "pad_token_id"} | {"n_inner": inner}
    else:
        sizes["intermediate_size"] = inner
    if architecture in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text"):
        sizes |= {"num_key_value_heads": 2, "head_dim": width // heads}
    if architecture in ("gemma2", "gemma3_text"):
        sizes |= {"sliding_window": 4, "query_pre_attn_scalar": width // heads}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    for parameter in model.parameters():  # biases and norm gains start as constants: make them differ
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., LanguageModel]:
    """make_tiny_model(architecture, layers=2, seed=0, **load options) -> LanguageModel with random weights.

    Its sites are checked on the first such model alone.
    """
    checked = set()

    def make(architecture: str, layers: int = 2, *, seed: int = 0, width: int = 32, **options: Any) -> LanguageModel:
        hf = tiny_hf(architecture, layers=layers, seed=seed, width=width)
        key = architecture, layers, seed, width, repr(sorted(options.items()))
        options = {"check": key not in checked, "tokenizer": word_tokenizer(), "device": "cpu", **options}
        checked.add(key)
        return load_model(hf, **options)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., LanguageModel]) -> LanguageModel:
    """A random GPT-NeoX of 2 layers, width 32, with a tokenizer of some sixty English words."""
    return make_tiny_model("gpt_neox")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared models and data beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the shared models and data in {folder}")
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, for all files of a process."""
    if find_chromium() is None:
        pytest.skip("no Chromium on the path")
    try:
        started = Browser(tmp_path_factory.mktemp("browser"))
        started.send("Browser.getVersion")
    except (OSError, RuntimeError, TimeoutError) as error:
        pytest.skip(f"Chromium does not start: {error}")
    yield started
    started.close()
