"""A loaded model: --quantize int8 in every command, and one decoding step for all answers.

Promises: every command that loads a model for use rounds it once; answers, scores and bits per byte are those of the
rounded model; the decoding step is made once for all answers and requests, also after a failed batch.
"""

import json

import pytest
import torch
import torch.nn.functional as F

import evaluation.chat_model
import model.generate
import serving.page
from common import cli
from evaluation.bits_per_byte import bits_per_byte
from evaluation.chat_model import open_chat_model
from model.checkpoint import save_model
from model.completion import Completion
from model.config import ModelConfig
from model.decode import DecodeModel, round_to_int8
from model.generate import generate
from model.sampling import SamplingParams
from model.transformer import Transformer
from serving.config import PageConfig, ServeConfig
from serving.models import open_models
from tests.helpers import run_script
from tests.serving.server_helpers import run_server, text_of

SENTENCES = ["The sun is bright. ", "A moon is far. ", "River and sea are wide. ", "太阳很亮。"]
TEXT = "".join(SENTENCES)
PROMPTS = ["The sun", "A moon", "River", "太阳"]
GREEDY = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """Path of a pretrained model that knows TEXT by heart, from the start of each sentence on."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 2, 4, 2, max_seq_len=160))
    orders = [SENTENCES[i:] + SENTENCES[:i] for i in range(len(SENTENCES))]
    ids = torch.tensor([tokenizer.encode("".join(order)) for order in orders])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "pretrain_64.pth"
    save_model(path, model, "pretrain", tokenizer, [{"stage": "pretrain"}])
    return path


@pytest.fixture
def made(monkeypatch):
    """The decoding steps that are made."""
    made = []

    def make(*arguments):
        made.append(DecodeModel(*arguments))
        return made[-1]

    for module in (evaluation.chat_model, model.generate):
        monkeypatch.setattr(module, "DecodeModel", make)
    return made


def run_command(name, monkeypatch, folder, trained, flags):
    """Run the command with the model `trained`; only load it for the server and the page."""
    questions = folder / "questions.csv"
    questions.write_text("question,A,B,answer\nThe sun?,bright,old,A\n", encoding="utf-8")
    if name == "chat":
        run_script(
            monkeypatch, "2-eval.py", "--checkpoint", trained, "--prompt", "The sun", "--max_new_tokens", 2, *flags
        )
    elif name == "report":
        options = ["--prompt", "The sun", "--max_new_tokens", 2, "--json", folder / "r.json"]
        run_script(monkeypatch, "2-eval.py", "--report", trained, *options, *flags)
    elif name == "exam":
        run_script(
            monkeypatch, "eval_ceval.py", "--data", questions, "--checkpoint", trained, "--out_dir", folder, *flags
        )
    elif name == "server":
        open_models(cli.parse(ServeConfig, None, ["--checkpoint", str(trained), *flags]))
    else:
        config = cli.parse(PageConfig, None, [*flags])
        serving.page.open_page_model(trained, name, (len(flags), 0), config)


@pytest.mark.parametrize("name", ["chat", "report", "exam", "server", "page"])
def test_every_command_rounds_its_model_once(name, monkeypatch, tmp_path, trained):
    rounded = []
    monkeypatch.setattr(evaluation.chat_model, "round_to_int8", lambda model: rounded.append(round_to_int8(model)))
    for flags, count in ((["--device", "cpu"], 0), (["--device", "cpu", "--quantize", "int8"], 1)):
        run_command(name, monkeypatch, tmp_path, trained, flags)
        assert len(rounded) == count
    if name == "report":
        model = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["models"][0]
        assert model["dtype"].endswith(", int8 weights")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_answers_are_those_of_the_rounded_model(dtype, trained):
    chat_model, plain = (open_chat_model(trained, "cpu", dtype, None, "int8") for _ in range(2))
    assert "int8 weights" in chat_model.summary()
    prompts = [plain.tokenizer.encode(text) for text in PROMPTS]
    with plain.autocast():
        expected = generate(plain.model, prompts, GREEDY, plain.tokenizer)
    assert [completion.ids for completion in chat_model.generate(prompts, GREEDY)] == [c.ids for c in expected]
    assert expected[1].text.startswith(" is far. River and")
    assert chat_model.decoder.lm_head.integers.dtype == torch.int8


def test_int8_hardly_changes_the_bits_per_byte(trained):
    exact, rounded = (open_chat_model(trained, "cpu", "float32", None, quantize) for quantize in ("none", "int8"))
    before, after = (bits_per_byte(m.model, m.tokenizer, [TEXT])["bits_per_byte"] for m in (exact, rounded))
    assert before != after and after == pytest.approx(before, abs=0.02)


def test_all_answers_share_one_decoding_step(trained, made):
    chat_model = open_chat_model(trained, "cpu", "bfloat16", None, "int8")
    assert made == [], "scores need none"
    prompt = chat_model.tokenizer.encode("The sun")
    for _ in range(2):
        assert "".join(chat_model.stream(prompt, GREEDY, Completion()))
        chat_model.generate([prompt], GREEDY)
    assert made == [chat_model.decoder]


def test_all_requests_share_one_decoding_step(trained, made):
    with run_server([str(trained)], quantize="int8") as server:
        texts = [text_of(server.post("completions", prompt=prompt, max_tokens=24, temperature=0)) for prompt in PROMPTS]
        assert texts[0] == " is bright. A moon is fa"
        (scheduler,) = server.service.schedulers.values()
        scheduler.fail()
        assert made == [scheduler.batch.decoder]
