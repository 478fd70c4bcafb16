"""Promise: a .pth, its log, its reports and its tokenizer with any content are used or refused in one line.

The tests flip bits, remove, overwrite and repeat bytes, and put every type at every position of the content. No
exception except UserError, no hang, no allocation beyond the size of the file.
"""

import copy
import json
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from export.hf_import import open_model
from export.model_facts import model_facts
from model.checkpoint import model_fingerprint, read_checkpoint, save_model
from model.config import FIELD_LIMITS, ModelConfig
from model.lora import LoRAConfig, attach
from model.transformer import Transformer
from tests.faults.odd_inputs import resource_limits
from tests.helpers import ROOT

ODD_VALUES = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, -0.5, 0.0, 1e-320, 1e308, float("inf"), float("nan"),
    "", "x", "\0", "\ud800", "\x1b[2J", "../../x", "a" * 300, "a" * 200_000, [], [[]], {}, {"a": {}}, {1: 2}, (1,),
    b"x",
    ["q_proj", 1], [{}], [None], {"stage": 1}, [{"stage": 7}], [{"data": None}], [{"validation": {"val_loss": 3}}],
)  # fmt: skip


def odd_tensors():
    """Objects that torch.load(weights_only=True) accepts and that are not usable weights."""
    dense = torch.zeros(2, 2)
    return [
        dense.to_sparse(),
        dense.to_sparse_csr(),
        dense.int(),
        dense.to(torch.complex64),
        dense.to(torch.bool),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(1).expand(2**20, 2**10),
        torch.zeros(2, 2, device="meta"),
        torch.full((2, 2), float("nan")),
        torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        torch.nn.Parameter(dense),
        torch.Size([1, 2]),
        torch.float32,
        dense.to(torch.float8_e4m3fn),
    ]


@pytest.fixture(scope="module")
def model_files(tokenizer, tmp_path_factory):
    """A dense model, a mixture of experts, and an adapter beside its parent."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    size = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32}
    lineage = [{"stage": "pretrain", "data": "dataset/pretrain", "tokens": 5, "validation": {"val_loss": {"zh": 1.0}}}]
    for name, changes in (("pretrain_16", {}), ("pretrain_16_moe", {"use_moe": True, "tie_embeddings": False})):
        model = Transformer(ModelConfig(tokenizer.vocab_size, **size, **changes))
        save_model(folder / f"{name}.pth", model, "pretrain", tokenizer, lineage)
    model = open_model(folder / "pretrain_16.pth")[0]
    attach(model, LoRAConfig(rank=2))
    parent = folder / "pretrain_16.pth"
    model.adapter |= {"parent": str(parent), "parent_fingerprint": model_fingerprint(parent)}
    save_model(folder / "lora_sft_16.pth", model, "lora_sft", tokenizer, lineage)
    return sorted(folder.glob("*.pth"))


def open_every_way(path: Path) -> str:
    """Open the file in each way that a script does: "used" or "refused". Other exceptions propagate."""
    outcome = "used"
    with resource_limits(seconds=10, memory=1 << 30):
        for way in (model_facts, open_model):
            try:
                opened = way(path)
                json.dumps(opened if way is model_facts else opened[2], ensure_ascii=False, default=repr)
                if way is open_model:
                    model, tokenizer, _ = opened
                    tokenizer.decode(tokenizer.encode("1+1? 太阳"))
                    model.logits(torch.tensor([tokenizer.encode("hi")[:4] or [0]]))
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 3000, error
                outcome = "refused"
    return outcome


def record_outcomes(record_attacks, kind, outcomes):
    record_attacks(kind, len(outcomes), **{name: outcomes.count(name) for name in ("used", "refused")})


# ---- bytes -----------------------------------------------------------------------------------------------------------
def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy of the bytes with one kind of damage at a random offset."""
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 64, 4096))
    other = rng.randrange(len(data))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + bytes(length) + data[at + length :]
    if kind == 4:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 5:
        return data[:at] + data[other : other + length] + data[at + length :]
    return data[:at] + data[other : other + length] + data[at:]


def test_a_file_of_damaged_bytes_is_used_or_refused(model_files, tmp_path, num_attacks, record_attacks):
    rng, outcomes = random.Random(0), []
    for i in range(num_attacks(60, 900)):
        source = model_files[i % len(model_files)]
        # Most bytes of a file are weights: every second case damages the pickle or the zip directory.
        data = source.read_bytes()
        if i % 2:
            start = data.find(b"data.pkl")
            part = data[start : start + 6000]
            data = data[:start] + damage_bytes(part, rng) + data[start + 6000 :]
        else:
            data = damage_bytes(data, rng)
        place = tmp_path / source.name
        place.write_bytes(data)
        outcomes.append(open_every_way(place))
    record_outcomes(record_attacks, "damaged bytes of a .pth", outcomes)
    assert "refused" in outcomes


