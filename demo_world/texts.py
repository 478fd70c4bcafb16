"""What demo.py prints, in Chinese: the English lines stand in the code.

    say = DemoTexts("zh")
    say("{count} of {total}", count=3, total=4)      the Chinese line with its values

The output of the scripts that the demo runs stays English.
Read next: ../demo.py, report.py and timing.py (the lines).
"""

CHINESE_LINES = {
    # titles of the steps
    "Generate the demo world": "生成演示用的小世界",
    "Train the tokenizer": "训练分词器",
    "Tokenize the texts": "把文本转成词元",
    "Tokenize the chats": "把对话转成词元",
    "Tokenize the chats about a new name": "把关于新名字的对话转成词元",
    "Tokenize the preference pairs": "把偏好对转成词元",
    "Pretrain on the texts": "预训练：学习续写文本",
    "Ask the pretrained model the held-out questions": "向预训练模型提问（留出的问题）",
    "Fine-tune on the chats": "SFT：用对话微调",
    "Ask the same questions after SFT": "SFT 之后问同样的问题",
    "Ask for its name and job before LoRA": "LoRA 之前问它的名字和工作",
    "LoRA: train a new name and job": "LoRA：训练新的名字和工作",
    "Ask for its name and job after LoRA": "LoRA 之后问它的名字和工作",
    "Ask the held-out questions after LoRA": "LoRA 之后问留出的问题",
    "DPO: train on preference pairs": "DPO：用偏好对训练",
    "Ask the held-out questions after DPO": "DPO 之后问留出的问题",
    "Generate an exam about the demo world": "生成关于小世界的考试",
    "Evaluate the exam by log-probabilities": "考试：按对数概率给选项打分",
    "Generate chats with a calculator and thoughts, and sums": "生成带计算器和思考的对话，以及加法题",
    "Tokenize these chats": "把这些对话转成词元",
    "Prepare the sums as prompts": "把加法题做成提示词",
    "Ask the model of the demo for sums of three terms": "问演示模型三个数的加法",
    "Fine-tune on these chats": "用这些对话微调",
    "Ask for the same sums after this fine-tuning": "微调之后问同样的加法",
    "Ask for results with large numbers; the model may call a calculator": "问大数的结果，模型可以调用计算器",
    "Ask the demo's held-out questions again": "再问一遍演示中留出的问题",
    "GRPO: sample answers to other sums and reward right results": "GRPO：对另一些加法采样回答，奖励正确的结果",
    "Ask for the same sums after reinforcement learning": "强化学习之后问同样的加法",
    "Ask for the results with the calculator again": "再问一遍可用计算器的题",
    # progress
    "{title}: already complete": "{title}：已经完成",
    "{title} ({time} to go)": "{title}（还需{time}）",
    "This will take {time}.": "总共需要{time}。",
    "about {minutes} minutes": "约 {minutes} 分钟",
    "about {seconds} seconds": "约 {seconds} 秒",
    "about 1 second": "约 1 秒",
    "A training step takes {slowdown} times as long as on two quiet cores: the models will be as good, only later. "
    "(--fast ends each training after a fixed time.)":
        "每个训练步的用时是两个空闲核心的 {slowdown} 倍：模型同样好，只是要多等一会儿。（--fast 让每段训练到时结束。）",
    "A training step takes {slowdown} times as long as on two quiet cores: with --fast each training sees less text "
    "and the models are worse.":
        "每个训练步的用时是两个空闲核心的 {slowdown} 倍：用了 --fast，每段训练读到的文本更少，模型会差一些。",
    # the report
    "results of each stage": "各阶段的结果",
    "stage": "阶段",
    "seconds": "秒",
    "tokens": "词元",
    "tok/s": "词元/秒",
    "loss": "损失",
    "bits/byte": "比特/字节",
    "right": "答对",
    "{count} pairs": "{count} 对",
    "time of the script, with loading and saving": "脚本的用时，含加载和保存",
    "tokens that the loss counted; for DPO pairs of answers": "计入损失的词元数；DPO 为回答对的数目",
    "trained tokens per second": "每秒训练的词元数",
    "-log p per token (DPO: per pair) in the last steps; lower is better":
        "最后几步里每个词元（DPO：每对）的 -log p，越低越好",
    "-log2 p of held-out texts (later stages: held-out answers) per byte; lower is better":
        "留出文本（后面的阶段：留出回答）每字节的 -log2 p，越低越好",
    "held-out questions whose answer contains the exact key; no stage trained on their wording":
        "回答里含有标准答案的留出问题的比例；任何阶段都没有训练过这些问法",
    "Right after SFT:": "SFT 之后答对：",
    "facts that SFT asks about in other words": "SFT 用别的问法问过的事实",
    "facts that texts and chats state, and none asks about": "文本和对话只陈述过、从没问过的事实",
    "sums up to 20 + 20 that no training text contains": "20 + 20 以内、训练文本里没有的加法",
    "{lang} {right} of {questions}": "{lang} {right}/{questions}",
    "{meaning}: {counts}": "{meaning}：{counts}",
    "Right when asked for the new name and job that LoRA trains, in words of no training text:":
        "问到 LoRA 训练的新名字和工作（训练文本里没有的问法）时答对：",
    "before LoRA: {before}; after: {after}": "LoRA 之前：{before}；之后：{after}",
    "Held-out pairs of DPO:": "DPO 的留出回答对：",
    "preferred: pairs whose chosen answer has the higher log-probability per token":
        "偏好正确：每个词元的对数概率较高的是好回答",
    "moved: pairs whose chosen answer has gained more log-probability than the rejected one":
        "方向正确：好回答的对数概率比坏回答增加得更多",
    "{lang}: preferred {before} before, {after} after; moved {moved}":
        "{lang}：偏好正确 训练前 {before}，训练后 {after}；方向正确 {moved}",
    "Exam, {questions} questions with four options each:": "考试，{questions} 道四选一的题：",
    "{accuracy} correct, 95 % confidence interval {low} to {high}; random guessing scores {chance} on average":
        "正确率 {accuracy}，95 % 置信区间 {low} 到 {high}；随机猜测平均 {chance}",
    "ten of the held-out questions, sampled at random": "随机抽取的十个留出问题",
    "wrong": "答错",
    "expected: {key}": "应为：{key}",
    "done": "完成",
    "{stage} was cut short: {reason}": "{stage} 提前结束：{reason}",
    "{millions} M parameters, trained from scratch; all steps took {minutes} minutes.":
        "{millions} M 参数，从零训练；所有步骤共用 {minutes} 分钟。",
    # the report of --rl
    "tools, thoughts and reinforcement learning": "工具、思考与强化学习",
    "right answers": "答对",
    "before": "之前",
    "SFT with tools": "带工具的 SFT",
    "GRPO": "GRPO",
    "sums of three terms, without a tool; no training contains these terms or wordings":
        "三个数的加法，不用工具；训练里没有这些数和这些问法",
    "sums, differences and products of large numbers of no training; the model may call a tool":
        "训练里没有的大数的和、差、积；模型可以调用工具",
    "the demo's held-out questions: how much of what the model knew is left":
        "演示中留出的问题：模型原来知道的还剩多少",
    "mean reward of the sampled answers: {first} in step 1, {last} in the last one":
        "采样回答的平均奖励：第 1 步 {first}，最后一步 {last}",
    "two sampled answers to one prompt, in the last step that the log shows":
        "日志里最后一步中，同一提示词的两个采样回答",
    "reward {reward}": "奖励 {reward}",
    # the last lines
    "loss curves:  {files}": "损失曲线：  {files}",
    "report to open in a browser:  {page}    as JSON:  {json}": "用浏览器打开的报告：  {page}    JSON：  {json}",
    "chat with it:  {command}": "和它聊天：  {command}",
    "demo.py took {seconds} seconds": "demo.py 用了 {seconds} 秒",
}  # fmt: skip


class DemoTexts:
    """The lines of one language, "en" or "zh"."""

    def __init__(self, lang: str = "en") -> None:
        self.chinese = CHINESE_LINES if lang == "zh" else {}

    def __call__(self, line: str, **values: object) -> str:
        """Return the line in the language, with its values."""
        return self.chinese.get(line, line).format(**values)
