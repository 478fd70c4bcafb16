"""Promise: transformers, peft and exported folders with any content are loaded or refused in one line."""

import json
import random
import shutil
import struct

import pytest
import torch

from common.errors import UserError
from export.hf_export import write_hf_folder
from export.hf_import import open_model
from export.model_facts import model_facts
from export.peft_adapter import read_peft, write_peft
from model.config import ModelConfig
from model.lora import LoRAConfig, attach
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from tests.faults.test_damaged_models import ODD_VALUES, damage_bytes, open_every_way, replace_value, value_paths

JSON_VALUES = [value for value in ODD_VALUES if not isinstance(value, (bytes, tuple)) and value != {1: 2}]


@pytest.fixture(scope="module")
def exported_model(tokenizer, tmp_path_factory):
    """A transformers folder, and a peft folder for its model."""
    torch.manual_seed(0)
    config = ModelConfig(tokenizer.vocab_size, 16, 1, 2, 1, max_seq_len=32)
    model, root = Transformer(config), tmp_path_factory.mktemp("exported")
    (root / "stock").mkdir()
    write_hf_folder(root / "stock", model, tokenizer, torch.float32, 10**9)
    attach(model, LoRAConfig(rank=2))
    model.adapter["parent"] = "stock"
    write_peft(root / "peft", model)
    return root


def write_damaged(folder, name, text, rng):
    """Write the JSON file with one value replaced or its bytes damaged once."""
    if rng.random() < 0.25:
        (folder / name).write_bytes(damage_bytes(text.encode(), rng))
        return
    content = json.loads(text)
    path = rng.choice([path for path in value_paths(content) if path and path[:2] != ("model", "vocab")])
    (folder / name).write_text(json.dumps(replace_value(content, path, rng.choice([*JSON_VALUES, KeyError]))))


def test_unexpected_settings_of_a_transformers_folder_are_loaded_or_refused(
    exported_model, tmp_path, num_attacks, record_attacks
):
    rng, outcomes = random.Random(0), []
    folder = shutil.copytree(exported_model / "stock", tmp_path / "stock")
    names = [path.name for path in folder.glob("*.json")]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "sliding_window": None}
    texts["config.json"] = json.dumps({**json.loads(texts["config.json"]), **yarn})
    for _ in range(num_attacks(60, 1500)):
        name = rng.choice([*names, "config.json", "config.json"])
        write_damaged(folder, name, texts[name], rng)
        outcomes.append(open_every_way(folder))
        (folder / name).write_text(texts[name], encoding="utf-8")
    record_attacks("unexpected settings of a transformers folder", len(outcomes), refused=outcomes.count("refused"))
    assert outcomes.count("refused") > len(outcomes) / 4 and open_every_way(folder) == "used"


def test_damaged_safetensors_are_loaded_or_refused(exported_model, tmp_path, num_attacks, record_attacks):
    rng, outcomes = random.Random(1), []
    folder = shutil.copytree(exported_model / "stock", tmp_path / "stock")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, weights = json.loads(data[8 : 8 + size]), data[8 + size :]
    for i in range(num_attacks(40, 600)):
        if i % 2:
            file.write_bytes(damage_bytes(data, rng))
        else:
            path = rng.choice([path for path in value_paths(header) if path])
            values = [*JSON_VALUES, "F64", "I8", "BOOL", "F8_E4M3", [2**40, 2**40], [0], [-1], KeyError]
            new = json.dumps(replace_value(header, path, rng.choice(values))).encode()
            file.write_bytes(struct.pack("<Q", len(new)) + new + weights)
        outcomes.append(open_every_way(folder))
    record_attacks("damaged safetensors", len(outcomes), refused=outcomes.count("refused"))
    assert outcomes.count("refused") > len(outcomes) / 3


def test_an_index_can_name_only_files_of_its_folder(exported_model, tmp_path):
    folder = shutil.copytree(exported_model / "stock", tmp_path / "stock")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    outside = str(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", outside, "", ".", "..", "a/b", "x" * 300, "\0", "\ud800", None):
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="has no "):
            open_model(folder)


def test_damaged_peft_folders_are_loaded_or_refused(exported_model, tmp_path, num_attacks, record_attacks):
    rng, refused, number = random.Random(2), 0, num_attacks(60, 1000)
    folder = shutil.copytree(exported_model / "peft", tmp_path / "peft")
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    data = (folder / "adapter_model.safetensors").read_bytes()
    for i in range(number):
        model = open_model(exported_model / "stock")[0]
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(damage_bytes(data, rng) if i % 3 == 0 else data)
        if i % 3:
            write_damaged(folder, "adapter_config.json", text, rng)
        try:
            read_peft(folder, model)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    record_attacks("damaged peft folders", number, refused=refused)
    assert refused > number / 4


def test_an_unexpected_lineage_of_an_exported_folder_is_used_or_refused(
    exported_model, tmp_path, num_attacks, record_attacks
):
    rng, outcomes = random.Random(3), []
    folder = shutil.copytree(exported_model / "stock", tmp_path / "stock")
    facts = model_facts(folder)
    facts |= {"chain": [{"stage": "pretrain", "data": "x", "tokens": 3}], "scores": [
        {"name": "exam", "accuracy": {"all": 0.5}, "questions": {"all": 3}}]}  # fmt: skip
    text = json.dumps({name: value for name, value in facts.items() if name != "file"})
    for _ in range(num_attacks(60, 1000)):
        write_damaged(folder, "lineage.json", text, rng)
        outcomes.append(open_every_way(folder))
    record_attacks("unexpected lineage.json", len(outcomes), refused=outcomes.count("refused"))
    assert outcomes.count("refused") > len(outcomes) / 5 and "used" in outcomes


def test_tokenizer_files_that_are_not_utf_8_are_refused(exported_model, tmp_path):
    folder = shutil.copytree(exported_model / "stock", tmp_path / "stock")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_bytes()
        (folder / name).write_bytes(text + b"\xff")
        with pytest.raises(UserError, match="cannot read the tokenizer in"):
            load_tokenizer(folder)
        (folder / name).write_bytes(text)