def test_files_of_other_kinds_are_refused(model_files, tmp_path, record_attacks):
    contents = {
        "empty": b"", "text": b"hello", "zeros": bytes(5000), "zip": b"PK\x03\x04" + bytes(100),
        "end of a zip": b"PK\x05\x06" + bytes(18),
        "gzip": b"\x1f\x8b" + bytes(50), "pickle": b"\x80\x02}q\x00.", "safetensors": struct.pack("<Q", 2) + b"{}",
        "huge header": struct.pack("<Q", 2**63) + b"{}",
    }  # fmt: skip
    outcomes = []
    for name, content in contents.items():
        (tmp_path / "m.pth").write_bytes(content)
        outcomes.append(open_every_way(tmp_path / "m.pth"))
        assert outcomes[-1] == "refused", name
    record_outcomes(record_attacks, "files of other formats named .pth", outcomes)


# ---- types -----------------------------------------------------------------------------------------------------------
def value_paths(value, path=()):
    """The path of every value in nested dicts and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from value_paths(inner, (*path, key))


def replace_value(content, path, value):
    """A copy of the content with the value at `path` replaced, or deleted if `value` is KeyError."""
    if not path:
        return value
    copied = copy.copy(content)
    if value is KeyError and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = replace_value(content[path[0]], path[1:], value)
    return copied


def save_and_open(content, place: Path) -> str:
    torch.save(content, place)
    return open_every_way(place)


def test_every_type_at_every_position_is_used_or_refused(model_files, tmp_path, num_attacks, record_attacks):
    rng, outcomes = random.Random(1), []
    for source in model_files:
        content = torch.load(source, weights_only=True)
        every = [path for path in value_paths(content) if path]
        named = [path for path in every if path[0] not in ("model", "tokenizer")]
        cases = [(path, value) for path in every for value in (*ODD_VALUES, KeyError)]
        cases += [(path, value) for path in every if path[0] == "model" for value in odd_tensors()]
        for path, value in rng.sample(cases, num_attacks(60, 700)) + [(path, KeyError) for path in named]:
            outcomes.append(save_and_open(replace_value(content, path, value), tmp_path / source.name))
    record_outcomes(record_attacks, "unexpected values inside a .pth", outcomes)
    assert outcomes.count("refused") > len(outcomes) / 3


@pytest.mark.parametrize("field", FIELD_LIMITS)
def test_a_config_cannot_ask_for_more_than_the_file_holds(model_files, tmp_path, field):
    """Config values at and above the limits do not match the tensors: refused before the model is built."""
    for source in model_files[1:]:
        content = torch.load(source, weights_only=True)
        for value in (FIELD_LIMITS[field].maximum, int(FIELD_LIMITS[field].maximum) * 2, 2**62)[
            field == "max_seq_len" :
        ]:
            config = {**content["config"], field: value}
            outcome = save_and_open({**content, "config": config}, tmp_path / source.name)
            harmless = field in ("rope_theta", "norm_eps", "dropout", "balance_loss_coef", "max_seq_len")
            assert outcome == "refused" or (harmless or not content["config"]["use_moe"])


def test_an_expanded_tensor_is_refused(model_files, tmp_path):
    content = torch.load(model_files[1], weights_only=True)
    content["model"]["model.embed_tokens.weight"] = torch.zeros(1).expand(2**24, 2**16)
    content["config"] |= {"vocab_size": 2**24, "dim": 2**16}
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(UserError, match="more elements than the file"):
        read_checkpoint(tmp_path / "m.pth")


def test_ids_beyond_the_vocabulary_are_refused(model_files, tmp_path):
    content = torch.load(model_files[1], weights_only=True)
    tokenizer = json.loads(content["tokenizer"]["files"]["tokenizer.json"])
    tokenizer["model"]["vocab"]["zz"] = 5000
    content["tokenizer"]["files"]["tokenizer.json"] = json.dumps(tokenizer)
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(UserError, match="ids up to 5000, the model 272 rows"):
        open_model(tmp_path / "m.pth")


def test_lineage_names_cannot_send_terminal_escapes(model_files, tmp_path):
    content = torch.load(model_files[1], weights_only=True)
    content["lineage"] = [{"stage": "pretrain", "data": "a\x1b[2J\nb\u202ec", "x\x07": ["\x9b"]}]
    torch.save(content, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth")["lineage"] == [
        {"stage": "pretrain", "data": "a\\x1b[2J\\nb\\u202ec", "x\\x07": ["\\x9b"]}
    ]


# ---- tokenizers ------------------------------------------------------------------------------------------------------
def test_damaged_tokenizer_files_are_used_or_refused(model_files, tmp_path, num_attacks, record_attacks):
    rng, outcomes = random.Random(2), []
    content = torch.load(model_files[1], weights_only=True)
    files = {**content["tokenizer"]["files"], "generation_config.json": '{"eos_token_id": [1]}'}
    values = [value for value in ODD_VALUES if not isinstance(value, (bytes, tuple)) and value != {1: 2}]
    for _ in range(num_attacks(80, 1500)):
        name = rng.choice(("tokenizer.json", *files))
        text = files[name]
        if rng.random() < 0.2:
            text = damage_bytes(text.encode(), rng).decode("utf-8", "surrogateescape")
        else:
            parsed = json.loads(text)
            every = [path for path in value_paths(parsed) if path and path[:2] != ("model", "vocab")]
            path = rng.choice([*every, ("model", "vocab", "a")] if name == "tokenizer.json" else every)
            text = json.dumps(replace_value(parsed, path, rng.choice([*values, 2**32 - 1, KeyError])))
        new = {**content, "tokenizer": {"fingerprint": "x", "files": {**files, name: text}}}
        outcomes.append(save_and_open(new, tmp_path / "m.pth"))
    record_outcomes(record_attacks, "damaged tokenizer files", outcomes)
    assert outcomes.count("refused") > len(outcomes) / 5


# ---- files beside a model --------------------------------------------------------------------------------------------
def test_damaged_logs_and_reports_beside_a_model_are_used_or_skipped(
    model_files, tmp_path, num_attacks, record_attacks
):
    from trainer.metrics import read_log_rows

    rng, outcomes = random.Random(3), []
    row = {"step": 1, "loss": 2.0, "tokens": 5, "seconds": 1.0, "lr": 0.1, "tokens_per_second": 3.0}
    check = {"step": 1, "val_loss": {"zh": 1.0}, "bits_per_byte": {"zh": 1.0}}
    report = {"checkpoint": "m.pth", "accuracy": {"zh": 0.5}, "counts": {"zh": {"questions": 4}}}
    content = torch.load(model_files[1], weights_only=True)
    content["lineage"] = [{"stage": "pretrain"}]
    torch.save(content, tmp_path / "m.pth")
    for i in range(num_attacks(60, 900)):
        rows = [copy.deepcopy(row), copy.deepcopy(check)]
        path = rng.choice([path for path in value_paths(rows) if path])
        lines = replace_value(rows, path, rng.choice([value for value in ODD_VALUES if not isinstance(value, bytes)]))
        text = "\n".join(json.dumps(line) for line in lines).encode()
        beside = json.dumps(
            replace_value(report, rng.choice(list(value_paths(report))[1:]), rng.choice((None, 1, "x", [], {})))
        )
        (tmp_path / "m.jsonl").write_bytes(damage_bytes(text, rng) if i % 3 == 0 else text)
        (tmp_path / "m_report.json").write_bytes(damage_bytes(beside.encode(), rng) if i % 3 == 1 else beside.encode())
        facts = model_facts(tmp_path / "m.pth")
        json.dumps(facts)
        assert isinstance(facts["tokens"], (int, float)) and all(
            isinstance(s["questions"], dict) for s in facts["scores"]
        )
        for kept in read_log_rows(tmp_path / "m.jsonl", 5):
            assert isinstance(kept["step"], int)
        outcomes.append("used")
    record_outcomes(record_attacks, "damaged logs and reports beside a .pth", outcomes)


@pytest.mark.parametrize("where", ["bytes", "types"])
def test_a_process_refuses_a_damaged_model_in_one_line(model_files, tmp_path, num_attacks, record_attacks, where):
    """Runs 2-eval.py in a process with limited address space."""
    rng, outcomes = random.Random(4), []
    content, data = torch.load(model_files[1], weights_only=True), model_files[1].read_bytes()
    for _ in range(num_attacks(1, 20)):
        place = tmp_path / "m.pth"
        if where == "bytes":
            place.write_bytes(data[: rng.randrange(len(data))])
        else:
            torch.save(
                replace_value(content, rng.choice([("config", "dim"), ("stage",), ("model",)]), rng.choice(ODD_VALUES)),
                place,
            )
        command = [sys.executable, "2-eval.py", "--checkpoint", place, "--prompt", "x", "--device", "cpu"]
        ended = subprocess.run(
            [*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30)),
        )  # fmt: skip
        assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended
        outcomes.append("refused")
    record_outcomes(record_attacks, f"2-eval.py with damaged {where}", outcomes)
