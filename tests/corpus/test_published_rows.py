"""Promise: rows in the layouts of published datasets and trainers are read correctly, and equally in every command."""

import pytest

from corpus.row_text import DEFAULT_READER
from corpus.stats import BadRow, DroppedRow

Q, A, R, B = "1+1?", "2", "2+2?", "4"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


TWO = [user(Q), bot(A), user(R), bot(B)]
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
MARKED = (
    f"### Human: {Q}### Assistant: {A}### Human: {R}### Assistant: {B}",
    f"USER: {Q}\n\n\nASSISTANT: {A} <|endoftext|>\n\n\nUSER: {R}\n\n\nASSISTANT: {B} <|endoftext|>\n",
    f"<s>[INST] {Q} [/INST] {A} </s><s>[INST] {R} [/INST] {B} </s>",
    f"<|user|>\n{Q}</s>\n<|assistant|>\n{A}</s>\n<|user|>\n{R}</s>\n<|assistant|>\n{B}</s>",
    f"<start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n{A}<end_of_turn>\n"
    f"<start_of_turn>user\n{R}<end_of_turn>\n<start_of_turn>model\n{B}<end_of_turn>\n",
    "<|begin_of_text|>" + "".join(LLAMA3.format(turn["role"], turn["content"]) for turn in TWO),
    "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TWO),
)


@pytest.mark.parametrize("text", MARKED)
def test_text_in_the_chat_format_of_a_model_is_read_as_a_chat(text):
    assert DEFAULT_READER.read_chat({"text": text}).messages == TWO
    assert DEFAULT_READER.read_content({"text": text}).kind == "chat"
    edited = DEFAULT_READER.edit_row({"text": text}, lambda words: words.replace("2", "two"))
    assert [m["content"] for m in DEFAULT_READER.read_chat(edited).messages] == ["1+1?", "two", "two+two?", "4"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n1+1? [/INST] 2 </s>", [system("Be brief."), *TWO[:2]]),
        ("System: Be brief.\n\nHuman: 1+1?\n\nAssistant: 2", [system("Be brief."), *TWO[:2]]),
        ("### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:\n2", [user("Add.\n1+1"), bot("2")]),
        ("### Human: who?\nUser: me\n### Assistant: you\nHuman: x", [user("who?\nUser: me"), bot("you\nHuman: x")]),
    ],
)
def test_marked_text_is_parsed_into_messages(text, messages):
    assert DEFAULT_READER.read_chat({"text": text}).messages == messages


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        # Capybara, xtuner, Alpaca's keys inside a turn
        ({"conversation": [{"input": Q, "output": A}, {"input": R, "output": B}]}, TWO),
        ({"conversation": [{"system": "s", "input": Q, "output": A}]}, [system("s"), *TWO[:2]]),
        ({"conversation": [{"input": "1+1", "instruction": "Add.", "output": A}]}, [user("Add.\n1+1"), bot(A)]),
        ({"dialogue": ["Human: 1+1?", "Assistant: 2"]}, TWO[:2]),
        # a list as numpy prints it: pandas writes list columns from parquet to csv this way
        ({"messages": "[{'role': 'user', 'content': '1+1?'}\n {'role': 'assistant', 'content': '2'}]"}, TWO[:2]),
        # numbers in JSON are read as the same text as in csv
        ({"question": 5, "answer": 42}, [user("5"), bot("42")]),
        ({"question": Q, "answer": 2.0}, TWO[:2]),
        ({"messages": [user(Q), bot(2)]}, TWO[:2]),
        ({"question": Q, "answer": A, "history": [["x", 3]]}, [user("x"), bot("3"), *TWO[:2]]),
        # BELLE's question without the last marker; SQuAD; baike_qa; Cohere; Chinese keys
        ({"instruction": "Human: 1+1?\nAssistant: 2\nHuman: 2+2?", "output": B}, TWO),
        ({"question": Q, "context": "c", "answers": {"text": ["2", "two"], "answer_start": [0, 0]}},
         [user(f"{Q}\nc"), bot(A)]),
        ({"title": Q, "desc": "", "answer": A}, TWO[:2]),
        ({"messages": [{"role": "User", "content": Q}, {"role": "Chatbot", "content": A}]}, TWO[:2]),
        ({"系统提示词": "s", "用户问题": Q, "参考答案": A}, [system("s"), *TWO[:2]]),
        # an answer may be JSON text
        ({"question": "JSON?", "answer": '[{"role": "admin"}]'}, [user("JSON?"), bot('[{"role": "admin"}]')]),
        ({"question": "JSON?", "answer": '[{"role": "user", "name": "x"}]'},
         [user("JSON?"), bot('[{"role": "user", "name": "x"}]')]),
        # datasets' Sequence of objects; MOSS; HuatuoGPT; FLAN
        ({"conversations": {"from": ["human", "gpt"], "value": [Q, A]}}, TWO[:2]),
        ({"chat": {"turn_1": {"Human": "<|Human|>: 1+1?<eoh>\n", "MOSS": "<|MOSS|>: 2<eom>\n"}}}, TWO[:2]),
        ({"data": ["问：1+1?", "答：2"]}, TWO[:2]),
        ({"inputs": Q, "targets": A}, TWO[:2]),
        # SlimOrca has weights for questions as well
        ({"conversations": [{"from": "human", "value": Q, "weight": 0.0}, {"from": "gpt", "value": A, "weight": 1.0}]},
         TWO[:2]),
    ],
)  # fmt: skip
def test_published_chats_are_read(row, messages):
    content = DEFAULT_READER.read_chat(row)
    assert content.messages == messages and DEFAULT_READER.read_content(row).text == content.text


