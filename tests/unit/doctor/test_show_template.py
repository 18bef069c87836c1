"""sap template MODEL: what of a conversation is trained, and what the template takes beside text."""

import pytest

from pipeline.cli import main
from pipeline.data.chat import Chat
from pipeline.doctor.show_template import describe, marked
from tests.project import TEMPLATE, make_model, make_tokenizer


def described(template: str) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return describe(Chat(tokenizer))


def test_supervised_tokens_are_marked():
    text = described(TEMPLATE)
    assert (
        "assistant\n«A duck has two legs.<|im_end|>»\n<|im_start|>user\nAnd a cow?" in text
        and "«Four.<|im_end|>»" in text
    )
    assert text.count("«") == text.count("»") == 3, (
        "two answers, and the line that says what the marks are"
    )
    assert "trained in one sequence" in text and "generation stops at <|im_end|>" in text
    assert "- the template is rendered as it is" in text and "- content is given as text" in text


def test_what_is_done_otherwise_and_what_is_refused_is_said():
    text = described(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert "trained in 2 sequences" in text and "«Four.<|im_end|>»" in text
    assert (
        "- the chat template ends no turn with a token that stops generation: <|im_end|> is put after answers"
        in text
    )
    assert "- an assistant that speaks first: taken" in text
    assert (
        "- reasoning_content: refused (leaves out reasoning_content" in text
        and "- tool calls: refused (" in text
    )


def test_parts_and_tools_that_a_template_wants():
    parts = TEMPLATE.replace("message['content']", "message['content'][0]['text']")
    assert "- content is given as parts" in described(parts)
    assert "- tool calls: taken" in described(
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{{ m.tool_calls | tojson if m.tool_calls else '' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def test_colours_on_a_terminal():
    chat = Chat(make_tokenizer())
    (sample,) = chat.encode(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], 100
    )
    assert marked(chat, sample, colour=True).count("\x1b[32ma<|im_end|>\x1b[0m") == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "model"
    make_model(folder)
    return folder


def test_the_command_and_a_template_of_ones_own(model, tmp_path, capsys):
    assert main(["template", str(model)]) == 0
    assert "«Four.<|im_end|>»" in capsys.readouterr().out
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}\n{% if %}{% endfor %}")
    assert main(["template", str(model), "--chat-template", str(mine)]) == 2
    error = capsys.readouterr().err
    assert (
        f"model.chat_template {mine} has a syntax error in line 2" in error
        and error.count("\n") == 1
    )
    assert (
        main(["template", str(model / "nothing")]) == 2
        and "is not a folder" in capsys.readouterr().err
    )
