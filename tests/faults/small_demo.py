"""demo.py with a smaller world and model, for inject.py: its steps are forked from this process and inherit them."""

import demo
from common.errors import fail_in_one_line
from demo_world import finetune
from model.config import PRESETS

PRESETS["demo"] |= {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "max_seq_len": 64}
demo.DIM = 16
demo.FLAGS |= {"try": "--statement_rounds 1 --chat_rounds 1 --questions 5", "tokenizer": "--vocab_size 400"}
make_pairs, make_chats = finetune.pairs, finetune.identity_chats
finetune.pairs = lambda *given: list(make_pairs(*given))[::25]
finetune.identity_chats = lambda *given: list(make_chats(*given))[::10]

if __name__ == "__main__":
    with fail_in_one_line():
        demo.main()