@pytest.mark.parametrize("mark", ["weight", "train", "training", "loss", "loss_weight"])
@pytest.mark.parametrize("value", [0, 0.0, False, "0", "0.0"])
def test_an_excluded_message_is_not_trained(mark, value):
    messages = DEFAULT_READER.read_chat(
        {"messages": [user(Q), bot(A, **{mark: value}), user(R), bot(B, **{mark: 1})]}
    ).messages
    assert messages == [user(Q), bot(A, weight=0), user(R), bot(B)]


@pytest.mark.parametrize(
    "row",
    [
        # ms-swift: the chosen answer is the last one of the chat
        {"query": Q, "response": A, "rejected_response": B},
        {"messages": [user(Q), bot(A)], "rejected_response": B},
        {"messages": [user(Q), bot(A)], "rejected_messages": [user(Q), bot(B)]},
        # SHP, Nectar, UltraFeedback, StackExchange
        {"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0},
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [{"answer": "3", "rank": 2.0}, {"answer": A, "rank": 1},
                                                                {"answer": B, "rank": 3.0}]},
        {"instruction": Q, "completions": [{"response": B, "overall_score": 3}, {"response": A, "overall_score": 8.5}]},
        {"question": Q, "answers": [{"text": B, "pm_score": 1}, {"text": A, "pm_score": 5}]},
        # a prompt, and whole conversations as text
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
         "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"},
        {"prompt": Q, "chosen": f"Human: {Q}\nAssistant: {A}", "rejected": f"Human: {Q}\nAssistant: {B}"},
        {"prompt": Q, "chosen": {"text": A, "score": 1}, "rejected": {"text": B, "score": 0}},
        {"prompt": Q, "chosen": 2, "rejected": 4.0},
        # csv column names are in lower case
        {"prompt": Q, "response_0": B, "Response_1": A, "better_response_id": "1"},
        {"history": Q, "human_ref_a": A, "human_ref_b": B, "labels": "1"},
        {"prompt": Q, "response_a": A, "response_b": B, "winner": "response_a"},
        {"prompt": Q, "pos_resp": A, "neg_resp": B},
        {"问题": Q, "好的回答": A, "差的回答": B},
    ],
)  # fmt: skip
def test_published_pairs_are_read(row):
    content = DEFAULT_READER.read_pair(row)
    assert (content.messages, *content.answers) == ([user(Q)], [bot(A)], [bot(B)])
    assert DEFAULT_READER.read_content(row).kind == "pair"
    again = DEFAULT_READER.read_pair(DEFAULT_READER.edit_row(row, lambda words: words.replace("+", "-")))
    assert (again.messages, *again.answers) == ([user("1-1?")], [bot(A)], [bot(B)])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chat": "USER: x\nASSISTANT: y\nFUNCTION RESPONSE: {}\nASSISTANT: z"}, "a tool result that follows no call"),
        ({"text": "<|im_start|>user\nx<|im_end|>\n<|im_start|>tool\ny<|im_end|>\n<|im_start|>assistant\nz<|im_end|>"},
         "a tool result that follows no call"),
        ({"prompt": Q, "chosen": A, "rejected": B, "weight": 0.0}, "a row with weight 0"),
        ({"prompt": Q, "answer": A, "weight": "0.0"}, "a row with weight 0"),
        ({"question": Q, "answers": {"text": [], "answer_start": []}}, "an empty answer"),
        ({"prompt": Q, "completions": [{"response": A, "score": 1}, {"response": B, "score": 1}]}, "better one"),
    ],
)  # fmt: skip
def test_rows_without_training_value_are_dropped(row, reason):
    with pytest.raises(DroppedRow, match=reason):
        (DEFAULT_READER.read_pair if "completions" in row or "chosen" in row else DEFAULT_READER.read_chat)(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": Q, "answer": {"a": 1}}, "answer is an object, not a string"),
        ({"question": Q, "answer": True}, "answer is true/false, not a string"),
        ({"prompt": Q, "completions": ["a", "b"]}, "several answers in completions"),
        ({"instruction": Q, "completions": [{"response": A}, {"response": B}]}, "several answers in completions"),
        ({"text": "User: no answer"}, "none of the keys of a chat"),
    ],
)
def test_unusable_rows_are_bad(row, reason):
    with pytest.raises(BadRow, match=reason) as error:
        DEFAULT_READER.read_chat(row)
    assert not isinstance(error.value, DroppedRow)


def test_lists_of_strings_without_an_order_are_bad_pairs():
    with pytest.raises(BadRow, match="several answers in rejected"):
        DEFAULT_READER.read_pair({"prompt": Q, "chosen": A, "rejected": ["3", B]})
    with pytest.raises(BadRow, match="none of the keys of a pair"):
        DEFAULT_READER.read_pair({"prompt": Q, "responses": [B, A]})


def test_the_first_of_several_answers_is_used_and_reported():
    content = DEFAULT_READER.read_chat({"question": Q, "answers": ["2", "two"]})
    assert content.messages == TWO[:2] and content.changes == ["with the first of several answers"]
