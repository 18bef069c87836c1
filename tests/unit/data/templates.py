"""Chat templates in the manner of families in use, written for these tests: the same tokens, order and quirks, shorter.

outcome: what the contract makes of a family. "right": its own rendering. Otherwise words of the note that says what is
done, or, after "refused: ", of the sentence that refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    template: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    outcome: str = "right"
    several: bool = False  # whether a conversation of two turns takes two sequences
    stops: tuple[str, ...] = ()  # what the generation config names beside eos
    tools: bool = False  # whether tool calls can be rendered


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PAST = "past turns are rendered differently"
_ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') "
    "}}{% endif %}{% endfor %}"
)

FAMILIES = {
    "llama 2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{% set content = m['content'] %}{% if loop.first and system is defined %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + "
        "m['content'].strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "llama 3": Family(
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|eot_id|>", "<|begin_of_text|>",
    ),
    "llama 3.2, with a date and tools": Family(
        "{{- bos_token }}{%- for t in tools or [] %}{{- t | tojson }}{%- endfor %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim "
        "%}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system = '' %}{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + strftime_now('%d %b %Y') + "
        "'\n\n' }}{{- system + '<|eot_id|>' }}"
        "{%- for m in messages %}{%- if m.tool_calls %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{{- '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' + "
        "(m.tool_calls[0].function.arguments | tojson) + '}' }}"
        "{{- '<|eot_id|>' }}{%- elif m.role == 'tool' %}{{- "
        "'<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
        "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | "
        "trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"), "<|eot_id|>",
        "<|begin_of_text|>", tools=True,
    ),
    "llama 4": Family(
        "{{- bos_token }}{%- for m in messages %}{{- '<|header_start|>' + m['role'] + "
        "'<|header_end|>\n\n' }}{%- if m['content'] is string %}"
        "{{- m['content'] }}{%- else %}{%- for part in m['content'] %}{%- if part['type'] == "
        "'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}"
        "{%- endif %}{{- '<|eot|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- "
        "'<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}",
        ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"), "<|eot|>", "<|begin_of_text|>",
    ),
    "mistral v1": Family(
        "{{ bos_token }}" + _ALTERNATE +
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), "</s>", "<s>", outcome="takes no system prompt",
    ),
    "mistral v3": Family(
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- "
        "set rest = messages[1:] %}{%- else %}"
        "{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for t in tools or [] %}{{- t | "
        "tojson }}{%- endfor %}"
        "{%- for m in rest %}{%- if m['role'] == 'user' %}{%- if loop.last and system is defined "
        "%}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{%- else %}"
        "{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}{%- elif m.tool_calls %}{{- "
        "'[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
        "{{- call.function | tojson }}{%- endfor %}{{- ']' + eos_token }}{%- elif m.role == 'tool' %}"
        "{{- '[TOOL_RESULTS] {\"content\": ' + m.content | string + '}[/TOOL_RESULTS]' }}{%- else "
        "%}{{- ' ' + m['content'] | trim + eos_token }}"
        "{%- endif %}{%- endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "</s>", "<s>",
        outcome=PAST, several=True, tools=True,
    ),
    "mistral v7": Family(
        "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '[INST] ' + "
        "m['content'] + '[/INST]' }}"
        "{%- elif m['role'] == 'system' %}{{- '[SYSTEM_PROMPT] ' + m['content'] + '[/SYSTEM_PROMPT]' }}"
        "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>",
    ),
    "magistral": Family(
        "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '[INST]' + "
        "m['content'] + '[/INST]' }}"
        "{%- elif m['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
        "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}{%- if "
        "add_generation_prompt %}{{- '[THINK]' }}{%- endif %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"), "</s>",
        "<s>", outcome="opens [THINK]", several=True,
    ),
    "qwen 2.5": Family(
        "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen, created "
        "by Alibaba Cloud.<|im_end|>\n' }}{%- endif %}"
        "{%- for t in tools or [] %}{{- t | tojson }}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}{{- "
        "'<|im_start|>assistant' }}{%- if m.content %}{{- '\n' + m.content }}"
        "{%- endif %}{%- for call in m.tool_calls %}{{- '\n<tool_call>\n{\"name\": \"' + "
        "call.function.name + '\", \"arguments\": ' }}"
        "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- "
        "'<|im_end|>\n' }}{%- elif m.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{%- else %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        CHATML, "<|im_end|>", tools=True,
    ),
    "qwen 3": Family(
        "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- "
        "set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\n' "
        "+ m.content + '<|im_end|>\n' }}{%- else %}"
        "{%- set content = m.content %}{%- set thought = '' %}{%- if m.reasoning_content is string "
        "%}{%- set thought = m.reasoning_content %}"
        "{%- elif '</think>' in content %}{%- set thought = "
        "content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last %}"
        "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + "
        "content.lstrip('\n') }}{%- else %}"
        "{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        (*CHATML, "<think>", "</think>"), "<|im_end|>", outcome=PAST, several=True,
    ),
    "qwen 3, thinking": Family(
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + "
        "m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}",
        (*CHATML, "<think>", "</think>"), "<|im_end|>", outcome="opens <think>", several=True,
    ),
    "gemma 2": Family(
        ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role "
        "not supported') }}{% endif %}") + _ALTERNATE
        + "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", outcome="takes no system prompt",
    ),
    "gemma 3": Family(
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set first = "
        "messages[0]['content'] + '\n\n' %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set first = '' %}{%- set rest = messages %}{%- endif %}{%- for m in rest %}"
        "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' "
        "+ role + '\n' + (first if loop.first else '') }}"
        "{%- if m['content'] is string %}{{ m['content'] | trim }}{%- else %}{%- for part in "
        "m['content'] %}{{ part['text'] | trim }}{%- endfor %}"
        "{%- endif %}{{ '<end_of_turn>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ "
        "'<start_of_turn>model\n' }}{%- endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>",
    ),
    "phi 3": Family(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{'<|system|>\n' + m['content'] + "
        "'<|end|>\n'}}{% elif m['role'] == 'user' %}"
        "{{'<|user|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == 'assistant' "
        "%}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ "
        "eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", stops=("<|end|>",),
    ),
    "phi 4": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + "
        "'<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        (*CHATML, "<|im_sep|>"), "<|im_end|>",
    ),
    "deepseek v3": Family(
        "{%- set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' "
        "%}{%- set ns.system = m['content'] %}{%- endif %}"
        "{%- endfor %}{{- bos_token + ns.system }}{%- for t in tools or [] %}{{- t | tojson }}{%- "
        "endfor %}{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '<|User|>' + "
        "m['content'] }}"
        "{%- elif m['role'] == 'tool' %}{{- '<|tool_output_begin|>' + m['content'] + '<|tool_output_end|>' }}"
        "{%- elif m['role'] == 'assistant' and m['tool_calls'] is defined %}{{- '<|Assistant|>' "
        "}}{%- for call in m['tool_calls'] %}"
        "{{- '<|tool_call_begin|>' + call['function']['name'] + '\n```json\n' + "
        "call['function']['arguments'] + '\n```<|tool_call_end|>' }}"
        "{%- endfor %}{{- eos_token }}{%- elif m['role'] == 'assistant' %}{{- '<|Assistant|>' + "
        "m['content'] + eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}",
        ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<|tool_call_begin|>", "<|tool_call_end|>",
         "<|tool_output_begin|>", "<|tool_output_end|>"),
        "<|eos|>", "<|bos|>", tools=True,
    ),
    "deepseek r1": Family(
        "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}{{- m['content'] "
        "}}{%- elif m['role'] == 'user' %}"
        "{{- '<|User|>' + m['content'] }}{%- else %}{{- '<|Assistant|>' + "
        "m['content'].split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}",
        ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"), "<|eos|>", "<|bos|>",
        outcome="opens <think>", several=True,
    ),
    "gpt-oss": Family(
        "{{- '<|start|>system<|message|>You are ChatGPT. Current date: ' + "
        "strftime_now('%Y-%m-%d') + '<|end|>' }}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
        "{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- "
        "elif loop.last and not add_generation_prompt %}"
        "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + "
        "'<|end|>' }}{%- endif %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{%- else %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), "<|return|>", outcome=PAST, several=True,
    ),
    "command a": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'user': "
        "'<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>',"
        " 'assistant': '<|CHATBOT_TOKEN|>'}[m['role']] }}{% if m['role'] == 'assistant' %}{{ "
        "'<|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|>' }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>",
         "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"), "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    ),
    "command r7b, reasoning": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + m['role'] | "
        "upper + '_TOKEN|>' + m['content'] + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if "
        "add_generation_prompt %}{{ "
        "'<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|><|START_THINKING|>' }}{% endif %}",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>"),
        "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", outcome="opens <|START_THINKING|>", several=True,
    ),
    "glm 4": Family(
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"), "<|endoftext|>",
        stops=("<|user|>",), outcome="ends no turn with a token that stops", several=True,
    ),
    "granite 3": Family(
        "{%- for m in messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + "
        "m['content'] + '<|end_of_text|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>",
    ),
    "olmo 2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}{% elif not "
        "loop.last %}{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}"
        "{% else %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>",
    ),
    "tulu 2": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<s>", "</s>"), "</s>", "<s>", outcome="ends no turn with a token that stops", several=True,
    ),
    "smollm 2": Family(
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        CHATML, "<|im_end|>",
    ),
    "smollm 3": Family(
        "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + "
        "'\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n' }}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content.rstrip() + '\n\n<|im_end|>\n' }}{%- else %}"
        "{{- 'You are SmolLM.\n\n<|im_end|>\n' }}{%- endif %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- elif m.role == 'assistant' %}"
        "{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + "
        "'<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n' }}{%- endif %}",
        (*CHATML, "<think>", "</think>"), "<|im_end|>",
    ),
    "nemotron": Family(
        "{{- '<SPECIAL_10>System\n' }}{%- if messages[0].role == 'system' %}{{- "
        "messages[0].content }}{%- endif %}{{- '\n' }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{- '<SPECIAL_11>User\n' + m.content + '\n' }}{%- elif m.role == 'assistant' %}"
        "{{- '<SPECIAL_11>Assistant\n' + m.content.split('</think>')[-1] | trim + "
        "'\n<SPECIAL_12>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<SPECIAL_11>Assistant\n<think>\n' }}{%- endif %}",
        ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"), "<SPECIAL_12>", outcome="opens <think>", several=True,
    ),
    "apertus": Family(
        "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- '<|system_start|>' + "
        "messages[0].content + '<|system_end|>' }}{%- else %}"
        "{{- '<|system_start|>You are Apertus.<|system_end|>' }}{%- endif %}{{- "
        "'<|developer_start|>Deliberation: disabled<|developer_end|>' }}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|user_start|>' + m.content + "
        "'<|user_end|>' }}{%- elif m.role == 'assistant' %}"
        "{{- '<|assistant_start|>' + m.content + '<|assistant_end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{%- endif %}",
        ("<s>", "<|system_start|>", "<|system_end|>", "<|developer_start|>", "<|developer_end|>", "<|user_start|>",
         "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"), "<|assistant_end|>", "<s>",
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "vicuna": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' "
        "}}{% elif m['role'] == 'user' %}"
        "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token "
        "}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "alpaca": Family(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% elif m['role'] == 'user' %}"
        "{{ '### Instruction:\n' + m['content'] + '\n\n' }}{% else %}{{ '### Response:\n' + "
        "m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        ("<s>", "</s>"), "</s>", "<s>", outcome="ends no turn with a token that stops", several=True,
    ),
    "openchat": Family(
        "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + "
        "m['content'] + '<|end_of_turn|>'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
        ("<s>", "<|end_of_turn|>"), "<|end_of_turn|>", "<s>",
    ),
    "exaone": Family(
        "{% for m in messages %}{{ '[|' + m['role'] + '|]' + m['content'] }}{% if m['role'] == "
        "'user' %}{{ '\n' }}{% else %}{{ '[|endofturn|]\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"), "[|endofturn|]",
    ),
    "seed-oss": Family(
        "{%- for m in messages %}{{- bos_token + m.role + '\n' }}{%- if m.role == 'assistant' and "
        "m.reasoning_content %}"
        "{{- '<seed:think>' + m.reasoning_content + '</seed:think>' }}{%- endif %}{{- m.content + "
        "eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- bos_token + 'assistant\n' }}{%- endif %}",
        ("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"), "<seed:eos>", "<seed:bos>",
    ),
    "a multimodal one, of parts alone": Family(
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + ': ' }}{%- for part in m.content "
        "%}{%- if part.type == 'text' %}{{- part.text }}"
        "{%- endif %}{%- endfor %}{{- '<end_of_utterance>\n' }}{%- endfor %}{%- if "
        "add_generation_prompt %}{{- '<|im_start|>assistant: ' }}{%- endif %}",
        ("<|im_start|>", "<end_of_utterance>"), "<end_of_utterance>",
    ),
    "one that loses the system prompt": Family(
        "{%- for m in messages %}{%- if m.role != 'system' %}{{- '<|im_start|>' + m.role + '\n' + "
        "m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        CHATML, "<|im_end|>", outcome="leaves out the system prompt",
    ),
    "one that ends the conversation only": Family(
        "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}",
        ("<s>", "</s>"), "</s>", "<s>", outcome=PAST, several=True,
    ),
    "one that writes the next header": Family(
        "{%- for m in messages %}{%- if loop.first or m.role != 'user' %}{{- '[' + m.role + ']' "
        "}}{%- endif %}{{- m.content + '\n' }}"
        "{%- if m.role == 'assistant' %}{{- '</s>[user]' }}{%- endif %}{%- endfor %}{%- if "
        "add_generation_prompt %}{{- '[assistant]' }}{%- endif %}",
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "one that writes the next header and no end": Family(
        "{%- for m in messages %}{%- if loop.first or m.role != 'user' %}{{- '[' + m.role + ']' "
        "}}{%- endif %}{{- m.content + '\n' }}"
        "{%- if m.role == 'assistant' %}{{- '[user]' }}{%- endif %}{%- endfor %}{%- if "
        "add_generation_prompt %}{{- '[assistant]' }}{%- endif %}",
        ("<s>", "</s>"), "</s>", "<s>", outcome="ends no turn with a token that stops", several=True,
    ),
    "one that writes in capitals": Family(
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content | upper + "
        "'<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        CHATML, "<|im_end|>", outcome="changes answers", several=True,
    ),
    "one that needs tools": Family(
        "{%- for tool in tools %}{{- tool.function.name }}{%- endfor %}{%- for m in messages %}{{- "
        "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        CHATML, "<|im_end|>", outcome="refused: needs `tools`",
    ),
    "one that leaves out answers": Family(
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (m.content if m.role != "
        "'assistant' else '...') + '<|im_end|>\n' }}{%- endfor %}",
        CHATML, "<|im_end|>", outcome="refused: leaves out what the assistant says",
    ),
    "one that repeats answers": Family(
        "{%- for m in messages %}{{- m.content + (m.content if m.role == 'assistant' else '') }}{%- endfor %}",
        CHATML, "<|im_end|>", outcome="refused: repeats what the assistant says",
    ),
    "one that leaves out the user": Family(
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- m.content + '<|im_end|>' }}{%- "
        "endif %}{%- endfor %}",
        CHATML, "<|im_end|>", outcome="refused: leaves out what the user says",
    ),
    "one with a syntax error": Family(
        "{% for m in messages %}\n{{ m.content }\n", CHATML, "<|im_end|>", outcome="refused: syntax error in line 2",
    ),
    "one without an end": Family(
        "{%- for a in range(99999) %}{%- for b in range(99999) %}{%- endfor %}{%- endfor %}",
        CHATML, "<|im_end|>", outcome="refused: does not end",
    ),
}  # fmt: skip
